"""Every family passes the same tests, on tiny random weights saved and loaded as real ones are."""

import json
import sys

import pytest
import torch
import torch.nn.functional as F
from tiny import TINY

import model
from sample import rollout
from utils import UserError, generator, read_image

LATENT = [family for family in TINY if family != "pixel"]
TEXTED = ["sd-controlnet", "sd-x4-upscaler"]
LQ = torch.rand(2, 3, 32, 32, generator=generator(0)) * 2 - 1
T = torch.tensor([3, 700])


@pytest.fixture(params=TINY)
def restorer(request):
    return TINY[request.param]()


def normal(restorer):
    return torch.randn(restorer.latent_shape(LQ), generator=generator(1))


def predict(restorer, t=T, **settings):
    """The output for LQ and one noise, after a change of settings."""
    restorer.settings |= settings
    restorer.prepare()
    with torch.no_grad():
        return restorer.predict(normal(restorer), t, restorer.condition(LQ, generator(1)))


def shake(restorer, part="all"):
    """Moves the weights that train, so that a ControlNet's zero layers let something pass."""
    restorer.train_only(part)
    for index, parameter in enumerate(restorer.weights()):
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator(2, index))


@torch.no_grad()
def restore(restorer):
    """LQ restored by two deterministic steps."""
    noise = normal(restorer).expand(3, -1, -1, -1, -1)
    path = rollout(restorer, restorer.condition(LQ, generator(3)), noise, eta=0.0)
    return restorer.decode(path.z[-1], LQ)


def equal(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_shapes_and_ranges(restorer):
    assert set(TINY) == set(model.FAMILIES)
    z0 = restorer.encode(LQ, LQ)
    assert z0.shape == restorer.latent_shape(LQ) and not z0.requires_grad
    wide = torch.zeros(1, 3, restorer.multiple, 2 * restorer.multiple)
    side = restorer.multiple // restorer.factor
    assert restorer.latent_shape(wide) == (1, restorer.channels, side, 2 * side)
    image = restorer.decode(100 * z0 + 1, LQ)
    assert image.shape == LQ.shape and image.abs().max() <= 1
    exact, rounded = predict(restorer), predict(restorer.to("cpu", torch.bfloat16))
    assert 0 < (exact - rounded).abs().max() < 0.1 * exact.abs().max()
    assert {x.dtype for x in (exact, rounded, *restorer.weights())} == {torch.float32}
    assert exact.shape == z0.shape
    multiples = {"pixel": 8, "ldm-sr": 8, "sd-controlnet": 16, "sd-x4-upscaler": 8}
    assert restorer.multiple == multiples[restorer.family]


def test_pixel_latent_is_five_times_the_residual():
    restorer, hq = TINY["pixel"](), LQ.flip(-1)
    assert torch.allclose(restorer.encode(hq, LQ), 5 * (hq - LQ))
    assert torch.allclose(restorer.decode(restorer.encode(hq, LQ), LQ), hq, atol=1e-6)


@pytest.mark.parametrize("family", LATENT)
@torch.no_grad()
def test_latents_are_the_autoencoders_scaled(family):
    restorer = TINY[family]()
    scale = {"ldm-sr": 1.0, "sd-controlnet": 0.18215, "sd-x4-upscaler": 0.08333}[family]
    out = restorer.vae.encode(LQ)
    z = out.latents if family == "ldm-sr" else out.latent_dist.mode()
    assert torch.allclose(restorer.encode(LQ, None), z * scale, atol=1e-5)
    expected = restorer.vae.decode(z).sample.clamp(-1, 1)
    assert torch.allclose(restorer.decode(z * scale, LQ), expected, atol=1e-4)


def test_shrink_undoes_bicubic_enlargement():
    from skimage.data import astronaut
    photo = torch.from_numpy(astronaut()).permute(2, 0, 1)[None].float() / 127.5 - 1
    small = F.interpolate(photo, (128, 128), mode="bicubic", antialias=True)
    back = model.shrink(F.interpolate(small, (512, 512), mode="bicubic"), 4)
    assert (back - small).square().mean() < 4e-4  # 40 dB


# ---- what the network is told ----

def test_the_controlnet_sees_lq_in_0_to_1_and_its_residuals_arrive():
    restorer, seen = TINY["sd-controlnet"](), []
    without = predict(restorer)
    shake(restorer)
    restorer.net.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["controlnet_cond"]), with_kwargs=True)
    assert not torch.allclose(predict(restorer), without, atol=1e-4)
    assert torch.equal(seen[0], (LQ + 1) / 2)


