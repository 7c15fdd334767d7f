"""Every family passes the same tests, from tiny random configs saved and loaded as full-size checkpoints are."""

import json
from pathlib import Path

import pytest
import torch

import model
from data import TASKS
from rl import combined_loss, policy_loss
from sample import clip_of, repeat_step, rollout
from sft import sft_loss
from utils import UserError, generator

ROOT = Path(__file__).parent.parent
UNET = dict(block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8)
PLAIN = UNET | dict(down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)
TEXTED = UNET | dict(down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), attention_head_dim=4,
                     up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=16)
VAE = dict(block_out_channels=(8, 8, 8), layers_per_block=1, norm_num_groups=8)
VQ = VAE | dict(num_vq_embeddings=64)
TEXT = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=64,
            max_position_embeddings=8)
TINY = {
    "pixel": lambda: model.PixelRestorer.create(block_out_channels=(16, 16, 16)),
    "ldm-sr": lambda: model.LDMSR.create(unet=PLAIN, vae=VQ),
    "sd-controlnet": lambda: model.SDControlNet.create(
        unet=TEXTED, vae=VAE | dict(block_out_channels=(8,) * 4), text=TEXT),
    "sd-x4-upscaler": lambda: model.SDUpscaler.create(
        unet=TEXTED | dict(only_cross_attention=False), vae=VAE, text=TEXT),
    "dit": lambda: model.DiTRestorer.create(vae=VAE, transformer=dict(
        num_attention_heads=2, attention_head_dim=8, num_layers=2, sample_size=8)),
}


@pytest.fixture(params=TINY)
def restorer(request):
    return TINY[request.param]()


@pytest.fixture
def pair():
    hq = torch.rand(2, 3, 32, 32, generator=generator(0)) * 2 - 1
    return TASKS["sr"](hq, generator(1))[0], hq


def test_the_table_of_families_is_tested():
    assert set(TINY) == set(model.FAMILIES)


def test_shapes_ranges_and_seeds(restorer, pair):
    lq, hq = pair
    z0 = restorer.encode(hq, lq)
    assert z0.shape == restorer.latent_shape(lq) and z0.dtype == torch.float32
    image = restorer.decode(z0, lq)
    assert image.shape == hq.shape and image.abs().max() <= 1
    t = torch.tensor([10, 900])
    out = restorer.predict(z0, t, restorer.condition(lq, generator(1)))
    assert out.shape == z0.shape and out.dtype == torch.float32
    first, second = (rollout(restorer, lq, 5, 1.0, generator(2)).z[-1] for _ in range(2))
    assert torch.equal(first, second)


def test_pixel_round_trip_is_exact(pair):
    lq, hq = pair
    restorer = TINY["pixel"]()
    assert torch.allclose(restorer.decode(restorer.encode(hq, lq), lq), hq, atol=1e-6)


@pytest.mark.parametrize("family", [name for name in TINY if name != "pixel"])
def test_latent_round_trip_is_the_autoencoders(family, pair):
    restorer, (lq, hq) = TINY[family](), pair
    vae = restorer.frozen["vae"]
    with torch.no_grad():
        own = vae.encode(hq)
        z = own.latents if hasattr(own, "latents") else own.latent_dist.mode()
        expected = vae.decode(z).sample.clamp(-1, 1)
        assert torch.allclose(restorer.decode(restorer.encode(hq, lq), lq), expected, atol=1e-4)  # one by one


def test_sft_loss_falls_on_one_batch(restorer, pair):
    optimizer, losses = torch.optim.AdamW(restorer.weights(), lr=3e-3), []
    for _ in range(30):
        loss = sft_loss(restorer, *pair, generator(3)).mean()  # the same times and noise each time
        optimizer.zero_grad(), loss.backward(), optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.97 * losses[0]


