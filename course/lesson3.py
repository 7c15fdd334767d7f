"""Lesson 3: how a multimodal language model scores an image, and how to fool it. See reward.py.

Images: (B, 3, H, W) in [-1, 1], where one of the 256 levels of a file is 2 / 255.
Fill the holes without the functions of reward.py.

    python -m pytest course -k lesson3
    python course/lesson3.py             # good as new, says the judge: runs/course/lesson3.png
"""

import kit
import reward
import torch


def level_score(logits, ids):
    """Hole 1: the score in [0, 1] of next-token logits (B, vocabulary) -> (B,).

    ids: the tokens of excellent, good, fair, poor, bad, worth 1, 0.75, 0.5, 0.25, 0. The softmax is
    over these five alone: how likely the model is to say something else does not count.
    """
    raise NotImplementedError("hole 1, level_score, is not filled yet")


def fool(score, images, radius, steps):
    """Hole 2: images that score more, no value further than `radius` from before -> like images.

    score: a function (B, 3, H, W) -> (B,) with a gradient. In each step every value moves by
    2 radius / steps in the direction (the sign) in which its image's score rises; then it is put
    back into [-1, 1] and within the radius. `images` stay as they are, the result has no gradient,
    and none is left in the judge: torch.autograd.grad, not backward.
    """
    raise NotImplementedError("hole 2, fool, is not filled yet")


def show(count=16, radius=2 * 2 / 255):
    """lq; the same, fooled, for `judge` alone; what was added, 32 times as strong; ground truth."""
    judges = {name: reward.load(name) for name in ("judge", "judge2")}
    lq, hq = (images[:4] for images in kit.crops(count))
    fooled = fool(judges["judge"].scores, lq, radius, 10)
    figure, axes = kit.panels(4, len(lq), 1.8, 2.1)
    for row, images in zip(axes[[0, 1, 3]], (lq, fooled, hq)):
        scores = torch.stack([judge(images) for judge in judges.values()], 1).tolist()
        for axis, image, pair, psnr in zip(row, images, scores, reward.psnr(images, hq).tolist()):
            kit.draw(axis, image, "judge {:.2f}, judge2 {:.2f}\n{:.1f} dB".format(*pair, psnr))
    for axis, added in zip(axes[2], fooled - lq):
        kit.draw(axis, 32 * added)
    return kit.Picture(figure)


if __name__ == "__main__":
    kit.main(show)
