"""The diffusion loss, the learning rate, the average, and a resumed SFT run."""

from dataclasses import replace

import pytest
import torch

import sft
from sample import predict_x0
from sft import (Config, add_noise, diffusion_loss, draw_noise, learning_rate, target_of, train,
                 update_average)
from utils import UserError, load_checkpoint


class Fake:
    """A restorer whose network says what it is told, and remembers what it was asked."""

    def __init__(self, kind="epsilon"):
        from diffusers import DDIMScheduler
        self.scheduler = DDIMScheduler(prediction_type=kind)
        self.answer = None

    def predict(self, z_t, t, condition):
        self.asked = z_t, t, condition
        return self.answer

    def latent_shape(self, lq):
        return lq.shape


@pytest.mark.parametrize("kind", ("epsilon", "sample", "v_prediction"))
def test_loss_is_zero_at_the_output_that_recovers_z0(kind, gen):
    """That output is found through the sampler's own algebra."""
    z0, eps = torch.randn(2, 4, 3, 8, 8, generator=gen)
    restorer, t = Fake(kind), torch.tensor([10, 300, 600, 900])
    a = restorer.scheduler.alphas_cumprod[t]
    z_t, wide = add_noise(z0, eps, a), a.view(-1, 1, 1, 1)
    torch.testing.assert_close(z_t, wide.sqrt() * z0 + (1 - wide).sqrt() * eps)
    restorer.answer = {"epsilon": eps, "sample": z0,
                       "v_prediction": (wide.sqrt() * z_t - z0) / (1 - wide).sqrt()}[kind]
    x0, _ = predict_x0(restorer.answer, z_t, a, kind)
    torch.testing.assert_close(x0, z0, rtol=1e-4, atol=1e-4)
    assert diffusion_loss(restorer, z0, "seen", t, eps).abs().max() < 1e-8
    assert torch.equal(restorer.asked[0], z_t) and torch.equal(restorer.asked[1], t)
    assert restorer.asked[2] == "seen"
    restorer.answer = restorer.answer + torch.tensor([0.1, 0.2, 0.3, 0.4]).view(-1, 1, 1, 1)
    worse = diffusion_loss(restorer, z0, "seen", t, eps)
    torch.testing.assert_close(worse, torch.tensor([0.01, 0.04, 0.09, 0.16]), rtol=1e-3, atol=1e-5)


def test_unknown_prediction_type_is_an_error():
    x = torch.zeros(1, 3, 2, 2)
    with pytest.raises(ValueError, match="flow"):
        target_of(x, x, torch.ones(1), "flow")


def test_times_are_one_from_each_slice_in_random_order(gen):
    t, eps = draw_noise(Fake(), torch.zeros(10, 3, 4, 4), gen)
    assert sorted(x // 100 for x in t.tolist()) == list(range(10)) and t.tolist() != sorted(t)
    assert eps.shape == (10, 3, 4, 4) and abs(eps.std() - 1) < 0.1


def test_learning_rate_rises_then_falls_to_its_floor():
    rates = [learning_rate(i, 100, 2.0, 10, 0.3) for i in range(101)]
    assert rates[0] == pytest.approx(0.2, rel=0.01) and max(rates) == rates[9] < 2.0
    assert rates[50] == pytest.approx(1.3) and rates[100] == pytest.approx(0.6)


def test_average_moves_by_one_minus_its_decay(tiny_restorer):
    restorer = tiny_restorer()
    average = restorer.frozen_copy()
    before = average.weights()[0].clone()
    with torch.no_grad():
        restorer.weights()[0] += 1.0
    update_average(average, restorer, 0.9)
    torch.testing.assert_close(average.weights()[0], before + 0.1)


def test_loss_falls_on_one_batch(tiny_restorer, gen):
    restorer = tiny_restorer()
    hq = torch.rand(8, 3, 16, 16, generator=gen) * 2 - 1
    lq = hq.roll(1, 3)
    optimizer = torch.optim.Adam(restorer.weights(), lr=3e-3)
    losses = []
    for _ in range(60):
        t, eps = draw_noise(restorer, lq, gen)
        loss = diffusion_loss(restorer, restorer.encode(hq, lq), lq, t, eps).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


@pytest.fixture
def run(tmp_path, tiny_restorer, photo_folder, monkeypatch):
    """Six steps of training on 32 pixels with a checkpoint every third."""
    tiny_restorer().save(tmp_path / "start")
    monkeypatch.setattr(sft, "SAVE_EVERY", 3)

    def start(out, **changes):
        cfg = Config(model=str(tmp_path / "start"), data=str(photo_folder), steps=6, batch=4,
                     size=32, out=str(tmp_path / out))
        train(replace(cfg, **changes))
        return tmp_path / out
    return start


def weights(folder):
    return (folder / "model/unet/diffusion_pytorch_model.safetensors").read_bytes()


def test_the_average_is_saved_and_the_rate_follows_its_schedule(run, monkeypatch):
    rates, original = [], sft.learning_rate
    monkeypatch.setattr(sft, "update_average", lambda average, restorer, decay: rates.append(
        optimizers[0].param_groups[0]["lr"]) or update_average(average, restorer, 0.5))
    optimizers, adamw = [], torch.optim.AdamW
    monkeypatch.setattr(torch.optim, "AdamW", lambda *args, **more: optimizers.append(
        adamw(*args, **more)) or optimizers[0])
    folder = run("rates")
    assert rates == [original(i, 6, 1e-3, 0.6) for i in range(6)]
    state, _ = load_checkpoint(folder / "checkpoint.safetensors")
    saved = sft.load(str(folder / "model")).state_dict()
    assert all(torch.equal(saved[name], x) for name, x in state["average"].items())
    assert any(not torch.equal(saved[name], x) for name, x in state["weights"].items())


def test_resumed_training_equals_unstopped_and_workers_change_nothing(run, monkeypatch):
    whole = run("whole", workers=1)
    original, calls = sft.diffusion_loss, []

    def crash_at_fifth(*args):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return original(*args)
    monkeypatch.setattr(sft, "diffusion_loss", crash_at_fifth)
    with pytest.raises(KeyboardInterrupt):
        run("stopped")
    monkeypatch.setattr(sft, "diffusion_loss", original)
    assert weights(run("stopped", resume=True)) == weights(whole) != weights(run("other", seed=1))
    assert (whole / "before_after.png").stat().st_size > 1000
    with pytest.raises(UserError, match="--out"):
        run("whole")
    with pytest.raises(UserError, match="--batch 4"):
        run("stopped", resume=True, batch=8)


def test_parts_of_a_batch_add_up_and_bad_numbers_are_named(run):
    run("parts", accumulate=2)
    with pytest.raises(UserError, match="--batch 4"):
        run("uneven", accumulate=3)
    with pytest.raises(UserError, match="--lr"):
        run("high", lr=float("inf"))
