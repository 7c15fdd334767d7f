"""What a card does at full scale: tests, seconds and memory, with random weights and no network.

  tests     those of test_gpu.py that need a card
  restorer  sd-controlnet (Stable Diffusion 1.5's shapes, 512 x 512) and ldm-sr (256 -> 1024) in the
            phases of rl.py itself, for one micro-batch, with a judge of Qwen3.5-0.8B's shape beside
  laptop    python rl.py --task sr on the card and, with the card hidden, on 8 threads of the CPU:
            same table? Not beside anything else: threads that wait for each other stop both
An update step: one denoising step of a micro-batch, two passes with a gradient, one without.
Peak: what torch reserved. Checkpointing: features are computed again in the backward pass.

    bash tests/gpu.sh                    # one card, 8 minutes; runs/gpu.json and a table
    python tests/gpu.py --tiny           # the same code at tiny shapes, on a CPU, in seconds
"""

import csv
import functools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from unittest.mock import patch

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "weights")]

import tiny  # noqa: E402
import train_judge  # noqa: E402

import rl  # noqa: E402
from eval import markdown  # noqa: E402
from model import FAMILIES, seeded  # noqa: E402
from sample import rollout  # noqa: E402
from utils import generator, option, parse, pick_device, run_main, write_json  # noqa: E402

ROOM = 22.0  # GiB of a card with 24: without the CUDA context and 128 kept samples of 20 steps
RUNS = {"on the card": {}, "on the CPU": {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "8"}}
DOWN, UP = ("DownEncoderBlock2D",), ("UpDecoderBlock2D",)
QWEN = {     # Qwen3.5-0.8B, as an entry of train_judge.BUILD
    "seed": 0, "model_type": "qwen3_5", "processor": "Qwen3VLProcessor", "vocabulary": 248320,
    "vision": {"depth": 12, "hidden_size": 768, "intermediate_size": 3072, "num_heads": 12,
               "out_hidden_size": 1024, "num_position_embeddings": 2304, "patch_size": 16,
               "spatial_merge_size": 2, "temporal_patch_size": 2, "initializer_range": 0.02},
    "text": {"hidden_size": 1024, "intermediate_size": 3584, "num_hidden_layers": 24,
             "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 256,
             "linear_num_key_heads": 16, "linear_num_value_heads": 16, "initializer_range": 0.02,
             "rope_parameters": {"rope_type": "default", "rope_theta": 1e7,
                                 "partial_rotary_factor": 0.25, "mrope_interleaved": True,
                                 "mrope_section": [11, 11, 10]}}}


def sd_controlnet(device="cuda"):
    from diffusers import AutoencoderKL, ControlNetModel, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel
    words = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12)
    with torch.device(device):
        unet = seeded(UNet2DConditionModel, sample_size=64, cross_attention_dim=768)
        vae = seeded(AutoencoderKL, block_out_channels=(128, 256, 512, 512), layers_per_block=2,
                     down_block_types=DOWN * 4, up_block_types=UP * 4, sample_size=512)
        net = seeded(ControlNetModel.from_unet, unet)
    frozen = {"unet": unet, "vae": vae, **tiny.text(), "text_encoder": CLIPTextModel(words)}
    frozen["tokenizer"].model_max_length = 77
    return FAMILIES["sd-controlnet"](net, DDIMScheduler(**tiny.OFFSET), frozen)


def ldm_sr(device="cuda"):
    from diffusers import DDIMScheduler, UNet2DModel, VQModel
    with torch.device(device):
        net = seeded(UNet2DModel, in_channels=6, out_channels=3, attention_head_dim=32,
                     block_out_channels=(160, 320, 320, 640),
                     down_block_types=(*["DownBlock2D"] * 3, "AttnDownBlock2D"),
                     up_block_types=("AttnUpBlock2D", *["UpBlock2D"] * 3))
        vae = seeded(VQModel, block_out_channels=(128, 256, 512), layers_per_block=2,
                     down_block_types=DOWN * 3, up_block_types=UP * 3, num_vq_embeddings=8192)
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False)
    return FAMILIES["ldm-sr"](net, scheduler, {"vqvae": vae})


def judge_of(recipe, device, half):
    """A judge of an entry of train_judge.BUILD, as large as that says; half: in bfloat16."""
    sizes = {key: recipe["vision"].get(key, x) for key, x in train_judge.PATCH.items()}
    merge = recipe["vision"].get("spatial_merge_size", train_judge.MERGE)
    with patch.dict(train_judge.PATCH, sizes), patch.object(train_judge, "MERGE", merge), \
            torch.device(device):
        judge = train_judge.build_judge(recipe)
        if "vocabulary" in recipe:
            judge.model.resize_token_embeddings(recipe["vocabulary"], mean_resizing=False)
    judge.model.to(torch.bfloat16 if half else torch.float32)
    return judge