def test_ratio_is_one_and_an_update_changes_only_the_trainable_part(restorer, pair):
    restorer.train_only("modulation")
    path = rollout(restorer, pair[0], 5, 1.0, generator(4))
    before = {k: v.clone() for k, v in restorer.net.state_dict().items()}
    frozen = {(n, k): v.clone() for n, m in restorer.frozen.items() if isinstance(m, torch.nn.Module)
              for k, v in m.state_dict().items()}
    optimizer = torch.optim.AdamW(restorer.weights(), lr=1e-3)
    k = path.stochastic.nonzero()[0].item()
    step = repeat_step(restorer, path, k, 1.0)
    loss, info = policy_loss(step.log_prob, path.log_prob[k], torch.tensor([1.0, -1.0]), 2e-3)
    assert info["ratio_error"] < 1e-5
    combined_loss(loss, 0 * loss, 0 * loss, torch.ones(2), 0, 0).backward()
    optimizer.step()
    changed = {k for k, v in restorer.net.state_dict().items() if not torch.equal(v, before[k])}
    assert changed and changed <= set(restorer.names)
    assert all(torch.equal(v, restorer.frozen[n].state_dict()[k]) for (n, k), v in frozen.items())


def test_the_reference_shares_what_does_not_train(restorer):
    restorer.train_only("modulation")
    other = restorer.frozen_copy()
    own, theirs = (dict(r.net.named_parameters()) for r in (restorer, other))
    for name, p in own.items():
        assert torch.equal(p, theirs[name]) and (p is theirs[name]) == (name not in restorer.names)
    assert not any(p.requires_grad for p in other.net.parameters())
    assert all(p.requires_grad for p in restorer.weights())


def test_save_and_load_give_identical_outputs(restorer, pair, tmp_path):
    for name, value in {"prompt": "sharp", "guidance": 2.0}.items():
        if name in restorer.settings:
            restorer.settings[name] = value
    restorer.prepare()
    with torch.no_grad():
        for p in restorer.weights():
            p.add_(0.02 * torch.randn(p.shape, generator=generator(5)))  # a ControlNet's zero layers leave zero
    restorer.save(tmp_path)
    loaded = model.load(str(tmp_path))
    assert type(loaded) is type(restorer) and loaded.defaults == restorer.defaults
    assert loaded.settings == restorer.settings
    a, b = (r.decode(rollout(r, pair[0], 2, 1.0, generator(6)).z[-1], pair[0]) for r in (restorer, loaded))
    assert torch.equal(a, b)


@pytest.mark.parametrize("family", [name for name, cls in model.FAMILIES.items() if cls.pipeline])
def test_the_stock_pipeline_runs_the_saved_folder_and_agrees(family, pair, tmp_path):
    import diffusers
    restorer, (lq, _) = TINY[family](), pair
    with torch.no_grad():
        for p in restorer.weights():
            p.add_(0.02 * torch.randn(p.shape, generator=generator(5)))
    restorer.save(tmp_path)
    options = {"safety_checker": None} if family == "sd-controlnet" else {}
    pipe = getattr(diffusers, restorer.pipeline).from_pretrained(tmp_path, **options)
    pipe.set_progress_bar_config(disable=True)
    small = model.shrink(lq, 4)
    if family == "ldm-sr":
        z = torch.randn(restorer.latent_shape(lq), generator=generator(7))
        image = pipe(small, num_inference_steps=2, eta=0.0, generator=generator(7), output_type="pt").images
    elif family == "sd-controlnet":
        z = torch.randn(restorer.latent_shape(lq), generator=generator(7))
        image = pipe([""] * 2, (lq + 1) / 2, height=32, width=32, num_inference_steps=2, guidance_scale=1.0, latents=z,
                     output_type="pt").images
    else:  # the upscaler draws the noise of its input first: let both see an input without noise
        restorer.settings["noise_level"] = 0
        pipe.low_res_scheduler.alphas_cumprod = restorer.frozen["low_res_scheduler"].alphas_cumprod = torch.ones(1000)
        z = torch.randn(restorer.latent_shape(lq), generator=generator(7))
        image = pipe([""] * 2, small, num_inference_steps=2, guidance_scale=1.0, noise_level=0, latents=z,
                     output_type="pt").images
    import sample
    real, sample.normal = sample.normal, lambda shape, *_: z if tuple(shape) == tuple(z.shape) else torch.zeros(shape)
    try:
        own = restorer.decode(rollout(restorer, lq, 2, 0.0, None).z[-1], lq)
    finally:
        sample.normal = real
    assert torch.allclose((own + 1) / 2, torch.as_tensor(image), atol=1e-4)


