"""The diffusion loss, the schedule of the learning rate, and a resumed SFT run."""

import pytest
import torch

from sample import predict_x0
from sft import Config, add_noise, diffusion_loss, one_cycle, sft_loss, train
from utils import UserError


@pytest.mark.parametrize("kind", ("epsilon", "sample", "v_prediction"))
def test_loss_is_zero_at_the_output_that_recovers_z0(kind, gen):
    """The output whose x0 prediction is z0 itself, found through the sampler's own algebra, has no loss."""
    z0, eps = (torch.randn(4, 3, 8, 8, generator=gen) for _ in range(2))
    a = torch.rand(4, generator=gen) * 0.9 + 0.05
    z_t, wide = add_noise(z0, eps, a), a.view(-1, 1, 1, 1)
    output = {"epsilon": eps, "sample": z0, "v_prediction": (wide.sqrt() * z_t - z0) / (1 - wide).sqrt()}[kind]
    torch.testing.assert_close(predict_x0(output, z_t, a, kind)[0], z0, rtol=1e-4, atol=1e-4)
    assert diffusion_loss(output, z0, eps, a, kind).abs().max() < 1e-9
    worse = diffusion_loss(output + 0.1, z0, eps, a, kind)
    torch.testing.assert_close(worse, torch.full((4,), 0.01))


def test_vectorised_loss_equals_a_loop(gen):
    z0, eps, output = (torch.randn(3, 3, 4, 4, generator=gen) for _ in range(3))
    a = torch.tensor([0.1, 0.5, 0.9])
    together = diffusion_loss(output, z0, eps, a, "v_prediction")
    for i in range(3):
        v = a[i].sqrt() * eps[i] - (1 - a[i]).sqrt() * z0[i]
        torch.testing.assert_close(together[i], ((output[i] - v) ** 2).mean())


def test_unknown_prediction_type_is_an_error():
    x = torch.zeros(1, 3, 2, 2)
    with pytest.raises(ValueError, match="flow"):
        diffusion_loss(x, x, x, torch.ones(1), "flow")


def test_loss_per_sample_falls_on_one_batch(tiny_restorer, gen):
    restorer = tiny_restorer()
    hq = torch.rand(8, 3, 16, 16, generator=gen) * 2 - 1
    lq = hq.roll(1, 3)
    optimizer = torch.optim.Adam(restorer.net.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        loss = sft_loss(restorer, lq, hq, gen)
        assert loss.shape == (8,)
        optimizer.zero_grad(), loss.mean().backward(), optimizer.step()
        losses.append(loss.mean().item())
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_one_cycle_rises_to_its_peak_and_ends_near_zero():
    rates = [one_cycle(i, 100, 1.0) for i in range(100)]
    assert rates[0] == pytest.approx(1 / 25) and max(rates) == rates[10] == pytest.approx(1)
    assert rates[-1] < 0.01 and all(a <= b for a, b in zip(rates[:10], rates[1:11]))


def test_resumed_training_equals_unstopped(tmp_path, tiny_restorer, photo_folder):
    tiny_restorer().save(tmp_path / "start")
    run = lambda out, steps, **more: train(Config(  # noqa: E731
        model=str(tmp_path / "start"), data=str(photo_folder), out=str(tmp_path / out), steps=6, batch=2, size=32,
        save_every=3, device="cpu", **more)) if steps == 6 else None
    run("whole", 6)
    whole = (tmp_path / "whole/model/unet/diffusion_pytorch_model.safetensors").read_bytes()
    # stop the second run after its first checkpoint, as a crash would
    import sft
    original, calls = sft.sft_loss, []

    def crash_at_fifth(*args):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return original(*args)
    sft.sft_loss = crash_at_fifth
    try:
        with pytest.raises(KeyboardInterrupt):
            run("stopped", 6)
    finally:
        sft.sft_loss = original
    run("stopped", 6, resume=True)
    assert (tmp_path / "stopped/model/unet/diffusion_pytorch_model.safetensors").read_bytes() == whole
    assert (tmp_path / "whole/before_after.png").stat().st_size > 1000


def test_training_on_pairs_does_not_depend_on_workers(tmp_path, tiny_restorer, photo_folder):
    from data import degrade_sr, list_images
    from utils import read_image, write_image
    for path in list_images(photo_folder):
        write_image(tmp_path / "lq" / path.name, degrade_sr(read_image(path)[None])[0][0])
    tiny_restorer().save(tmp_path / "start")
    weights = []
    for workers in (0, 2):
        out = tmp_path / f"out{workers}"
        train(Config(model=str(tmp_path / "start"), lq=str(tmp_path / "lq"), hq=str(photo_folder), out=str(out), steps=3,
                     batch=2, size=32, device="cpu", workers=workers, per_pair=2))
        weights.append((out / "model/unet/diffusion_pytorch_model.safetensors").read_bytes())
    assert weights[0] == weights[1]
    with pytest.raises(UserError, match="--recolor 0.5"):
        train(Config(model=str(tmp_path / "start"), lq=str(tmp_path / "lq"), hq=str(photo_folder), device="cpu",
                     out=str(tmp_path / "no"), recolor=0.5))


def test_photographs_through_workers_make_a_model_and_a_bad_folder_is_named(tmp_path, tiny_restorer, photo_folder):
    tiny_restorer().save(tmp_path / "start")
    train(Config(task="mixed", model=str(tmp_path / "start"), data=str(photo_folder), out=str(tmp_path / "a"), steps=2,
                 batch=2, size=32, device="cpu", workers=1, recolor=0.5))
    assert '"task": "mixed"' in (tmp_path / "a/model/restorer.json").read_text()
    with pytest.raises(UserError, match="--recolor 1.5"):
        train(Config(data=str(photo_folder), recolor=1.5, out=str(tmp_path / "b"), device="cpu"))
    with pytest.raises(UserError, match="--hq"):
        train(Config(lq=str(photo_folder), out=str(tmp_path / "b"), device="cpu"))


def test_a_new_restorer_has_the_channels_asked_for_and_latents_of_unit_variance(tmp_path, photo_folder):
    from data import get_task, photographs, random_crops
    from model import load
    common = dict(data=str(photo_folder), channels="8,16", steps=2, batch=2, size=32, device="cpu")
    for task, given, expected in (("jpeg", 0.0, None), ("sr", 3.0, 3.0)):
        train(Config(task=task, residual_scale=given, out=str(tmp_path / task), **common))
        restorer = load(str(tmp_path / task / "model"))
        assert list(restorer.net.config.block_out_channels) == [8, 16] and restorer.multiple == 4
        if expected:
            assert restorer.settings["residual_scale"] == expected
        else:
            hq = random_crops(photographs("train", str(photo_folder)), 256, 32, torch.Generator().manual_seed(9))
            lq = get_task(task)(hq, torch.Generator().manual_seed(9))[0]
            assert 0.8 < restorer.encode(hq, lq).std() < 1.25
    for channels in ("8,x", "12", "", "4"):
        with pytest.raises(UserError, match="--channels"):
            train(Config(out=str(tmp_path / "bad"), **common | {"channels": channels}))
    with pytest.raises(UserError, match="--channels"):  # a saved restorer has its own
        train(Config(out=str(tmp_path / "bad"), model=str(tmp_path / "sr/model"), **common))
