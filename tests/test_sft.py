"""The diffusion loss, the learning rate, and a resumed SFT run."""

from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch
from diffusers import DDIMScheduler

import sft
from sample import predict_x0
from sft import Config, add_noise, diffusion_loss, draw_noise, learning_rate, target_of, train
from utils import UserError, load_checkpoint


@pytest.mark.parametrize("kind", ("epsilon", "sample", "v_prediction"))
def test_loss_is_zero_at_the_output_that_recovers_z0(kind, tiny_restorer, gen):
    """That output is found through the sampler's own algebra."""
    z0, eps = torch.randn(2, 4, 3, 8, 8, generator=gen)
    restorer, t = tiny_restorer(), torch.tensor([10, 300, 600, 900])
    restorer.scheduler = DDIMScheduler(prediction_type=kind)
    a = restorer.scheduler.alphas_cumprod[t]
    z_t, wide = add_noise(z0, eps, a), a.view(-1, 1, 1, 1)
    answer = {"epsilon": eps, "sample": z0,
              "v_prediction": (wide.sqrt() * z_t - z0) / (1 - wide).sqrt()}[kind]
    restorer.predict = Mock(return_value=answer)
    x0, _ = predict_x0(answer, z_t, a, kind)
    torch.testing.assert_close(x0, z0, rtol=1e-4, atol=1e-4)
    assert diffusion_loss(restorer, z0, "seen", t, eps).abs().max() < 1e-8
    asked = restorer.predict.call_args.args
    assert torch.equal(asked[0], z_t) and torch.equal(asked[1], t) and asked[2] == "seen"
    restorer.predict.return_value = answer + torch.tensor([0.1, 0.2, 0.3, 0.4]).view(-1, 1, 1, 1)
    worse = diffusion_loss(restorer, z0, "seen", t, eps)
    torch.testing.assert_close(worse, torch.tensor([0.01, 0.04, 0.09, 0.16]), rtol=1e-3, atol=1e-5)


def test_unknown_prediction_type_is_an_error():
    x = torch.zeros(1, 3, 2, 2)
    for function in (target_of, predict_x0):
        with pytest.raises(ValueError, match="flow"):
            function(x, x, torch.ones(1), "flow")


def test_times_are_one_from_each_slice_in_random_order(tiny_restorer, gen):
    t, eps = draw_noise(tiny_restorer(), torch.zeros(10, 3, 4, 4), gen)
    assert sorted(x // 100 for x in t.tolist()) == list(range(10)) and t.tolist() != sorted(t)
    assert eps.shape == (10, 3, 4, 4) and abs(eps.std() - 1) < 0.1


def test_learning_rate_rises_then_falls_to_its_floor():
    rates = [learning_rate(i, 100, 2.0, 10, 0.3) for i in range(101)]
    assert rates[0] == pytest.approx(0.2, rel=0.01) and max(rates) == rates[9] < 2.0
    assert rates[50] == pytest.approx(1.3) and rates[100] == pytest.approx(0.6)


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


def test_the_average_is_saved_and_the_rate_arrives_with_a_batch_in_parts(run, monkeypatch):
    """One step alone has a rate: Adam's first one moves a weight by just that."""
    monkeypatch.setattr(sft, "learning_rate", lambda step, *more: 0.01 if step == 0 else 0.0)
    folder = run("rates", accumulate=2)
    state, _ = load_checkpoint(folder / "checkpoint.safetensors")
    start, saved = (sft.load(str(x)).state_dict() for x in (folder.parent / "start",
                                                            folder / "model"))
    moved = max((x - start[name]).abs().max().item() for name, x in state["weights"].items())
    assert moved == pytest.approx(0.01, rel=0.05)
    assert all(torch.equal(saved[name], x) for name, x in state["average"].items())
    assert any(not torch.equal(saved[name], x) for name, x in state["weights"].items())


def test_resumed_training_equals_unstopped_and_workers_change_nothing(run, monkeypatch):
    whole = run("whole", workers=1)
    rates = [learning_rate(i, 6, 1e-3, 0.6) for i in range(4)]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(sft, "learning_rate", Mock(side_effect=[*rates, KeyboardInterrupt]))
        run("stopped")
    assert weights(run("stopped", resume=True)) == weights(whole) != weights(run("other", seed=1))
    assert (whole / "before_after.png").stat().st_size > 1000
    for out, changes, words in (("whole", {}, "--out"),
                                ("stopped", {"resume": True, "batch": 8}, "--batch 4"),
                                ("uneven", {"accumulate": 3}, "--batch 4"),
                                ("high", {"lr": float("inf")}, "--lr")):
        with pytest.raises(UserError, match=words):
            run(out, **changes)