def test_guidance_is_the_two_pass_formula(pair):
    restorer = TINY["sd-controlnet"]()
    restorer.settings |= {"prompt": "sharp photo"}
    restorer.prepare()
    z, t = torch.randn(2, 4, 4, 4, generator=generator(8)), torch.tensor([3, 700])
    outs = {}
    for prompt, guidance in (("sharp photo", 1.0), ("", 1.0), ("sharp photo", 3.0)):
        restorer.settings |= {"prompt": prompt, "guidance": guidance}
        restorer.prepare()
        with torch.no_grad():
            outs[prompt, guidance] = restorer.predict(z, t, pair[0])
    empty, prompted = outs["", 1.0], outs["sharp photo", 1.0]
    assert not torch.allclose(empty, prompted)
    assert torch.allclose(outs["sharp photo", 3.0], empty + 3 * (prompted - empty), atol=1e-5)


def test_gradient_checkpointing_gives_the_same_gradient_and_runs_blocks_twice(restorer, pair):
    blocks = [m for whole in (restorer.net, restorer.frozen.get("unet")) if whole is not None for m in whole.modules()
              if type(m).__name__ in ("ResnetBlock2D", "BasicTransformerBlock")]
    calls = []
    for block in blocks:
        block.register_forward_pre_hook(lambda *_: calls.append(1))
    counts, grads = [], []
    for switch in (False, True):
        if switch:
            restorer.checkpoint_gradients()
        restorer.net.zero_grad(), calls.clear()
        sft_loss(restorer, *pair, generator(3)).mean().backward()
        counts.append(len(calls))
        grads.append(torch.cat([p.grad.flatten() for p in restorer.weights() if p.grad is not None]))
    assert torch.allclose(*grads, atol=1e-6) and counts[1] > 1.5 * counts[0] > 0


def test_the_schedule_is_the_checkpoints(tmp_path):
    from diffusers import PNDMScheduler
    restorer = TINY["sd-controlnet"]()
    restorer.save(tmp_path)
    PNDMScheduler(beta_start=0.001, beta_end=0.01, beta_schedule="linear", prediction_type="v_prediction",
                  steps_offset=1).save_pretrained(tmp_path / "scheduler")
    loaded = model.load(str(tmp_path))
    config = loaded.scheduler.config
    assert (config.beta_end, config.beta_schedule, config.prediction_type, config.steps_offset) == (
        0.01, "linear", "v_prediction", 1)
    assert clip_of(loaded.scheduler) is None  # PNDM never clips, and its config does not say so
    config = json.loads((tmp_path / "scheduler/scheduler_config.json").read_text())
    (tmp_path / "scheduler/scheduler_config.json").write_text(json.dumps(config | {"thresholding": True}))
    with pytest.raises(UserError, match="thresholding"):
        model.load(str(tmp_path))


def test_plain_stable_diffusion_gets_a_controlnet_from_its_unet(tmp_path, monkeypatch):
    from diffusers import StableDiffusionPipeline
    whole = TINY["sd-controlnet"]()
    parts = {key: value for key, value in whole.frozen.items()}
    StableDiffusionPipeline(**parts, scheduler=whole.scheduler, safety_checker=None, feature_extractor=None,
                            requires_safety_checker=False).save_pretrained(tmp_path / "sd")
    restorer = model.load(str(tmp_path / "sd"), prompt="a")
    assert restorer.family == "sd-controlnet" and restorer.settings["prompt"] == "a"
    for name, p in restorer.net.down_blocks.named_parameters():
        assert torch.equal(p, dict(whole.frozen["unet"].down_blocks.named_parameters())[name])
    whole.net.save_pretrained(tmp_path / "controlnet")
    trained = model.load(str(tmp_path / "sd"), controlnet=str(tmp_path / "controlnet"))
    monkeypatch.setattr(model, "load_weights", lambda kind, source, dtype, **where: pytest.fail(f"{source} {where}"))
    with monkeypatch.context() as only:
        only.setattr(model.SDControlNet, "load_parts", lambda *_: parts)
        with pytest.raises(pytest.fail.Exception, match="someone/net {'revision': 'abc'}"):
            model.open_source(str(tmp_path / "sd"), None, "someone/net@abc", torch.float32, {})
    assert all(torch.equal(a, b) for a, b in zip(trained.net.parameters(), whole.net.parameters()))