def test_the_upscalers_condition_has_noise_of_its_level():
    restorer = TINY["sd-x4-upscaler"]()
    restorer.settings["noise_level"] = 300
    alpha_bar = restorer.frozen["low_res_scheduler"].alphas_cumprod[300]
    noise = torch.randn(2, 3, 8, 8, generator=generator(1))
    expected = alpha_bar.sqrt() * model.shrink(LQ, 4) + (1 - alpha_bar).sqrt() * noise
    assert torch.allclose(restorer.condition(LQ, generator(1)), expected, atol=1e-6)
    outputs = []  # the level is also the class label
    for restorer.settings["noise_level"] in (20, 300):
        outputs.append(restorer.predict(normal(restorer), T, expected))
    assert not torch.allclose(*outputs, atol=1e-5)


def test_the_network_is_told_the_time_of_each_restore(restorer):
    both = predict(restorer)
    for index, t in enumerate(T):
        assert torch.allclose(both[index], predict(restorer, t.expand(2))[index], atol=1e-5)
    assert not torch.allclose(both, predict(restorer, T.flip(0)), atol=1e-4)


@pytest.mark.parametrize("family", TEXTED)
def test_guidance_is_the_two_pass_formula(family):
    restorer = TINY[family]()
    empty = predict(restorer, prompt="", guidance=1.0)
    prompted = predict(restorer, prompt="sharp photo")
    assert not torch.allclose(empty, prompted)
    guided = predict(restorer, guidance=3.0)
    assert torch.allclose(guided, empty + 3 * (prompted - empty), atol=1e-5)


# ---- what trains ----

def test_modulation_is_a_part_and_all_is_all(restorer):
    names = [name for name, _ in restorer.net.named_parameters()]
    assert list(restorer.trainable) == names
    for part, words in (("modulation", ("norm", "time_emb", "controlnet_")),
                        ("conv_in,mid_block", ("conv_in", "mid_block"))):
        restorer.train_only(part)
        assert 0 < len(restorer.trainable) < len(names)
        for name, parameter in restorer.net.named_parameters():
            chosen = any(word in name for word in words)
            assert (name in restorer.trainable) == chosen == parameter.requires_grad
    for words in ("conv_in,nothing", ""):
        with pytest.raises(UserError, match="--trainable"):
            restorer.train_only(words)


def test_an_update_reaches_what_trains_and_nothing_else(restorer):
    restorer.train_only("modulation")
    before = {name: value.clone() for name, value in restorer.net.state_dict().items()}
    output = restorer.predict(normal(restorer), T, restorer.condition(LQ, generator(1)))
    output.square().mean().backward()
    torch.optim.SGD(restorer.weights(), lr=1.0).step()
    changed = {k for k, x in restorer.net.state_dict().items() if not torch.equal(x, before[k])}
    assert changed and changed <= set(restorer.trainable)
    for network in restorer.networks.values():
        assert not network.training and not restorer.net.training
        assert not any(parameter.requires_grad for parameter in network.parameters())


def test_the_reference_has_its_own_copy_of_what_trains_only(restorer):
    restorer.train_only("modulation")
    other = restorer.frozen_copy()
    theirs = dict(other.net.named_parameters())
    for name, parameter in restorer.net.named_parameters():
        trains = name in restorer.trainable
        assert (parameter is not theirs[name]) == trains == parameter.requires_grad
        assert not theirs[name].requires_grad
    assert all(part is other.frozen[name] for name, part in restorer.frozen.items())
    assert all(parameter is theirs[name] for name, parameter in other.trainable.items())
    before = predict(other)
    shake(restorer, "modulation")
    assert torch.equal(predict(other), before)
    other.load_state_dict(restorer.state_dict())
    assert equal(restorer.weights(), other.weights())


def test_a_wrapped_net_is_called_and_its_files_and_names_stay_the_same(tmp_path):
    restorer = TINY["pixel"]()
    names, expected, calls = list(restorer.state_dict()), predict(restorer), []
    restorer.net = torch.nn.Sequential(restorer.net)
    restorer.net.forward = lambda *args: calls.append(1) or restorer.net[0](*args)
    assert torch.equal(predict(restorer), expected) and calls
    restorer.train_only("all")
    assert list(restorer.state_dict()) == names
    restorer.save(tmp_path / "r")
    assert torch.equal(predict(model.load(str(tmp_path / "r"))), expected)


