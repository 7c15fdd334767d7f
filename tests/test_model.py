"""Every family passes the same tests, on tiny random weights saved and loaded as real ones are."""

import shutil
import sys
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from tiny import TINY

import model
from sample import rollout
from utils import UserError, generator, write_json

PEFT = pytest.mark.skipif(find_spec("peft") is None, reason="needs peft")
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
        assert restorer.defaults["size"] == 8 * restorer.factor  # the UNet's sample_size
        out = restorer.vae.encode(hq)
        z0 = scale * (out.latents if family == "ldm-sr" else out.latent_dist.mode())
    encoded = restorer.encode(hq, LQ)
    assert torch.allclose(encoded, z0, atol=1e-5) and not encoded.requires_grad
    assert restorer.latent_shape(LQ[:1, :, :16]) == (1, *z0[:, :, :16 // restorer.factor].shape[1:])
    assert restorer.decode(100 * z0 + 1, LQ).abs().max() <= 1
    exact, rounded = predict(restorer), predict(restorer.to("cpu", torch.bfloat16))
    assert exact.shape == z0.shape and exact.dtype == rounded.dtype == torch.float32
    assert torch.equal(exact, rounded) == (restorer.dtype == torch.float32)


@pytest.mark.parametrize("part, words", (
    ("conv_in,mid_block", ("conv_in", "mid_block")),
    ("modulation", ("norm", "time_emb", "controlnet_")),
    pytest.param("lora", (".lora_",), marks=PEFT)))
def test_a_part_trains_and_the_reference_shares_the_rest(part, words, restorer):
    before = predict(restorer)
    restorer.train_only(part)
    names = [name for name, _ in restorer.net.named_parameters()]
    assert set(restorer.trainable) == {x for x in names if any(word in x for word in words)}
    assert 0 < len(restorer.trainable) < len(names)
    predict(restorer).square().mean().backward()
    networks = restorer.net, *restorer.networks
    reached = {id(x) for part in networks for x in part.parameters() if x.grad is not None}
    assert reached and reached <= {id(x) for x in restorer.weights()}
    assert not any(part.training for part in networks)
    other = restorer.frozen_copy()
    theirs = dict(other.net.named_parameters())
    for name, parameter in restorer.net.named_parameters():
        assert (parameter is not theirs[name]) == (name in restorer.trainable)
        assert not theirs[name].requires_grad
    assert all(part is other.frozen[name] for name, part in restorer.frozen.items())
    assert torch.equal(predict(restorer), before)  # an adapter starts at zero
    shake(restorer, part)
    assert torch.equal(predict(other), before)
    other.load_state_dict(restorer.state_dict())
    assert torch.equal(predict(other), predict(restorer))
    with pytest.raises(UserError, match="--trainable"):
        restorer.train_only("conv_in,nothing")


@pytest.mark.parametrize("part", ("all", pytest.param("lora", marks=PEFT)))
def test_what_a_wrapped_net_or_an_average_saves_loads_the_same(part, restorer, tmp_path):
    before = predict(restorer)
    shake(restorer, part)
    restorer.defaults["steps"] = 7
    expected, names, average = predict(restorer), list(restorer.trainable), restorer.frozen_copy()
    assert not torch.equal(expected, before)
    restorer.net = torch.nn.Sequential(restorer.net)  # as a trainer does
    restorer.train_only(part)
    assert list(restorer.state_dict()) == names
    (tmp_path / "mine/thesis").mkdir(parents=True)
    with pytest.raises(UserError, match="mine: holds something else"):
        restorer.save(tmp_path / "mine")
    for saved in (restorer, average):  # the second over the first
        saved.save(str(tmp_path / "r"))
        loaded = model.load(str(tmp_path / "r"), dtype="bfloat16")
        wanted = restorer.to("cpu", torch.bfloat16).dtype  # float32 on a CPU for which it is slow
        assert type(loaded) is type(restorer) and loaded.dtype == wanted
        assert (loaded.defaults, loaded.settings) == (restorer.defaults, restorer.settings)
        assert torch.equal(predict(loaded.to("cpu")), expected)
    loaded.train_only(part)  # goes on with the same
    assert list(loaded.trainable) == names
    if part == "lora":  # beside its base
        (tmp_path / "r" / model.ADAPTER).unlink()
        assert torch.equal(predict(model.load(str(tmp_path / "r"))), before)


@pytest.mark.parametrize("family", [name for name in TINY if name != "pixel"])
def test_gradient_checkpointing_is_a_setting_and_changes_no_gradient(family, tmp_path):
    TINY[family]().save(tmp_path / "r")
    grads = []
    for on in (False, True):
        settings = model.read_json(tmp_path / "r/restorer.json") | {"gradient_checkpointing": on}
        write_json(tmp_path / "r/restorer.json", settings)
        restorer = model.load(str(tmp_path / "r"))
        unet = restorer.frozen.get("unet", restorer.net)
        assert restorer.net.is_gradient_checkpointing == unet.is_gradient_checkpointing == on
        predict(restorer).square().mean().backward()
        grads.append([x.grad for x in restorer.weights() if x.grad is not None])
    assert len(grads[0]) == len(grads[1]) > 0 and all(map(torch.equal, *grads))


@pytest.mark.parametrize("family, part", [
    ("ldm-sr", "all"), ("sd-controlnet", "all"), ("sd-x4-upscaler", "all"),
    *[pytest.param(name, "lora", marks=PEFT) for name in ("sd-controlnet", "sd-x4-upscaler")]])
@torch.no_grad()
def test_the_stock_pipeline_runs_the_saved_folder_and_agrees(family, part, tmp_path):
    import diffusers
    restorer = TINY[family]()
    noise = normal(restorer)
    shake(restorer, part)  # so that a ControlNet's zero layers let something pass
    small = F.avg_pool2d(LQ[..., 1:, 1:], 2, 4)  # the central 2 x 2 of each 4 x 4
    options = {"num_inference_steps": 2, "output_type": "pt", "image": small}
    if family == "ldm-sr":
        options |= {"eta": 0.0, "generator": generator(1)}
    else:
        text = {"prompt": "sharp photo", "guidance": 3.0}
        restorer = type(restorer)(restorer.net, restorer.scheduler, restorer.frozen, text)
        options |= {"prompt": [text["prompt"]] * 2, "guidance_scale": 3.0, "latents": noise,
                    "generator": generator(3)}  # of the upscaler's noise on the small lq
    restorer.save(tmp_path / "r")
    pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "r")
    if part == "lora" and family == "sd-controlnet":
        pipe.controlnet.load_lora_adapter(tmp_path / "r", prefix="controlnet",
                                         use_safetensors=True)
    elif part == "lora":
        pipe.load_lora_weights(tmp_path / "r")
    if family == "sd-controlnet":
        options |= {"image": (LQ + 1) / 2, "height": 32, "width": 32}
    condition = restorer.condition(LQ, generator(3))
    z0 = rollout(restorer, condition, noise.expand(3, *noise.shape), eta=0.0).z[-1]
    image = torch.as_tensor(pipe(**options).images)
    assert torch.allclose((restorer.decode(z0, LQ) + 1) / 2, image, atol=1e-4)


def test_lora_without_peft_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match="pip install peft"):
        TINY["pixel"]().train_only("lora")


