"""Lesson 4: memory, advantage, and PPO's clip with its gradient. See difficulty.py, rl.policy_loss.

One reward, log_prob, advantage for each sample: (B,). history: (B, size), what this input's
memory holds, NaN where it holds less. Fill the holes without the functions of these files.

    python -m pytest course -k lesson4
    python course/lesson4.py             # what the memory takes away: runs/course/lesson4.png
"""

import kit
import reward
import torch
from model import load
from sample import restore
from utils import generator


def advantages(rewards, history, clip=5.0, delta=1e-4):
    """Hole 1: how much better than usual, in standard deviations, within +-clip -> (B,).

    1. The reward minus the mean of what the memory holds; an input without memory takes the mean
    of the batch's rewards. 2. Minus its mean over the batch. 3. Divided by its root mean square
    over the batch, plus delta. 4. Clipped. Hint: nanmean of nothing is NaN.
    """
    raise NotImplementedError("hole 1, advantages, is not filled yet")


def clipped_loss(log_prob, old_log_prob, advantage, clip_range):
    """Hole 2: max(-A rho, -A clip(rho, 1 - clip_range, 1 + clip_range)) -> (B,).

    rho = exp(log_prob - old_log_prob). It is the pessimist's choice: of the two, the larger loss.
    """
    raise NotImplementedError("hole 2, clipped_loss, is not filled yet")


def clipped_gradient(log_prob, old_log_prob, advantage, clip_range):
    """Hole 3: the derivative of clipped_loss for log_prob -> (B,), by hand, without autograd.

    Four cases: A > 0 or A < 0, rho on this or that side of its limit. Where the clipped branch is
    the larger loss, nothing is left to learn. Its value at rho = 1 is the policy gradient.
    """
    raise NotImplementedError("hole 3, clipped_gradient, is not filled yet")


@torch.no_grad()
def show(count=16):
    """Left: clipped_loss, its derivative. Right: rewards of inputs, colored by their advantage."""
    figure, ((left, right),) = kit.panels(1, 2, 5, 3.2)
    rho = torch.linspace(0.5, 1.5, 201)
    for advantage, color in ((1.0, "C0"), (-1.0, "C3")):
        point = rho.log(), torch.zeros(201), torch.full((201,), advantage), 0.2
        left.plot(rho, clipped_loss(*point), color, label=f"loss, A = {advantage:g}")
        left.plot(rho, clipped_gradient(*point), color, linestyle=":", label="d loss / d log p")
    left.set(xlabel="rho, limits at 0.8 and 1.2")
    left.legend(fontsize=7)
    restorer, judge, lq = load("", "sr"), reward.load("judge"), kit.crops(count)[0][:12]
    gen = generator(4)
    rewards = torch.stack([judge(restore(restorer, lq, 0, -1, gen)) for _ in range(5)], 1)
    known, latest = rewards[:, :4], rewards[:, 4]
    right.plot(known, "k.", alpha=0.3)
    right.plot(known.mean(1), "k_", markersize=12)
    dots = right.scatter(range(len(lq)), latest, c=advantages(latest, known), cmap="RdYlGn")
    figure.colorbar(dots, label="advantage of the latest")
    right.set(xlabel="input", title="judge: four in memory, their mean, the latest")
    return kit.Picture(figure)


if __name__ == "__main__":
    kit.main(show)