def test_shrink_undoes_bicubic_enlargement():
    from skimage.data import astronaut

    from data import resize
    from reward import psnr
    photo = torch.from_numpy(astronaut()).permute(2, 0, 1)[None].float() / 127.5 - 1
    small = resize(photo, (128, 128))
    back = model.shrink(resize(small, (512, 512)), 4)
    assert psnr(back, small).item() > 40


@pytest.mark.parametrize("make, message", [
    (lambda d: d / "missing", "cannot be loaded|no restorer"),
    (lambda d: d, "no restorer"),
])
def test_clear_errors(make, message, tmp_path):
    with pytest.raises(UserError, match=message):
        model.load(str(make(tmp_path)))


def test_incomplete_folder_and_unknown_option(tmp_path):
    import shutil
    TINY["ldm-sr"]().save(tmp_path)
    with pytest.raises(UserError, match="--prompt"):
        model.load(str(tmp_path), prompt="x")
    shutil.rmtree(tmp_path / "vqvae")
    with pytest.raises(UserError, match="cannot be loaded"):
        model.load(str(tmp_path))


def test_half_precision_files_are_taken_and_pickles_are_not(tmp_path):
    restorer = TINY["ldm-sr"]()
    restorer.save(tmp_path)
    part = tmp_path / "vqvae" / "diffusion_pytorch_model.safetensors"
    part.rename(part.with_name("diffusion_pytorch_model.fp16.safetensors"))
    assert model.load(str(tmp_path)).frozen["vae"].decoder.conv_in.weight.dtype == torch.float32
    part.with_name("diffusion_pytorch_model.fp16.safetensors").unlink()
    torch.save(restorer.frozen["vae"].state_dict(), tmp_path / "vqvae" / "diffusion_pytorch_model.bin")
    with pytest.raises(UserError, match="use_safetensors=False"):
        model.load(str(tmp_path))


@pytest.mark.parametrize("file, family", [("unet/diffusion_pytorch_model.safetensors", "ldm-sr"),
                                          ("text_encoder/model.safetensors", "sd-controlnet")])
def test_missing_weights_are_an_error_and_never_random_numbers(file, family, tmp_path):
    from safetensors.torch import load_file, save_file
    TINY[family]().save(tmp_path)
    weights = load_file(tmp_path / file)
    lost = sorted(weights)[-1]
    save_file({name: value for name, value in weights.items() if name != lost}, tmp_path / file, {"format": "pt"})
    with pytest.raises(UserError, match=f"weights lack .*{lost.split('.')[-2]}"):
        model.load(str(tmp_path))