def test_plain_stable_diffusion_gets_a_controlnet_and_keeps_its_schedule(tmp_path):
    from diffusers import PNDMScheduler, StableDiffusionPipeline
    whole = TINY["sd-controlnet"]()
    scheduler = PNDMScheduler(beta_end=0.01, prediction_type="v_prediction", steps_offset=1)
    pipe = StableDiffusionPipeline(**whole.frozen, scheduler=scheduler, **whole.no_parts)
    pipe.save_pretrained(tmp_path / "sd")
    index = model.read_json(tmp_path / "sd/model_index.json")
    index["feature_extractor"] = ["transformers", "CLIPFeatureExtractor"]  # gone from transformers
    write_json(tmp_path / "sd/model_index.json", index)
    fresh = model.load(str(tmp_path / "sd"))
    kept = {"beta_end": 0.01, "steps_offset": 1, "prediction_type": "v_prediction"}
    assert fresh.scheduler.config.items() >= (kept | {"clip_sample": False}).items()
    assert torch.equal(fresh.net.conv_in.weight, whole.frozen["unet"].conv_in.weight)
    shake(whole)
    whole.net.save_pretrained(tmp_path / "trained")
    # DP2O-SR's C-SD2: a folder of Stable Diffusion 2, and weights alone for ControlNet.from_unet
    bare = shutil.copy(next(tmp_path.glob("trained/*.safetensors")), tmp_path / "bare.safetensors")
    for controlnet in (tmp_path / "trained", bare):
        trained = model.load(str(tmp_path / "sd"), controlnet=str(controlnet))
        assert torch.equal(predict(trained), predict(whole))


def test_the_hub_gives_what_is_needed_or_else_half_precision(tmp_path, monkeypatch):
    import huggingface_hub
    shelf, whole = tmp_path / "shelf", TINY["ldm-sr"]()

    def hub(source, allow_patterns, ignore_patterns=None):
        files = [str(file.relative_to(shelf)) for file in shelf.rglob("*") if file.is_file()]
        for name in huggingface_hub.utils.filter_repo_objects(
                files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
            (tmp_path / source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(shelf / name, tmp_path / source / name)
        return str(tmp_path / source)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    whole.save(shelf)
    full = list(shelf.rglob("*.safetensors"))
    halves = [shutil.copy(file, file.with_suffix(".fp16.safetensors")) for file in full]
    assert torch.equal(predict(model.load("full")), predict(whole))
    assert not list((tmp_path / "full").rglob("*fp16*"))
    for file in full:
        file.unlink()
    assert torch.equal(predict(model.load("half")), predict(whole))
    assert len(list((tmp_path / "half").rglob("*fp16*"))) == len(halves) == 2


def test_unknown_tasks_and_missing_weights_are_errors_and_never_random_numbers(tmp_path):
    from safetensors.torch import load_file, save_file
    assert model.shipped("sr4").name == "sr" and model.shipped("derain").name == "noise"
    with pytest.raises(UserError, match="sft.py --task unknown"):
        model.load("", "unknown")
    TINY["sd-controlnet"]().save(tmp_path / "r")
    whole = tmp_path / "r/text_encoder/model.safetensors"
    weights = load_file(whole)
    torch.save(weights, whole.with_name("pytorch_model.bin"))  # complete, but refused
    weights.pop(max(weights))
    save_file(weights, whole, {"format": "pt"})
    for _ in range(2):
        with pytest.raises(UserError, match=f"--model {tmp_path}"):
            model.load(str(tmp_path / "r"))
        whole.unlink(missing_ok=True)