# ---- files ----

def test_save_and_load_give_identical_outputs(restorer, tmp_path):
    settings = {"prompt": "sharp", "guidance": 2.0, "noise_level": 40}
    predict(restorer, **{k: v for k, v in settings.items() if k in restorer.settings})
    shake(restorer)
    restorer.defaults["steps"] = 7
    restorer.scheduler.register_to_config(clip_sample=True)
    restorer.save(tmp_path / "r")
    loaded = model.load(str(tmp_path / "r"), dtype="bfloat16")
    assert type(loaded) is type(restorer) and loaded.dtype == torch.bfloat16
    assert (loaded.defaults, loaded.settings) == (restorer.defaults, restorer.settings)
    assert torch.equal(restore(restorer), restore(loaded.to("cpu")))
    assert loaded.scheduler.config.clip_sample
    restorer.save(tmp_path / "r", torch.float16)  # over the older one
    rounded = [parameter.half().float() for parameter in restorer.weights()]
    assert equal(rounded, model.load(str(tmp_path / "r")).weights())
    assert equal(restorer.weights(), loaded.weights())


@pytest.mark.parametrize("family", LATENT)
def test_the_stock_pipeline_runs_the_saved_folder_and_agrees(family, tmp_path):
    import diffusers
    restorer = TINY[family]()
    shake(restorer)
    restorer.save(tmp_path / "r")
    pipe = getattr(diffusers, restorer.pipeline).from_pretrained(tmp_path / "r")
    pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 2, "output_type": "pt"}
    if family == "ldm-sr":
        options |= {"image": model.shrink(LQ, 4), "eta": 0.0, "generator": generator(1)}
    else:
        options |= {"prompt": [""] * 2, "guidance_scale": 1.0, "latents": normal(restorer)}
    if family == "sd-controlnet":
        options |= {"image": (LQ + 1) / 2, "height": 32, "width": 32}
    if family == "sd-x4-upscaler":  # without noise of its own both see the same input
        options |= {"image": model.shrink(LQ, 4), "noise_level": 0}
        restorer.settings["noise_level"] = 0
        for part in (pipe.low_res_scheduler, restorer.frozen["low_res_scheduler"]):
            part.alphas_cumprod = torch.ones(1000)
    image = torch.as_tensor(pipe(**options).images)
    assert torch.allclose((restore(restorer) + 1) / 2, image, atol=1e-4)


def test_plain_stable_diffusion_gets_a_controlnet_and_keeps_its_schedule(tmp_path, monkeypatch):
    import huggingface_hub
    from diffusers import PNDMScheduler, StableDiffusionPipeline
    whole = TINY["sd-controlnet"]()
    scheduler = PNDMScheduler(beta_end=0.01, prediction_type="v_prediction", steps_offset=1)
    StableDiffusionPipeline(**whole.frozen, scheduler=scheduler, **whole.no_parts
                            ).save_pretrained(tmp_path / "sd")
    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download",
                        lambda name, **_: asked.append(name) or str(tmp_path / "sd"))
    fresh = model.load("sd-controlnet")
    assert asked == [model.HUB["sd-controlnet"]]
    config = fresh.scheduler.config
    assert (config.beta_end, config.steps_offset, config.clip_sample) == (0.01, 1, False)
    assert config.prediction_type == "v_prediction"
    unet = whole.frozen["unet"].down_blocks
    assert equal(fresh.net.down_blocks.parameters(), unet.parameters())
    shake(whole)
    whole.net.save_pretrained(tmp_path / "trained")
    trained = model.load(str(tmp_path / "sd"), controlnet=str(tmp_path / "trained"))
    assert equal(trained.weights(), whole.weights())


def test_a_restorer_of_ones_own_around_a_plain_module(tmp_path, monkeypatch):
    class Mine(model.Restorer):
        family, settings = "mine", {"gain": 1.0}

        def forward(self, z_t, t, c):
            return self.net(z_t + self.settings["gain"] * c)

        def save_parts(self, folder, net):
            torch.save(net.state_dict(), folder / "net.pt")

        @classmethod
        def from_folder(cls, folder, defaults, settings):
            net = torch.nn.Conv2d(3, 3, 1)
            net.load_state_dict(torch.load(folder / "net.pt"))
            return cls(net, None, None, settings, defaults)
    monkeypatch.setitem(model.FAMILIES, "mine", Mine)
    mine = Mine(torch.nn.Conv2d(3, 3, 1), None, None, {"gain": 2.0}, {"task": "x"})
    mine.save(tmp_path / "mine")
    loaded = model.load(str(tmp_path / "mine"))
    assert loaded.settings == {"gain": 2.0} and loaded.defaults["task"] == "x"
    assert torch.equal(predict(loaded), predict(mine))


