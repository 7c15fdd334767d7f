"""The stochastic DDIM step against diffusers and torch.distributions, rollouts, and images of any size."""

import pytest
import torch
from diffusers import DDIMScheduler

from sample import ddim_step, normal, predict_x0, restore, rollout, tile_starts, time_grid

TYPES = ("epsilon", "sample", "v_prediction")
SPACINGS = ("leading", "trailing", "linspace")


def make_scheduler(kind="epsilon", spacing="leading", to_one=True, **more):
    return DDIMScheduler(prediction_type=kind, timestep_spacing=spacing, set_alpha_to_one=to_one, clip_sample=False,
                         **more)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("eta", (0.0, 0.5, 1.0))
@pytest.mark.parametrize("to_one", (True, False))
@pytest.mark.parametrize("spacing", SPACINGS)
def test_step_equals_diffusers(kind, eta, to_one, spacing, gen):
    scheduler = make_scheduler(kind, spacing, to_one)
    t, a, b = time_grid(scheduler, 10)
    for k in range(10):
        z, output, noise = (torch.randn(2, 3, 4, 4, generator=gen) for _ in range(3))
        theirs = scheduler.step(output, t[k], z, eta=eta, variance_noise=noise if eta > 0 else None)
        ours = ddim_step(output, z, a[k].expand(2), b[k].expand(2), eta, kind, noise=noise)
        torch.testing.assert_close(ours.z_prev, theirs.prev_sample, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours.x0, theirs.pred_original_sample, rtol=1e-4, atol=1e-4)


def test_clipped_step_equals_diffusers(gen):
    scheduler = DDIMScheduler(clip_sample=True, clip_sample_range=0.7)
    t, a, b = time_grid(scheduler, 5)
    z, output, noise = (torch.randn(2, 3, 4, 4, generator=gen) for _ in range(3))
    theirs = scheduler.step(output, t[2], z, eta=1.0, variance_noise=noise)
    ours = ddim_step(output, z, a[2].expand(2), b[2].expand(2), 1.0, "epsilon", noise=noise, clip_x0=0.7)
    torch.testing.assert_close(ours.z_prev, theirs.prev_sample)
    assert ours.x0.abs().max() <= 0.7


def test_log_prob_is_the_mean_gaussian_density(gen):
    _, a, b = time_grid(make_scheduler(), 10)
    z, output, noise = (torch.randn(3, 3, 8, 8, generator=gen) for _ in range(3))
    step = ddim_step(output, z, a[4].expand(3), b[4].expand(3), 1.0, "epsilon", noise=noise)
    normal_ = torch.distributions.Normal(step.mean, step.sigma_t.view(-1, 1, 1, 1))
    torch.testing.assert_close(step.log_prob, normal_.log_prob(step.z_prev).mean((1, 2, 3)))
    again = ddim_step(output, z, a[4].expand(3), b[4].expand(3), 1.0, "epsilon", z_prev=step.z_prev)
    torch.testing.assert_close(again.log_prob, step.log_prob, rtol=0, atol=0)


def test_each_sample_may_be_at_its_own_time(gen):
    _, a, b = time_grid(make_scheduler("v_prediction"), 10)
    z, output, noise = (torch.randn(2, 3, 4, 4, generator=gen) for _ in range(3))
    both = ddim_step(output, z, a[[2, 7]], b[[2, 7]], 0.7, "v_prediction", noise=noise)
    for i, k in enumerate((2, 7)):
        alone = ddim_step(output[i:i + 1], z[i:i + 1], a[k:k + 1], b[k:k + 1], 0.7, "v_prediction", noise=noise[i:i + 1])
        torch.testing.assert_close(both.z_prev[i:i + 1], alone.z_prev)
        torch.testing.assert_close(both.log_prob[i:i + 1], alone.log_prob)


@pytest.mark.parametrize("eta, prev", ((0.0, 0.9), (1.0, 1.0), (3.0, 0.9)))
def test_degenerate_steps_are_finite(eta, prev, gen):
    """sigma = 0 by eta or by the last step, and eta so large that no direction is left: no NaN, forward or backward."""
    output = torch.randn(2, 3, 4, 4, generator=gen, requires_grad=True)
    z, noise = (torch.randn(2, 3, 4, 4, generator=gen) for _ in range(2))
    step = ddim_step(output, z, torch.full((2,), 0.5), torch.full((2,), prev), eta, "epsilon", noise=noise)
    assert all(x.isfinite().all() for x in step)
    if eta * (1 - prev) == 0:
        assert (step.log_prob == 0).all() and (step.sigma_t == 0).all()
    (step.log_prob.sum() + step.mean.sum()).backward()
    assert output.grad.isfinite().all()


