"""The stochastic DDIM step against diffusers and torch.distributions; rollouts, tiles, files."""

from unittest.mock import Mock

import pytest
import torch
from diffusers import DDIMScheduler

import sample
from sample import (clip_of, ddim_step, draw, replay, restore, rollout, targets, tile_starts,
                    time_grid)
from utils import UserError, write_image


def make_scheduler(kind="epsilon", spacing="leading", **more):
    return DDIMScheduler(prediction_type=kind, timestep_spacing=spacing,
                         **{"clip_sample": False} | more)


def numbers(gen, count=2, side=4):
    return (torch.randn(count, 3, side, side, generator=gen) for _ in range(3))


@pytest.mark.parametrize("kind", ("epsilon", "sample", "v_prediction"))
@pytest.mark.parametrize("eta, spacing, more", (
    (0.0, "leading", {}), (0.5, "trailing", {"set_alpha_to_one": False}), (1.0, "linspace", {}),
    (1.0, "leading", {"set_alpha_to_one": False, "clip_sample": True, "clip_sample_range": 0.7})))
def test_step_equals_diffusers(kind, eta, spacing, more, gen):
    """Ours takes a batch with each sample at its own time, theirs one after the other."""
    scheduler = make_scheduler(kind, spacing, **more)
    t, a, b = time_grid(scheduler, 10)
    z, output, noise = numbers(gen, 10)
    ours = ddim_step(output, z, a, b, eta, kind, noise=noise, clip_x0=clip_of(scheduler))
    for k in range(10):
        given = noise[k] if eta > 0 else None
        theirs = scheduler.step(output[k], t[k], z[k], eta=eta, variance_noise=given)
        torch.testing.assert_close(ours.z_prev[k], theirs.prev_sample, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours.x0[k], theirs.pred_original_sample, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("spacing", ("leading", "trailing", "linspace"))
@pytest.mark.parametrize("offset, steps", ((1, 1000), (1, 50), (0, 6), (0, 7)))
def test_any_number_of_steps_stays_within_the_schedule_and_ends_it(offset, steps, spacing):
    t, a, b = time_grid(make_scheduler(spacing=spacing, steps_offset=offset), steps)
    assert len(t) == steps and 0 <= t.min() and t.max() <= 999 and (b >= a).all() and b[-1] == 1


def test_log_prob_is_the_mean_gaussian_density_and_its_gradient_the_score(gen):
    """z_prev is data: d log p / d mean = (z_prev - mean) / sigma^2, mean over C, H, W."""
    _, a, b = time_grid(make_scheduler(), 10)
    z, output, noise = numbers(gen, 3, 8)
    own = [2, 4, 7]
    step = ddim_step(output.requires_grad_(), z, a[own], b[own], 1.0, "epsilon", noise=noise)
    sigma = step.sigma_t.view(-1, 1, 1, 1)
    normal = torch.distributions.Normal(step.mean, sigma)
    torch.testing.assert_close(step.log_prob, normal.log_prob(step.z_prev).mean((1, 2, 3)))
    grad, = torch.autograd.grad(step.log_prob.sum(), step.mean)
    torch.testing.assert_close(grad, (step.z_prev - step.mean) / sigma ** 2 / z[0].numel())


@pytest.mark.parametrize("eta, prev", ((0.0, 0.9), (1.0, 1.0), (3.0, 0.9)))
def test_degenerate_steps_are_finite(eta, prev, gen):
    """sigma = 0 by eta or at the last step, eta so large that no direction is left: no NaN."""
    z, output, noise = numbers(gen)
    output.requires_grad_()
    step = ddim_step(output, z, torch.full((2,), 0.5), torch.full((2,), prev), eta, "epsilon",
                     noise=noise)
    assert all(x.isfinite().all() for x in step)
    if eta * (1 - prev) == 0:
        assert (step.log_prob == 0).all() and (step.sigma_t == 0).all()
    (step.log_prob.sum() + step.mean.sum()).backward()
    assert output.grad.isfinite().all()


def test_rollout_keeps_what_the_update_needs(tiny_restorer, gen):
    restorer, lq = tiny_restorer(), torch.rand(3, 3, 16, 16, generator=gen) * 2 - 1
    restorer.predict = Mock(wraps=restorer.predict)
    condition, noise = draw(restorer, lq, 5, gen)
    path = rollout(restorer, condition, noise, 1.0)
    times = [call.args[1][0].item() for call in restorer.predict.call_args_list]
    assert times == path.t.tolist() == [999, 799, 599, 399, 199]
    assert path.z.shape == (6, 3, 3, 16, 16) and path.x0.shape == (5, 3, 3, 16, 16)
    assert not torch.allclose(noise[1, 0], noise[1, 1])
    assert torch.equal(path.z[0], noise[0]) and path.usable == [0, 1, 2, 3]
    assert (path.log_prob[-1] == 0).all()
    for k in range(4):  # the same weights: the ratio is exactly 1, and the gradient gets through
        step = replay(restorer, path, k, 1.0)
        assert torch.equal(step.log_prob, path.log_prob[k])
        assert torch.equal(step.mean + step.sigma_t.view(-1, 1, 1, 1) * noise[k + 1], path.z[k + 1])
    step.log_prob.sum().backward()
    assert all(p.grad is not None for p in restorer.weights())


def test_a_step_whose_sigma_is_tiny_is_no_part_of_a_policy_loss(tiny_restorer, gen):
    restorer, lq = tiny_restorer(), torch.zeros(1, 3, 16, 16)
    config = restorer.scheduler.config
    restorer.scheduler = type(restorer.scheduler).from_config(config, timestep_spacing="leading")
    path = rollout(restorer, *draw(restorer, lq, 5, gen), 1.0)
    assert 0 < path.sigma_t[3] < 0.1 * path.sigma_t[0] and path.usable == [0, 1, 2]


def test_a_gradient_of_the_rollout_is_not_one_of_the_replay(tiny_restorer, gen):
    """A rollout outside of no_grad: what was sampled stays fixed in the policy gradient."""
    restorer, grads = tiny_restorer(), []
    drawn = draw(restorer, torch.zeros(2, 3, 16, 16), 4, gen)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            path = rollout(restorer, *drawn, 1.0)
        log_prob = replay(restorer, path, 2, 1.0).log_prob.sum()
        grads.append(torch.autograd.grad(log_prob, restorer.weights(), materialize_grads=True))
    assert all(torch.equal(a, b) for a, b in zip(*grads))


@pytest.mark.parametrize("length, tile, overlap", ((100, 40, 10), (64, 64, 16), (7, 32, 8),
                                                   (65, 32, 31)))
def test_tiles_cover_everything(length, tile, overlap):
    starts = tile_starts(length, tile, overlap)
    covered = {i for s in starts for i in range(s, min(s + tile, length))}
    assert covered == set(range(length)) and starts[-1] + min(tile, length) == length
    assert all(b - a <= tile - overlap for a, b in zip(starts, starts[1:]))


def test_tiles_of_a_local_network_give_the_whole(tiny_restorer, gen):
    """A network that looks at one pixel alone: blending its tiles changes nothing."""
    restorer, lq = tiny_restorer(), torch.rand(1, 3, 72, 88, generator=gen) * 2 - 1
    restorer.predict = lambda z, t, c: 0.3 * z - 0.2 * c
    whole, tiled = (restore(restorer, lq, 3, 1.0, torch.Generator().manual_seed(1), tile)
                    for tile in (256, 40))
    torch.testing.assert_close(whole, tiled, rtol=1e-4, atol=1e-4)
    answers = iter((0.0, 1.0))  # of two tiles that share 8 columns: one fades into the other
    restorer.predict = lambda z, t, c: torch.full_like(z, next(answers))
    row = sample.tiled(restorer, 32)(torch.zeros(1, 3, 32, 56), None, torch.zeros(1, 3, 32, 56))
    assert (row[0, 0, 5, 23:33].diff() > 0.05).all() and row[..., 23].max() == 0


@pytest.mark.parametrize("size, side, passes", ((0, 256, 4), (320, 320, 2)))
def test_restore_has_tiles_as_large_as_its_training(size, side, passes, tiny_restorer, gen):
    restorer, seen = tiny_restorer(), []
    restorer.defaults["size"] = size
    restorer.predict = lambda z, t, c: seen.append((len(z), z.shape[-1])) or 0.3 * z - 0.2 * c
    restore(restorer, torch.zeros(3, 3, 16, 320), 2, 1.0, gen)
    assert seen == [(3, side)] * passes


@pytest.mark.parametrize("height, width", ((16, 16), (19, 33), (3, 5), (70, 41)))
def test_restore_any_size(height, width, tiny_restorer, gen):
    """By a network whose answer is to double each pixel: none is shifted, and none is lost."""
    lq = torch.rand(1, 3, height, width, generator=gen) * 2 - 1
    restorer = tiny_restorer()
    assert restore(restorer, lq, 3, 1.0, gen, tile=32).abs().max() <= 1
    restorer.scheduler = make_scheduler("sample")
    restorer.predict = lambda z, t, c: restorer.settings["residual_scale"] * c
    torch.testing.assert_close(restore(restorer, lq / 2, 3, 1.0, gen, tile=32), lq)


def test_no_input_is_written_over(tmp_path):
    album, results = tmp_path / "album", tmp_path / "out"
    for name in ("a.png", "sub/a.png", "b.png"):
        write_image(album / name, torch.zeros(3, 8, 8))
    found = targets([album], results)
    assert [str(t.relative_to(results)) for t in found] == ["a.png", "b.png", "sub/a.png"]
    write_image(results / "b.png", torch.zeros(3, 8, 8))
    for inputs, out, words in (
            ([album], album, "is taken"), ([album / "a.png"], album, "is taken"),
            ([], results, "no images"), ([album], results, "b.png is taken"),
            ([album / "a.png", album / "sub/a.png"], results, "is taken"),
            ([tmp_path / "none"], results, "no such file")):
        with pytest.raises(UserError, match=words):
            targets(inputs, out)
