"""Is lesson 6 filled in rightly? Rewards whose gradient is known."""

import torch
from lesson6 import path_gradient, policy_gradient, signed_sft_gradient, what_hacks_what

MEAN, SIGMA, BEST = torch.tensor([0.5, -1.0, 2.0]), 0.4, torch.tensor([1.0, 1.0, 1.0])
NOISE = torch.randn(40000, 3, generator=torch.Generator().manual_seed(0))
X = MEAN + SIGMA * NOISE


def score(x):
    """The nearer to BEST the better: d E[score] / d mean = 2 (BEST - mean)."""
    return -(x - BEST).square().sum(1)


def test_the_policy_gradient_needs_rewards_alone_and_no_zero_point():
    found = policy_gradient(score(X), NOISE, SIGMA)
    torch.testing.assert_close(found, 2 * (BEST - MEAN), atol=0.1, rtol=0)
    torch.testing.assert_close(policy_gradient(score(X) + 50, NOISE, SIGMA), found,
                               atol=1e-3, rtol=1e-3)


def test_the_signed_sft_loss_is_the_policy_gradient_times_2_sigma_squared():
    mean = MEAN.clone().requires_grad_()
    rewards = score(X)
    loss = ((rewards - rewards.mean()) * (X - mean).square().sum(1)).mean()
    found = signed_sft_gradient(rewards, X, MEAN)
    torch.testing.assert_close(found, -torch.autograd.grad(loss, mean)[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found, 2 * SIGMA ** 2 * policy_gradient(rewards, NOISE, SIGMA),
                               atol=1e-4, rtol=1e-4)


def test_the_path_gradient_has_no_noise_where_the_score_is_linear():
    slope = torch.tensor([3.0, -2.0, 1.0])
    for noise in (NOISE[:2], NOISE[2:9]):
        torch.testing.assert_close(path_gradient(lambda x: x @ slope, MEAN, noise, SIGMA), slope)
    found = path_gradient(score, MEAN, NOISE[:5], SIGMA)
    torch.testing.assert_close(found, 2 * (BEST - X[:5].mean(0)))
    assert not MEAN.requires_grad


def test_edits_stay_in_the_range_and_scores_see_the_refs():
    images = torch.tensor([-0.5, 0.9]).view(2, 1, 1, 1).expand(2, 3, 4, 4)
    refs = torch.full_like(images, 0.1)

    def brightness(x, refs):
        return x.mean((1, 2, 3))

    def closeness(x, refs):
        return -(x - refs).abs().mean((1, 2, 3))
    found = what_hacks_what([lambda x: x + 0.2, lambda x: x, torch.zeros_like],
                            [brightness, closeness], images, refs)
    # -0.5 -> -0.3, 0.9 -> 1; no change; both to 0
    expected = torch.tensor([[0.15, 0.05], [0.0, 0.0], [-0.2, 0.6]])
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
