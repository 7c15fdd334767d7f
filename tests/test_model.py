"""Every family passes the same tests, on tiny random weights saved and loaded as real ones are."""


import pytest
import torch
import torch.nn.functional as F
from tiny import TINY

import model
from sample import rollout
from utils import UserError, generator, read_image

LQ = torch.rand(2, 3, 32, 32, generator=generator(0)) * 2 - 1


@pytest.fixture(params=TINY)
def restorer(request):
    return TINY[request.param]()


def normal(restorer):
    return torch.randn(restorer.latent_shape(LQ), generator=generator(1))


def predict(restorer):
    """The output for LQ and one noise at two times."""
    condition = restorer.condition(LQ, generator(1))
    return restorer.predict(normal(restorer), torch.tensor([3, 700]), condition)


def shake(restorer, part="all"):
    """Moves the weights that train."""
    restorer.train_only(part)
    for index, parameter in enumerate(restorer.weights()):
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator(2, index))


def equal(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_shapes_ranges_and_scales(restorer):
    hq, family = LQ.flip(-1), restorer.family
    expected = {"pixel": (8, 5.0), "ldm-sr": (8, 1.0), "sd-controlnet": (16, 0.18215),
                "sd-x4-upscaler": (8, 0.08333)}
    multiple, scale = expected[family]
    assert restorer.multiple == multiple and expected.keys() == model.FAMILIES.keys()
    if family == "pixel":
        z0 = scale * (hq - LQ)
        assert torch.allclose(restorer.decode(z0, LQ), hq, atol=1e-6)
    else:  # decode: by the stock pipelines below
        out = restorer.vae.encode(hq)
        z0 = scale * (out.latents if family == "ldm-sr" else out.latent_dist.mode())
    encoded = restorer.encode(hq, LQ)
    assert torch.allclose(encoded, z0, atol=1e-5) and not encoded.requires_grad
    assert restorer.latent_shape(LQ[:1, :, :16]) == (1, *z0[:, :, :16 // restorer.factor].shape[1:])
    assert restorer.decode(100 * z0 + 1, LQ).abs().max() <= 1
    exact, rounded = predict(restorer), predict(restorer.to("cpu", torch.bfloat16))
    assert exact.shape == z0.shape and exact.dtype == rounded.dtype == torch.float32
    assert 0 < (exact - rounded).abs().max() < 0.1 * exact.abs().max()


def test_the_upscalers_condition_has_noise_of_its_level():
    restorer = TINY["sd-x4-upscaler"]()
    restorer.settings["noise_level"] = 300
    small = F.avg_pool2d(LQ[..., 1:, 1:], 2, 4)  # the central 2 x 2 of each 4 x 4
    alpha_bar = restorer.frozen["low_res_scheduler"].alphas_cumprod[300]
    noise = torch.randn(small.shape, generator=generator(1))
    expected = alpha_bar.sqrt() * small + (1 - alpha_bar).sqrt() * noise
    assert torch.allclose(restorer.condition(LQ, generator(1)), expected, atol=1e-6)


def test_modulation_or_words_train_and_an_update_reaches_nothing_else(restorer):
    names = [name for name, _ in restorer.net.named_parameters()]
    assert list(restorer.trainable) == names
    for part, words in (("conv_in,mid_block", ("conv_in", "mid_block")),
                        ("modulation", ("norm", "time_emb", "controlnet_"))):
        restorer.train_only(part)
        assert set(restorer.trainable) == {x for x in names if any(word in x for word in words)}
        assert 0 < len(restorer.trainable) < len(names)
    for words in ("conv_in,nothing", ""):
        with pytest.raises(UserError, match="--trainable"):
            TINY["pixel"]().train_only(words)
    predict(restorer).square().mean().backward()
    networks = restorer.net, *restorer.networks
    reached = {id(x) for part in networks for x in part.parameters() if x.grad is not None}
    assert reached and reached <= {id(x) for x in restorer.weights()}
    assert not any(part.training for part in networks)


def test_the_reference_has_its_own_copy_of_what_trains_only(restorer):
    restorer.train_only("modulation")
    other = restorer.frozen_copy()
    theirs, before = dict(other.net.named_parameters()), predict(other)
    for name, parameter in restorer.net.named_parameters():
        assert (parameter is not theirs[name]) == (name in restorer.trainable)
        assert not theirs[name].requires_grad
    assert all(part is other.frozen[name] for name, part in restorer.frozen.items())
    shake(restorer, "modulation")
    assert torch.equal(predict(other), before)
    other.load_state_dict(restorer.state_dict())
    assert torch.equal(predict(other), predict(restorer))


def test_what_a_wrapped_net_saves_loads_with_identical_outputs(restorer, tmp_path):
    shake(restorer)
    expected, names, net, calls = predict(restorer), list(restorer.trainable), restorer.net, []
    restorer.net = torch.nn.Sequential(net)
    restorer.net.forward = lambda *args, **options: calls.append(1) or net(*args, **options)
    restorer.train_only("all")
    assert list(restorer.state_dict()) == names
    restorer.defaults["steps"] = 7
    restorer.scheduler.register_to_config(clip_sample=True)
    restorer.save(tmp_path / "r")
    loaded = model.load(str(tmp_path / "r"), dtype="bfloat16")
    assert type(loaded) is type(restorer) and loaded.dtype == torch.bfloat16
    assert (loaded.defaults, loaded.settings) == (restorer.defaults, restorer.settings)
    assert loaded.scheduler.config.clip_sample
    assert equal([predict(restorer), predict(loaded.to("cpu"))], [expected] * 2) and calls == [1]


@pytest.mark.parametrize("family", ["ldm-sr", "sd-controlnet", "sd-x4-upscaler"])
@torch.no_grad()
def test_the_stock_pipeline_runs_the_saved_folder_and_agrees(family, tmp_path):
    import diffusers
    restorer = TINY[family]()
    noise = normal(restorer)
    shake(restorer)  # so that a ControlNet's zero layers let something pass
    options = {"num_inference_steps": 2, "output_type": "pt", "image": model.shrink(LQ, 4)}
    if family == "ldm-sr":
        options |= {"eta": 0.0, "generator": generator(1)}
    else:
        text = {"prompt": "sharp photo", "guidance": 3.0}
        restorer = type(restorer)(restorer.net, restorer.scheduler, restorer.frozen, text)
        options |= {"prompt": [text["prompt"]] * 2, "guidance_scale": 3.0, "latents": noise}
    restorer.save(tmp_path / "r")
    pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "r")
    if family == "sd-controlnet":
        options |= {"image": (LQ + 1) / 2, "height": 32, "width": 32}
    if family == "sd-x4-upscaler":  # without noise of its own both see the same input
        options["noise_level"] = restorer.settings["noise_level"] = 0
        for part in (pipe.low_res_scheduler, restorer.frozen["low_res_scheduler"]):
            part.alphas_cumprod = torch.ones(1000)
    condition = restorer.condition(LQ, generator(3))
    z0 = rollout(restorer, condition, noise.expand(3, *noise.shape), eta=0.0).z[-1]
    image = torch.as_tensor(pipe(**options).images)
    assert torch.allclose((restorer.decode(z0, LQ) + 1) / 2, image, atol=1e-4)


def test_plain_stable_diffusion_gets_a_controlnet_and_keeps_its_schedule(tmp_path, monkeypatch):
    from diffusers import PNDMScheduler, StableDiffusionPipeline
    whole, asked = TINY["sd-controlnet"](), []
    scheduler = PNDMScheduler(beta_end=0.01, prediction_type="v_prediction", steps_offset=1)
    pipe = StableDiffusionPipeline(**whole.frozen, scheduler=scheduler, **whole.no_parts)
    pipe.save_pretrained(tmp_path / "sd")
    monkeypatch.setattr("huggingface_hub.snapshot_download",
                        lambda name, **_: asked.append(name) or str(tmp_path / "sd"))
    fresh = model.load("sd-controlnet")
    assert asked == [model.HUB["sd-controlnet"]]
    kept = {"beta_end": 0.01, "steps_offset": 1, "prediction_type": "v_prediction"}
    assert fresh.scheduler.config.items() >= (kept | {"clip_sample": False}).items()
    assert equal(fresh.net.mid_block.parameters(), whole.frozen["unet"].mid_block.parameters())
    shake(whole)
    whole.net.save_pretrained(tmp_path / "trained")
    trained = model.load(str(tmp_path / "sd"), controlnet=str(tmp_path / "trained"))
    assert equal(trained.weights(), whole.weights())


@pytest.mark.parametrize("file, pickle", [
    ("unet/diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"),
    ("text_encoder/model.safetensors", "pytorch_model.bin")])
def test_damaged_folders_are_errors_and_never_random_numbers(file, pickle, tmp_path):
    from safetensors.torch import load_file, save_file
    TINY["sd-controlnet"]().save(tmp_path / "r")
    whole = tmp_path / "r" / file
    weights = load_file(whole)
    torch.save(weights, whole.with_name(pickle))  # complete, but refused
    weights.pop(max(weights))
    save_file(weights, whole, {"format": "pt"})
    for left in (whole, tmp_path / "r/model_index.json"):
        with pytest.raises(UserError, match=f"--model {tmp_path}") as caught:
            model.load(str(tmp_path / "r"))
        assert "\n" not in str(caught.value)
        left.unlink()


def test_names_find_the_shipped_restorer_of_a_task_or_the_same_random_weights():
    names = {"sr4": "sr", "sr3": "detail", "denoise25": "noise", "derain": "noise"}
    assert {task: model.shipped(task).name for task in names} == names
    with pytest.raises(UserError, match="sft.py --task unknown"):
        model.load("", "unknown")
    state, first = torch.get_rng_state(), model.load("pixel")
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert equal(first.weights(), model.load("pixel").weights())


@torch.no_grad()
def test_the_shipped_weights_fit_the_code(photo_folder):
    hq = read_image(photo_folder / "test/cat.png")[None]
    lq = F.interpolate(F.avg_pool2d(hq, 4), scale_factor=4, mode="bicubic")
    restorer, z = model.load(""), torch.randn(6, 1, 3, 96, 96, generator=generator(1))
    restored = restorer.decode(rollout(restorer, lq, z, eta=0.0).z[-1], lq)
    error, before = (restored - hq).square().mean(), (lq - hq).square().mean()
    assert error < 2 * before  # other inputs than it was trained with give 30 times as much
