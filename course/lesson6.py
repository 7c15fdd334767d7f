"""Lesson 6: other estimators of the same gradient, and which trick raises which score.

A policy of one step: x = mean + sigma noise. noise, x: (B, D). mean: (D,). rewards: (B,). A is the
reward minus its mean over the batch. See examples/ and rl.step_loss.

    python -m pytest course -k lesson6
    python course/lesson6.py             # noise of the estimators, hacks: runs/course/lesson6.png
"""

import kit  # first: it puts the scripts on the path
import reward
import torch
import torch.nn.functional as F
from eval import color_step
from model import load
from sample import restore
from utils import generator


def policy_gradient(rewards, noise, sigma):
    """Hole 1: the batch's estimate of d E[reward] / d mean, from rewards alone -> (D,).

    The mean over the batch of A grad log p(x), log p summed over D here. This is what PPO and DDPO
    take for each step of the sampler: the reward may be a black box.
    """
    raise NotImplementedError("hole 1, policy_gradient, is not filled yet")


def signed_sft_gradient(rewards, x, mean):
    """Hole 2: minus the gradient for `mean` of mean_i A_i ||x_i - mean||^2 -> (D,).

    That loss draws to the good samples and pushes from the bad: examples/elbo.py. Find out by which
    factor it differs from hole 1; the test knows.
    """
    raise NotImplementedError("hole 2, signed_sft_gradient, is not filled yet")


def path_gradient(score, mean, noise, sigma):
    """Hole 3: the gradient for `mean` of the mean score of the samples, through x -> (D,).

    score: a function (B, D) -> (B,) that can be differentiated: examples/reward_gradient.py.
    """
    raise NotImplementedError("hole 3, path_gradient, is not filled yet")


def what_hacks_what(edits, scores, images, refs):
    """Hole 4: by how much edit e changes score s, mean over the images -> (edits, scores).

    edits: functions images -> images, put back into [-1, 1] before they are scored. scores:
    functions (images, refs) -> (B,). Two lists; images, refs: (B, 3, H, W) in [-1, 1].
    """
    raise NotImplementedError("hole 4, what_hacks_what, is not filled yet")


def blur(x):
    return F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), 3, 1)


def grain(x):
    return 0.03 * torch.randn(x.shape, generator=generator(6))


EDITS = {"sharpen": lambda x: x + 0.5 * (x - blur(x)), "blur": blur,
         "grey noise": lambda x: x + grain(x[:, :1]), "color noise": lambda x: x + grain(x),
         "contrast": lambda x: 1.1 * x}


def show(count=16):
    """Left: how well 64 samples show the way. Right: edits of restored crops, changes of scores."""
    figure, ((left, right),) = kit.panels(1, 2, 5, 3.4)
    dimensions, gen = [2 ** n for n in range(1, 15)], generator(7)
    ways = {"policy_gradient": [], "path_gradient": []}
    for size in dimensions:
        slope, noise = torch.randn(size, generator=gen), torch.randn(64, size, generator=gen)
        found = (policy_gradient(noise @ slope, noise, 1.0),
                 path_gradient(lambda x: x @ slope, torch.zeros(size), noise, 1.0))
        for cosines, way in zip(ways.values(), found):
            cosines.append(F.cosine_similarity(way, slope, dim=0))
    for name, cosines in ways.items():
        left.semilogx(dimensions, cosines, ".-", label=name)
    left.set(xlabel="dimensions", title="cosine with the true gradient, linear reward")
    left.legend()
    lq, hq = kit.crops(count)
    scores = {"judge": reward.load("judge"), "judge2": reward.load("judge2"),
              "psnr_y": reward.psnr_y, "ssim": reward.ssim, "color step ↓": color_step}
    restored = restore(load("", "sr"), lq, 0, -1, generator(8))
    table = what_hacks_what(list(EDITS.values()), list(scores.values()), restored, hq)
    better = table / table.abs().max(0).values * torch.tensor([1, 1, 1, 1, -1])  # green
    right.imshow(better, cmap="PiYG", vmin=-1.5, vmax=1.5, aspect="auto")
    for y, x in torch.cartesian_prod(*map(torch.arange, table.shape)).tolist():
        right.text(x, y, f"{table[y, x].item():+.3f}", ha="center", va="center", fontsize=8)
    right.set_xticks(range(len(scores)), scores)
    right.set_yticks(range(len(EDITS)), EDITS)
    return kit.Picture(figure)


if __name__ == "__main__":
    kit.main(show)
