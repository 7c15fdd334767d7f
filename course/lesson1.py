"""Lesson 1: one step of stochastic DDIM, and how probable it was. Formulas: the head of sample.py.

v, z_t, noise, z_prev, mean: (B, C, h, w). alpha_bar_t < alpha_bar_prev: (B,) in (0, 1]; every
sample is at a time of its own. sigma_t: (B,) >= 0. Fill the holes without sample.py's functions.

    python -m pytest course -k lesson1
    python course/lesson1.py             # your step restores a photograph: runs/course/lesson1.png
"""

import kit
import torch
from model import load
from sample import time_grid
from utils import generator


def ddim_step(v, z_t, alpha_bar_t, alpha_bar_prev, eta, noise):
    """Hole 1 -> (z_prev, mean, sigma_t); v is what the network says, a v-prediction.

    1. x0 and eps from v and z_t; 2. sigma_t; 3. mean: x0 at its new level, and of eps so much that
    together with what sigma_t adds the noise has variance 1 - alpha_bar_prev; 4. z_prev.
    Hints: x.view(-1, 1, 1, 1) makes (B,) a factor of (B, C, h, w). Rounding can leave -1e-8 under
    the root of step 3: clamp(min=0).
    """
    raise NotImplementedError("hole 1, ddim_step, is not filled yet")


def log_prob(z_prev, mean, sigma_t):
    """Hole 2: log N(z_prev; mean, sigma_t^2 I), its mean over C, H, W -> (B,).

    0 where sigma_t is 0: such a step has no density. Hint: to multiply inf by 0 gives NaN, here or
    in the gradient. Put 1 in the place of a sigma_t of 0 first, and 0 in that of its result last.
    """
    raise NotImplementedError("hole 2, log_prob, is not filled yet")


@torch.no_grad()
def show(count=16, steps=8, eta=0.5):
    """Above: z_t as an image, and log p of the step from it. Below: the clean image it promises."""
    restorer, gen = load("", "sr"), generator(1)
    lq, hq = (images[1:2] for images in kit.crops(count))
    times = [x.split(1) for x in time_grid(restorer.scheduler, steps)]
    figure, axes = kit.panels(2, steps + 1, 1.4, 1.6)
    z = torch.randn(lq.shape, generator=gen)
    for k, (t, a, b) in enumerate(zip(*times)):
        v = restorer.predict(z, t, lq)
        end = ddim_step(v, z, a, torch.ones(1), 0, z)[0]  # a step to the very end predicts x0
        kit.draw(axes[1, k], restorer.decode(end, lq)[0], "x0")
        noise = torch.randn(z.shape, generator=gen)
        z_prev, mean, sigma_t = ddim_step(v, z, a, b, eta, noise)
        kit.draw(axes[0, k], restorer.decode(z, lq)[0],
                 f"t {t.item()}\nlog p {log_prob(z_prev, mean, sigma_t).item():.2f}")
        z = z_prev
    kit.draw(axes[0, -1], restorer.decode(z, lq)[0], "restored")
    kit.draw(axes[1, -1], hq[0], "ground truth")
    return kit.Picture(figure)


if __name__ == "__main__":
    kit.main(show)