@pytest.mark.parametrize("family, file", [
    ("ldm-sr", "vqvae/config.json"), ("ldm-sr", "model_index.json"),
    ("ldm-sr", "unet/diffusion_pytorch_model.safetensors"),
    ("sd-controlnet", "text_encoder/model.safetensors")])
def test_damaged_folders_are_errors_and_never_random_numbers(family, file, tmp_path):
    from safetensors.torch import load_file, save_file
    restorer, whole = TINY[family](), tmp_path / "r" / file
    restorer.save(tmp_path / "r")
    if whole.suffix == ".safetensors":
        complete, weights = load_file(whole), load_file(whole)
        weights.pop(sorted(weights)[-1])
        save_file(weights, whole, {"format": "pt"})
        with pytest.raises(UserError, match=f"--model {tmp_path}.* lack "):
            model.load(str(tmp_path / "r"))
        pickle = whole.with_name(whole.name.replace("model.safetensors", "model.bin"))
        if family == "sd-controlnet":
            pickle = whole.with_name("pytorch_model.bin")
        torch.save(complete, pickle)  # complete, but refused
    whole.unlink()
    with pytest.raises(UserError, match=f"--model {tmp_path}.*cannot be loaded") as caught:
        model.load(str(tmp_path / "r"))
    assert "\n" not in str(caught.value)


def test_the_shipped_restorer_is_the_one_that_learned_the_task():
    names = {"sr": "sr", "sr4": "sr", "sr2": "detail", "sr3": "detail", "jpeg10": "detail",
             "denoise25": "noise", "derain": "noise", "lowlight": "light", "mixed": "mixed"}
    assert {task: model.shipped(task).name for task in names} == names
    with pytest.raises(UserError, match="sft.py --task unknown"):
        model.load("", "unknown")
    assert model.load("", "derain").defaults["task"] == "denoise+derain"
    state = torch.get_rng_state()
    first = model.load("pixel", "derain")
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert equal(first.weights(), model.load("pixel").weights())
    assert first.defaults == {"task": "derain", "steps": 5, "eta": 1.0}


def test_the_shipped_weights_fit_the_code(photo_folder):
    hq = read_image(photo_folder / "test/cat.png")[None]
    small = F.interpolate(hq, scale_factor=0.25, mode="bicubic", antialias=True)
    lq = F.interpolate(small, scale_factor=4, mode="bicubic").clamp(-1, 1)
    restorer, z = model.load(""), torch.randn(6, 1, 3, 96, 96, generator=generator(1))
    with torch.no_grad():
        restored = restorer.decode(rollout(restorer, lq, z, eta=0.0).z[-1], lq)
    error, before = (restored - hq).square().mean(), (lq - hq).square().mean()
    assert error < 2 * before  # other inputs than it was trained with give 30 times as much


def test_the_script_makes_a_restorer_and_keeps_its_options(tmp_path, monkeypatch, capsys):
    TINY["sd-x4-upscaler"]().save(tmp_path / "a")

    def run(source, target, *words):
        paths = ["--model", str(tmp_path / source), "--out", str(tmp_path / target)]
        monkeypatch.setattr(sys, "argv", ["model.py", *paths, *words])
        model.main()
        return json.loads((tmp_path / target / "restorer.json").read_text()).items()
    options = {"prompt": "sharp", "guidance": 2.0, "noise_level": 40}.items()
    assert run("a", "b", "--guidance", "2", "--prompt", "sharp", "--noise-level", "40") >= options
    assert run("b", "c") >= options and "sd-x4-upscaler" in capsys.readouterr().out
    TINY["pixel"]().save(tmp_path / "p")
    for words in (["b", "c"], ["b", "d", "--noise-level", "351"],
                  ["b", "e", "--controlnet", "x"], ["p", "f", "--prompt", "x"]):
        with pytest.raises(UserError):
            run(*words)
        assert not any((tmp_path / name).exists() for name in "def")