def test_gradient_reaches_the_output_only_through_the_mean(gen):
    output = torch.randn(2, 3, 4, 4, generator=gen, requires_grad=True)
    z, noise = (torch.randn(2, 3, 4, 4, generator=gen) for _ in range(2))
    a, b = torch.full((2,), 0.3), torch.full((2,), 0.6)
    step = ddim_step(output, z, a, b, 1.0, "v_prediction", noise=noise)
    step.log_prob.sum().backward()  # z_prev is data: the score function, not the pathwise gradient
    assert output.grad.abs().sum() > 0


def test_missing_noise_and_unknown_type_are_errors():
    z, half = torch.zeros(1, 3, 4, 4), torch.full((1,), 0.5)
    with pytest.raises(ValueError, match="noise"):
        ddim_step(z, z, half, half + 0.2, 1.0, "epsilon")
    with pytest.raises(ValueError, match="flow"):
        predict_x0(z, z, half, "flow")


def test_rollout_keeps_what_the_update_needs(tiny_restorer, gen):
    restorer, lq = tiny_restorer(), torch.rand(2, 3, 16, 16, generator=gen) * 2 - 1
    path = rollout(restorer, lq, 5, 1.0, gen)
    assert path.z.shape == (6, 2, 3, 16, 16) and path.x0.shape == (5, 2, 3, 16, 16) and path.log_prob.shape == (5, 2)
    assert path.stochastic.tolist() == [True] * 4 + [False] and (path.log_prob[-1] == 0).all()
    for k in range(4):  # the ratio is exactly 1 before any update, and the gradient reaches the network
        a, b = (x.expand(2) for x in path.alpha_bar[k])
        step = ddim_step(restorer.predict(path.z[k], path.t[k].expand(2), lq), path.z[k], a, b, 1.0, "v_prediction",
                         path.z[k + 1])
        assert ((step.log_prob - path.log_prob[k]).exp() - 1).abs().max() <= 1e-5
    step.log_prob.sum().backward()
    assert sum(p.grad.abs().sum() for p in restorer.net.parameters() if p.grad is not None) > 0


def test_list_of_generators_makes_a_sample_independent_of_its_batch(tiny_restorer, gen):
    restorer, lq = tiny_restorer(), torch.rand(3, 3, 16, 16, generator=gen) * 2 - 1
    own = lambda: [torch.Generator().manual_seed(i) for i in range(3)]  # noqa: E731
    whole = rollout(restorer, lq, 4, 1.0, own(), keep=False).z[-1]
    alone = rollout(restorer, lq[2:], 4, 1.0, own()[2:], keep=False).z[-1]
    torch.testing.assert_close(whole[2:], alone, rtol=1e-4, atol=1e-4)
    assert normal((3, 2), own(), "cpu").shape == (3, 2)


@pytest.mark.parametrize("length, tile, overlap", ((100, 40, 10), (64, 64, 16), (7, 32, 8), (65, 32, 31)))
def test_tiles_cover_everything(length, tile, overlap):
    starts = tile_starts(length, tile, overlap)
    covered = {i for s in starts for i in range(s, min(s + tile, length))}
    assert covered == set(range(length)) and all(s >= 0 and s + min(tile, length) <= length for s in starts)
    assert all(b - a <= tile - overlap for a, b in zip(starts, starts[1:]))


def test_small_tiles_overlap_by_half_of_their_side_at_most(tiny_restorer, gen):
    lq, restorer, calls = torch.rand(1, 3, 64, 64, generator=gen), tiny_restorer(), []
    predict = restorer.predict
    restorer.predict = lambda *inputs: calls.append(len(inputs[0])) or predict(*inputs)
    restore(restorer, lq, 1, 1.0, gen, tile=32, overlap=31)
    assert sum(calls) == 9  # 3 x 3; with an overlap of 31, 33 x 33


@pytest.mark.parametrize("tile, overlap", ((32, 8), (30, 7), (4, 0), (100, 99)))
def test_any_tile_size_works(tile, overlap, tiny_restorer, gen):
    lq = torch.rand(1, 3, 48, 40, generator=gen) * 2 - 1
    assert restore(tiny_restorer(), lq, 2, 1.0, gen, tile=tile, overlap=overlap).isfinite().all()


@pytest.mark.parametrize("height, width", ((16, 16), (19, 33), (3, 5), (70, 41)))
def test_restore_any_size(height, width, tiny_restorer, gen):
    lq = torch.rand(1, 3, height, width, generator=gen) * 2 - 1
    out = restore(tiny_restorer(), lq, 3, 1.0, gen, tile=32, overlap=8)
    assert out.shape == lq.shape and out.isfinite().all() and out.abs().max() <= 1