def timed(action):
    """Seconds of a call."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else int
    wait()
    began = time.perf_counter()
    action()
    wait()
    return time.perf_counter() - began


def set_checkpointing(restorer, on):
    """Gradient checkpointing in all networks through which the gradient goes, or in none."""
    for network in (restorer.bare_net, restorer.frozen.get("unet", restorer.bare_net)):
        getattr(network, ("disable", "enable")[on] + "_gradient_checkpointing")()


def phases(restorer, judge, size, count):
    """{phase: seconds, on a card also "peak": GiB} of `count` samples of size x size pixels."""
    from accelerate import Accelerator
    cuda = restorer.device.type == "cuda"
    cfg = rl.Config(steps=4, eta=1.0, micro_batch=count, views=1)
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    reference, average = restorer.frozen_copy(), restorer.frozen_copy()
    accelerator = Accelerator(cpu=not cuda, mixed_precision="no")
    optimizer = torch.optim.AdamW(restorer.weights(), 1e-6)
    restorer.net, optimizer = accelerator.prepare(restorer.net, optimizer)
    lq = torch.rand(count, 3, size, size, generator=generator(0)) * 2 - 1
    (batch,), _ = rl.collect(restorer, judge, lq, lq.flip(-1), generator(1), cfg, accelerator)
    path, noise, y = batch["path"], batch["noise"], batch["lq"]
    batch["advantage"] = torch.ones(count, cfg.steps, device=y.device)
    batch["weight"] = torch.full((count,), 0.5, device=y.device)
    loss_of = functools.partial(rl.step_loss, restorer, reference, cfg)
    update = functools.partial(rl.update, loss_of, restorer, average, optimizer, [batch], lq,
                               generator(2), accelerator, False)
    passes = rl.UPDATES * (len(path.usable) // rl.UPDATES)
    found = {"ratio error": update()["ratio_error"]}  # warms up, as collect did for the rest
    found["update step"] = timed(update) / passes
    with torch.no_grad():
        found["rollout step"] = timed(lambda: rollout(restorer, path.condition, noise, 1.0)) / 4
        found["decode"] = timed(lambda: restorer.decode(path.z[-1], y))
        found["judge"] = timed(lambda: judge(y)) / count
    return found | ({"peak": torch.cuda.max_memory_reserved() / 2 ** 30} if cuda else {})


def survey(restorer, judge, size, counts, parts):
    """{setting: phases} by what trains, number of samples, with and without checkpointing."""
    found = {}
    for part, count, on in product(parts, counts, (True, False)):
        name = f"{part}, {count}" + ", checkpointing" * on
        restorer.train_only(part)
        set_checkpointing(restorer, on)
        try:
            found[name] = phases(restorer, judge, size, count)
        except torch.OutOfMemoryError:
            found[name] = {"peak": "out of memory"}
        print(f"{restorer.family}: {name}: {found[name]}")
    return found


def laptop(hidden):
    """{"seconds": of the laptop run, "row, metric": mean over the images of its table}."""
    with tempfile.TemporaryDirectory() as home:
        command = [sys.executable, "rl.py", "--task", "sr", "--out", f"{home}/run"]
        found = {"seconds": [timed(lambda: subprocess.run(
            command, cwd=ROOT, env=os.environ | hidden, check=True))]}
        text = Path(home, "run/scores.csv").read_text(encoding="utf-8")
    for line in csv.DictReader(text.splitlines()):
        row, _ = line.pop("row"), line.pop("image")
        for key in filter(line.get, line):
            found.setdefault(f"{row}, {key}", []).append(float(line[key]))
    return {key: statistics.fmean(values) for key, values in found.items()}


def table(found):
    """All that was measured as Markdown."""
    columns, lines = ["rollout step", "update step", "decode", "judge", "peak", "fits 24 GB"], {}
    for family, name in [(x, y) for x in FAMILIES for y in found.get(x, {})]:
        row = found[family][name]
        cells = {key: x if isinstance(x, str) else f"{x:.3g}" for key, x in row.items()}
        if isinstance(row.get("peak"), float):
            cells["fits 24 GB"] = "yes" if row["peak"] < ROOM else "no"
        lines[f"{family}, {name}"] = {key: "not measured" for key in columns} | cells
    here, there = (found.get(where, {"seconds": "not measured"}) for where in RUNS)
    far = {key: here[key] - there[key] for key in here if key in there and key != "seconds"}
    far = sorted(far.items(), key=lambda item: -abs(item[1]))[:6]
    return "\n".join([
        markdown(f"{found['card']}; seconds, GiB", columns, lines),
        f"\ntests that need a card: {found.get('tests', 'not measured')}",
        f"seconds of python rl.py --task sr: {here['seconds']}, on the CPU {there['seconds']}",
        *[f"  card minus CPU, {key}: {difference:+.4f}" for key, difference in far]])


@dataclass
class Config:
    """Measures rl.py at full scale on one card."""
    tiny: bool = option(False, "tiny networks, to test this script where there is no card")
    out: str = option("runs/gpu.json", "file for all that was measured")


def main(cfg=None):
    cfg, device = cfg or parse(Config), pick_device()
    full = device == "cuda" and not cfg.tiny
    plan = [(tiny.sd_controlnet, 32, (2,), ["modulation"]), (tiny.ldm_sr, 32, (2,), ["all"])]
    found = {"card": torch.cuda.get_device_name() if full else "no card"}
    if full:
        command = ["timeout", "120", sys.executable, "-m", "pytest", "-v", "-k", "card"]
        text = subprocess.run([*command, "tests/test_gpu.py"], cwd=ROOT, capture_output=True,
                              text=True).stdout
        print(text, flush=True)  # if one hangs: as far as it came
        found["tests"] = (text.strip() or "failed").splitlines()[-1]
        plan = [(sd_controlnet, 512, (1, 2, 4), ["modulation", "all"]),
                (ldm_sr, 1024, (1, 2, 4), ["modulation"])]
    judge = judge_of(QWEN if full else train_judge.BUILD["judge"], device, full)
    for build, *rest in plan:
        restorer = build().to(device, torch.bfloat16)
        found[restorer.family] = survey(restorer, judge, *rest)
        write_json(cfg.out, found)
    print(table(found))
    for where in RUNS if full else ():
        found[where] = laptop(RUNS[where])
        write_json(cfg.out, found)
        print(table(found))


if __name__ == "__main__":
    run_main(main)
