"""Lesson 2: the diffusion loss of SFT, and how small it can get. See sft.py.

z0, eps, z_t: (B, C, h, w). t: (B,) int. alphas_cumprod: (T,), abar of each time, falling from 1
to 0. Fill the holes without the functions of sft.py.

    python -m pytest course -k lesson2
    python course/lesson2.py             # what the shipped restorer knows: runs/course/lesson2.png
"""

import kit
import torch
from model import load
from utils import generator


def diffusion_loss(predict, z0, t, alphas_cumprod, eps):
    """Hole 1: the mean over C, H, W of (target - predict(z_t, t))^2 -> (B,), one for each sample.

    target is v = sqrt(abar_t) eps - sqrt(1 - abar_t) z0. Why not one number for the batch? rl.py
    weighs the samples one by one.
    """
    raise NotImplementedError("hole 1, diffusion_loss, is not filled yet")


def best_v(z_t, alpha_bar_t, std):
    """Hole 2: the best prediction of v where all that is known is z0 ~ N(0, std^2) -> like z_t.

    alpha_bar_t: (B,). On paper: v and z_t are Gaussian with mean 0, so E[v | z_t] is z_t times
    cov(v, z_t) / var(z_t). Both follow from the definitions of v and z_t, eps being independent of
    z0. Then the loss left is std^2 / (abar_t std^2 + 1 - abar_t): a perfect network's is not 0.
    """
    raise NotImplementedError("hole 2, best_v, is not filled yet")


@torch.no_grad()
def show(count=16):
    """The loss over the time t, of the restorer and of best_v; 0: no noise, 999: noise alone."""
    restorer, gen = load("", "sr"), generator(2)
    lq, hq = kit.crops(count)
    z0, alpha_bar = restorer.encode(hq, lq), restorer.scheduler.alphas_cumprod
    std = z0.std()
    networks = {"best_v, pixel by pixel, without lq": lambda z_t, t: best_v(z_t, alpha_bar[t], std),
                "the restorer": lambda z_t, t: restorer.predict(z_t, t, lq)}
    figure, ((axis,),) = kit.panels(1, 1, 6, 3)
    for name, predict in networks.items():
        times = range(40, 1000, 80)
        losses = [diffusion_loss(predict, z0, torch.full((count,), t), alpha_bar,
                                 torch.randn(z0.shape, generator=gen)).mean() for t in times]
        axis.plot(times, losses, ".-", label=name)
    axis.set(xlabel="t", ylabel="diffusion loss", ylim=(0, None))
    axis.legend(fontsize=8)
    return kit.Picture(figure)


if __name__ == "__main__":
    kit.main(show)
