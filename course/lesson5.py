"""Lesson 5: difficulty, and the balance between RL and SFT. See difficulty.py, rl.step_loss.

One distance, w, loss for each sample: (B,). Means: (B, C, h, w). Fill the holes without the
functions of these files.

    python -m pytest course -k lesson5
    python course/lesson5.py             # from easy to hard, and their w: runs/course/lesson5.png
"""

import kit
import reward
import torch
from model import load
from sample import restore
from utils import generator


def kl(mean, ref_mean, sigma_t):
    """Hole 1: KL of N(mean, sigma_t^2 I) from N(ref_mean, sigma_t^2 I), mean over C, H, W -> (B,).

    sigma_t: (B,) > 0. On paper: the two have one sigma, so only a square is left.
    """
    raise NotImplementedError("hole 1, kl, is not filled yet")


def weight(distance, distance_sft):
    """Hole 2: w = sigmoid(2 (distance - m) / s) in [0, 1], the share of RL -> (B,).

    m: the median of distance_sft (N,); s: its interquartile range / 1.349, at least 1e-6. Why not
    mean and std? One hopeless input would make all others easy. Hint: torch.quantile, for m, too.
    """
    raise NotImplementedError("hole 2, weight, is not filled yet")


def total_loss(w, rl_loss, sft_loss, kl_loss, sft_coef, kl_coef):
    """Hole 3: the paper's loss, mean_i [w_i L_RL,i + (1 - w_i) lambda L_SFT,i] + beta mean KL.

    (B,) four times and two floats -> a scalar.
    """
    raise NotImplementedError("hole 3, total_loss, is not filled yet")


def sft_coef_for(share, row, sft_coef):
    """Hole 4: the lambda that would give SFT `share` in (0, 1) of the norms of RL and SFT together.

    row: of metrics.csv, as floats, with share_rl and share_sft as they were with sft_coef. The norm
    of SFT's gradient is proportional to lambda, that of RL does not depend on it. -> float
    """
    raise NotImplementedError("hole 4, sft_coef_for, is not filled yet")


@torch.no_grad()
def show(count=16):
    """Restored crops from easy to hard, with their distance and w; below, their ground truth."""
    restorer, judge = load("", "sr"), reward.load("judge")
    lq, hq = kit.crops(count)
    restored = restore(restorer, lq, 0, -1, generator(5))
    distance = (judge(hq) - judge(restored)).clamp(min=0)
    w = weight(distance, distance)
    chosen = w.argsort()[torch.linspace(0, count - 1, 8).long()].tolist()
    figure, axes = kit.panels(2, 8, 1.5, 1.7)
    for column, i in zip(axes.T, chosen):
        kit.draw(column[0], restored[i], f"d {distance[i].item():.2f}\nw {w[i].item():.2f}")
        kit.draw(column[1], hq[i])
    return kit.Picture(figure)


if __name__ == "__main__":
    kit.main(show)
