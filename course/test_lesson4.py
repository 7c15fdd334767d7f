"""Is lesson 4 filled in rightly? Cases by hand, and the gradient against finite differences."""

import difficulty
import rl
import torch
from lesson4 import advantages, clipped_gradient, clipped_loss

GRID = [x.flatten() for x in torch.meshgrid(
    torch.tensor([0.5, 0.81, 1.0, 1.19, 1.5], dtype=torch.float64).log(),
    torch.tensor([2.0, -2.0], dtype=torch.float64), indexing="ij")]


def batch():
    """Rewards (64,) and histories (64, 8); one has no memory, some little, one is an outlier."""
    gen = torch.Generator().manual_seed(0)
    history = torch.rand(64, 1, generator=gen) + 0.1 * torch.randn(64, 8, generator=gen)
    rewards = history.mean(1) + 0.05 + 0.1 * torch.randn(64, generator=gen)
    history[0], history[1:9, 3:], rewards[5] = torch.nan, torch.nan, 30.0
    return rewards, history


def test_advantages_are_those_of_difficulty_py():
    rewards, history = batch()
    expected = difficulty.advantages(rewards[:, None], history.nanmean(1, keepdim=True))[:, 0]
    found = advantages(rewards, history)
    torch.testing.assert_close(found, expected)
    assert found[5] == 5 and found[0].isfinite()
    torch.testing.assert_close(advantages(rewards[6:], history[6:]).mean(), torch.tensor(0.0),
                               atol=1e-5, rtol=0)
    rewards[6] = -3.0  # far below
    for r, h in ((rewards[6:], history[6:]), (rewards[7:], history[7:])):
        expected = difficulty.advantages(r[:, None], h.nanmean(1, keepdim=True))[:, 0]
        torch.testing.assert_close(advantages(r, h), expected)


def test_equal_rewards_have_no_advantage_and_scale_does_not_count():
    rewards, history = batch()
    assert advantages(torch.ones(4), torch.ones(4, 8)).equal(torch.zeros(4))
    torch.testing.assert_close(advantages(100 * rewards + 7, 100 * history + 7),
                               advantages(rewards, history), atol=1e-3, rtol=1e-3)


def test_the_clipped_loss_is_the_larger_of_two():
    rho = torch.tensor([0.5, 1.0, 1.5, 0.5, 1.0, 1.5])
    advantage = torch.tensor([2.0, 2.0, 2.0, -2.0, -2.0, -2.0])
    loss = clipped_loss(rho.log() - 3, torch.full((6,), -3.0), advantage, 0.2)
    torch.testing.assert_close(loss, torch.tensor([-1.0, -2.0, -2.4, 1.6, 2.0, 3.0]))


def test_your_gradient_is_the_slope_of_the_loss():
    log_rho, advantage = GRID
    old, small = torch.full_like(log_rho, -1.4), 1e-6
    above, below = (rl.policy_loss(old + log_rho + step, old, advantage, 0.2)[0]
                    for step in (small, -small))
    found = clipped_gradient(old + log_rho, old, advantage, 0.2)
    torch.testing.assert_close(found, (above - below) / (2 * small), atol=1e-6, rtol=1e-6)
    assert found[log_rho == 0].tolist() == [-2.0, 2.0]
    log_prob = (old + log_rho).requires_grad_()
    for clip_range in (0.2, 0.05):
        loss = clipped_loss(log_prob, old, advantage, clip_range)
        found = clipped_gradient(log_prob.detach(), old, advantage, clip_range)
        torch.testing.assert_close(found, torch.autograd.grad(loss.sum(), log_prob)[0])