def test_a_cached_hub_id_loads_without_network(tmp_path):
    """Laid out as huggingface_hub caches a repository that has no restorer.json; also at a revision."""
    import os
    import subprocess
    import sys
    cache = tmp_path / "models--someone--upscaler"
    TINY["ldm-sr"]().save(cache / "snapshots" / ("a" * 40))
    (cache / "snapshots" / ("a" * 40) / "restorer.json").unlink()
    (cache / "refs").mkdir()
    for name in ("main", "v1"):
        (cache / "refs" / name).write_text("a" * 40)
    code = ("import model, sys; print(model.load('someone/upscaler').family, model.load('someone/upscaler@v1').family);"
            " model.load('someone/other')")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {
        "HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)})
    assert done.stdout.split() == ["ldm-sr", "ldm-sr"]
    assert "someone/other: not in the local cache, and no network" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("damage", ("vqvae", "vqvae/config.json", "unet/diffusion_pytorch_model.safetensors", None))
def test_a_bad_restorer_ends_in_one_line(damage, tmp_path):
    import shutil
    import subprocess
    import sys
    TINY["ldm-sr"]().save(tmp_path)
    if damage is None:  # a part of a file
        whole = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
        whole.write_bytes(whole.read_bytes()[:1000])
    elif (tmp_path / damage).is_dir():
        shutil.rmtree(tmp_path / damage)
    else:
        (tmp_path / damage).unlink()
    done = subprocess.run([sys.executable, ROOT / "model.py", "--model", tmp_path], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and done.stderr.startswith(
        f"error: --model {tmp_path}: cannot be loaded ("), done.stderr


def test_bfloat16_holds_frozen_parts_in_bfloat16_and_weights_in_float32(pair):
    restorer = TINY["sd-controlnet"]().to("cpu", torch.bfloat16)
    assert {p.dtype for p in restorer.weights()} == {torch.float32}
    assert {p.dtype for p in restorer.frozen["unet"].parameters()} == {torch.bfloat16}
    path = rollout(restorer, pair[0], 2, 1.0, generator(9))
    step = repeat_step(restorer, path, 0, 1.0)
    assert torch.equal(step.log_prob, path.log_prob[0]) and step.log_prob.requires_grad


def test_published_shapes_have_the_published_sizes():
    with torch.device("meta"):
        millions = {name: sum(p.numel() for p in model.FAMILIES[name].create().net.parameters()) / 1e6
                    for name in ("ldm-sr", "sd-controlnet", "sd-x4-upscaler")}
    assert abs(millions["sd-controlnet"] - 361) < 1 and abs(millions["sd-x4-upscaler"] - 473) < 2
    assert abs(millions["ldm-sr"] - 113) < 2


def test_dit_patches_decide_the_multiple():
    restorer = model.DiTRestorer.create(vae=VAE, transformer=dict(
        num_attention_heads=2, attention_head_dim=8, num_layers=1, sample_size=8, patch_size=4))
    assert restorer.multiple == 4 * 4


def test_no_network_is_said_in_one_line(monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def offline(*args, **options):
        raise LocalEntryNotFoundError("offline")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(UserError, match="no network"):
        model.load("ldm-sr")


def test_options_are_kept_until_they_are_given_again(tmp_path, capsys, monkeypatch):
    import sys
    TINY["sd-x4-upscaler"]().save(tmp_path)
    for words, expected in ((["--guidance", "2", "--prompt", "sharp", "--noise-level", "40"], ("sharp", 2.0, 40)),
                            ([], ("sharp", 2.0, 40)), (["--guidance", "1", "--prompt", " "], (" ", 1.0, 40))):
        monkeypatch.setattr(sys, "argv", ["model.py", "--model", str(tmp_path), "--out", str(tmp_path), *words])
        model.main()
        settings = json.loads((tmp_path / "restorer.json").read_text())
        assert (settings["prompt"], settings["guidance"], settings["noise_level"]) == expected
    monkeypatch.setattr(sys, "argv", ["model.py", "--model", str(tmp_path), "--noise-level", "351"])
    with pytest.raises(UserError, match="350"):
        model.main()


def test_every_task_has_a_shipped_restorer_that_learned_it():
    from data import TASKS
    for task in TASKS:
        restorer = model.load("", task=task)
        assert task in restorer.defaults["task"].split("+") and restorer.defaults["eta"] == 1.0
    assert model.shipped("denoise25") == model.shipped("denoise") != model.shipped("jpeg10")


def test_of_several_restorers_the_most_specialized_is_taken(tmp_path, monkeypatch):
    for folder, task in (("a", "sr2+sr3+deblur"), ("b", "deblur"), ("c", "mixed"), ("d", "sr")):
        path = tmp_path / "weights" / folder / "restorer.json"
        path.parent.mkdir(parents=True), path.write_text('{"defaults": {"task": "%s"}}' % task)
    monkeypatch.setattr(model, "__file__", str(tmp_path / "model.py"))
    found = {task: model.shipped(task)[-1] for task in ("sr", "sr3", "sr4", "deblur", "jpeg", "sr2+sr3+deblur")}
    assert found == {"sr": "d", "sr3": "a", "sr4": "d", "deblur": "b", "jpeg": "c", "sr2+sr3+deblur": "a"}
