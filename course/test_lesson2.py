"""Is lesson 2 filled in rightly? A network that knows the answer must have loss 0."""

import torch
from lesson2 import best_v, diffusion_loss

ALPHA_BAR = torch.linspace(0.999, 0.001, 1000)


def pair(std=1.0):
    """z0 of a standard deviation, eps: (4, 3, 64, 64) each."""
    z0, eps = torch.randn(2, 4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    return std * z0, eps


def oracle(z0, error):
    """A network that has seen z0: v from z_t and z0 alone, and an error (B,) that it adds."""
    def predict(z_t, t):
        a = ALPHA_BAR[t].view(-1, 1, 1, 1)
        return (a.sqrt() * z_t - z0) / (1 - a).sqrt() + error.view(-1, 1, 1, 1)
    return predict


def test_the_loss_is_the_mean_square_of_each_samples_error():
    (z0, eps), t, error = pair(), torch.tensor([50, 300, 600, 950]), torch.arange(4.0)
    error.requires_grad_()
    loss = diffusion_loss(oracle(z0, error), z0, t, ALPHA_BAR, eps)
    torch.testing.assert_close(loss, error ** 2, atol=1e-5, rtol=1e-5)
    slope, = torch.autograd.grad(loss.sum(), error)  # a loss without it trains nothing
    torch.testing.assert_close(slope, 2 * error, atol=1e-4, rtol=1e-4)


def test_no_multiple_of_best_v_is_better_and_its_loss_is_known():
    (z0, eps), t = pair(std=0.5), torch.tensor([300, 500, 700, 900])
    a = ALPHA_BAR[t]

    def loss(factor):
        return diffusion_loss(lambda z_t, t: factor * best_v(z_t, a, 0.5), z0, t, ALPHA_BAR, eps)
    torch.testing.assert_close(loss(1.0), 0.25 / (0.25 * a + 1 - a), rtol=0.05, atol=0)
    assert (loss(1.0) < loss(0.8)).all() and (loss(1.0) < loss(1.2)).all()
    assert not best_v(eps, a, 1.0).any()  # z0 like the noise: z_t says nothing about v
