"""Supervised fine-tuning (SFT): the diffusion loss on pairs (lq, hq), and the training that made weights/sr.

  z_t  = sqrt(abar_t) z0 + sqrt(1 - abar_t) eps,   z0 = encode(hq, lq),  eps ~ N(0, I),  t uniform
  loss = mean over C, H, W of (target - network(z_t, t, lq))^2
  target = eps (Ho et al. 2020, arXiv 2006.11239, eq. 14), z0, or v = sqrt(abar_t) eps - sqrt(1 - abar_t) z0
           (Salimans and Ho 2022, arXiv 2202.00512)

Notation: z0, eps, z_t, output (B, C, h, w); alpha_bar_t (B,) for abar_t; lq, hq (B, 3, H, W) in [-1, 1].

Chosen here:
 1. The loss is returned per sample, (B,), because the combined loss of rl.py weighs samples one by one.
 2. One-cycle learning rate and an exponential moving average (EMA) of the weights; the average is what is saved.

    python sft.py --task sr                                     # laptop: makes runs/sft_sr/model, about 15 minutes
    python sft.py --task sr --data DIR --device cuda --batch 256 --steps 200000 --size 128 --workers 12
    python sft.py --dataset gopro --root DIR --device cuda --batch 64 --size 128 --per-pair 8 --workers 12
"""

import functools
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import torch


def add_noise(z0, eps, alpha_bar_t):
    """z_t for clean z0 and noise eps, (B, C, h, w) each; alpha_bar_t (B,)."""
    a = alpha_bar_t.view(-1, *[1] * (z0.ndim - 1))
    return a.sqrt() * z0 + (1 - a).sqrt() * eps


def diffusion_loss(output, z0, eps, alpha_bar_t, prediction_type):
    """Squared error of a network output, mean over C, H, W -> (B,). Raises ValueError for an unknown type."""
    a = alpha_bar_t.view(-1, *[1] * (z0.ndim - 1))
    if prediction_type == "epsilon":
        target = eps
    elif prediction_type == "sample":
        target = z0
    elif prediction_type == "v_prediction":
        target = a.sqrt() * eps - (1 - a).sqrt() * z0
    else:
        raise ValueError(f"prediction type {prediction_type!r}: expected epsilon, sample or v_prediction")
    return ((output.float() - target) ** 2).flatten(1).mean(1)


def sft_loss(restorer, lq, hq, generator):
    """Diffusion loss of a restorer on pairs (B, 3, H, W), at random times and noise -> (B,).

    generator: one, which draws a time from each of B equal slices, for less variance of the batch at no cost; or a list
    of B, which makes each pair independent of its batch.
    """
    from sample import normal
    z0, alphas = restorer.encode(hq, lq), restorer.scheduler.alphas_cumprod
    if isinstance(generator, list):
        places = torch.stack([torch.rand((), generator=g) for g in generator])
    else:
        places = (torch.randperm(len(lq), generator=generator) + torch.rand(len(lq), generator=generator)) / len(lq)
    t = (places * len(alphas)).long().clamp(max=len(alphas) - 1)
    a, t = alphas[t].to(lq.device), t.to(lq.device)
    eps = normal(z0.shape, generator, lq.device)
    output = restorer.predict(add_noise(z0, eps, a), t, restorer.condition(lq, generator))
    return diffusion_loss(output, z0, eps, a, restorer.scheduler.config.prediction_type)


def one_cycle(step, total, peak, warmup=0.1):
    """Learning rate at `step` of `total`: a cosine up from peak/25 during the first tenth, then down to 0
    (after Smith and Topin 2018, arXiv 1708.07120)."""
    rise = max(1, int(warmup * total))
    if step < rise:
        return peak / 25 + (peak - peak / 25) * (1 - math.cos(math.pi * step / rise)) / 2
    return peak * (1 + math.cos(math.pi * (step - rise) / max(1, total - rise))) / 2


@dataclass
class Config:
    # what
    task: Annotated[str, "degradation, a key of data.TASKS; empty: that of --dataset, or sr"] = ""
    model: Annotated[str, "folder of a restorer to start from; empty: the small pixel restorer, random weights"] = ""
    channels: Annotated[str, "channels of that small one at its resolutions, with commas"] = "48,64,96"
    residual_scale: Annotated[float, "its scale of hq - lq; 0: from training crops, for unit variance"] = 0.0
    data: Annotated[str, "folder of photographs; empty: those inside the packages"] = ""
    lq: Annotated[str, "folder of low-quality images, with --hq: pairs instead of a task"] = ""
    hq: Annotated[str, "folder of their ground truth"] = ""
    match: Annotated[str, "same, prefix, rain, suffix:LQ,HQ or start:LQ,HQ: how names of lq and hq belong"] = "same"
    dataset: Annotated[str, "a key of data.DATASETS, instead of --lq, --hq and --match"] = ""
    root: Annotated[str, "folder of --dataset"] = "."
    out: Annotated[str, "folder of the run; empty: runs/sft_TASK"] = ""
    seed: Annotated[int, "seed of weights, crops, noise"] = 0
    # optimization
    steps: Annotated[int, "optimizer steps"] = 2400
    batch: Annotated[int, "pairs per step"] = 32
    micro_batch: Annotated[int, "pairs in memory at once, whose gradients add up; 0: all"] = 0
    size: Annotated[int, "side of a crop in pixels"] = 64
    lr: Annotated[float, "peak learning rate of AdamW"] = 1e-3
    ema: Annotated[float, "decay of the weight average per step"] = 0.995
    max_grad_norm: Annotated[float, "gradient norms above this are scaled down"] = 1.0
    # running
    workers: Annotated[int, "processes that decode and degrade ahead; 0: none"] = 0
    per_pair: Annotated[int, "crops taken of each decoded pair"] = 1
    recolor: Annotated[float, "share of training crops in other colors and brightness, 0 to 1; not of pairs"] = 0.0
    resume: Annotated[bool, "go on from the last checkpoint in --out"] = False
    save_every: Annotated[int, "steps between checkpoints"] = 400
    gradient_checkpointing: Annotated[bool, "compute activations again instead of keeping them"] = False
    store: Annotated[str, "dtype of the saved weights: float32, or float16 for half the size"] = "float32"
    device: Annotated[str, "auto, cpu, cuda, cuda:1, mps"] = "auto"
    dtype: Annotated[str, "bfloat16 or float32: the network's arithmetic"] = "bfloat16"


def batches(cfg, source, degrade, crops, steps):
    """Yields (lq, hq) for each of `steps`. In workers, and of pairs (degrade None), batches are numbered, so that they
    do not depend on the number of workers; else they follow the generator `crops` in this process."""
    from data import clean_crops, stream, training_batch
    if degrade is None or cfg.workers:
        make = functools.partial(training_batch, source, degrade, cfg.batch, cfg.size, cfg.seed, cfg.per_pair,
                                 cfg.recolor)
        yield from stream(make, steps, cfg.workers)
    else:
        for _ in steps:
            hq = clean_crops(source, cfg.batch, cfg.size, crops, cfg.recolor)
            yield degrade(hq, crops)[0], hq


def new_restorer(cfg, source, degrade):
    """A pixel restorer with random weights; its latents have unit variance over 256 training crops, or as cfg says."""
    from model import PixelRestorer
    from utils import UserError, generator
    try:
        channels = tuple(int(width) for width in cfg.channels.split(","))
        if min(channels) < 8 or any(width % 8 for width in channels):
            raise ValueError
    except ValueError:
        raise UserError(f"--channels {cfg.channels}: give multiples of 8 with commas, as 32,48,64") from None
    scale = cfg.residual_scale
    if not scale:
        lq, hq = next(batches(replace(cfg, batch=256, workers=0), source, degrade, generator(cfg.seed, 3), range(1)))
        scale = round(1 / (hq - lq).std().item(), 2)
    return PixelRestorer.create(cfg.seed, residual_scale=scale, block_out_channels=channels)


def train(cfg):
    """Runs the SFT stage. Leaves config.json, metrics.csv, checkpoint.safetensors, pictures and model/ in cfg.out."""
    from tqdm import tqdm

    from data import Pairs, get_task, open_split
    from eval import evaluate, held_out, save_curves, save_grid
    from model import DTYPES, load
    from utils import (UserError, check_resume, generator, load_checkpoint, pick_device, save_checkpoint, write_json,
                       write_rows)

    # set-up
    source, watched = open_split(cfg, "train"), open_split(cfg, "val")
    out, device, degrade = Path(cfg.out or f"runs/sft_{cfg.task}"), pick_device(cfg.device), get_task(cfg.task)
    if cfg.dtype == "float16":
        raise UserError("--dtype float16: small gradients vanish in it; train with bfloat16 or float32")
    for name in (cfg.dtype, cfg.store):
        if name not in DTYPES:
            raise UserError(f"--dtype/--store {name}: unknown; choose one of {', '.join(DTYPES)}")
    degrade = None if isinstance(source, Pairs) else degrade
    if not 0 <= cfg.recolor <= (degrade is not None):
        raise UserError(f"--recolor {cfg.recolor}: must be from 0 to 1, and 0 for pairs, whose lq is given")
    if cfg.model and (cfg.channels, cfg.residual_scale) != (Config.channels, Config.residual_scale):
        raise UserError(f"--channels, --residual-scale: {cfg.model} has its own; leave them or --model out")
    restorer = (load(cfg.model, device, cfg.dtype) if cfg.model
                else new_restorer(cfg, source, degrade).to(device, DTYPES[cfg.dtype]))
    if cfg.size % restorer.multiple:
        raise UserError(f"--size {cfg.size}: must be a multiple of {restorer.multiple}")
    restorer.defaults["task"] = cfg.task
    if cfg.gradient_checkpointing:
        restorer.checkpoint_gradients()
    optimizer = torch.optim.AdamW(restorer.weights(), lr=cfg.lr)
    average = torch.optim.swa_utils.AveragedModel(
        restorer.net, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(cfg.ema))
    crops, noise = generator(cfg.seed, 1), generator(cfg.seed, 2)
    modules, generators = {"net": restorer.net, "average": average}, {"crops": crops, "noise": noise}
    start, rows = 0, []
    if cfg.resume and (out / "checkpoint.safetensors").exists():
        info = load_checkpoint(out / "checkpoint.safetensors", modules, optimizer, generators)
        check_resume(cfg, info.get("config", {}), (
            "steps", "out", "resume", "save_every", "device", "micro_batch", "lr", "store", "dtype",
            "gradient_checkpointing"))
        start, rows = info["step"], info["rows"]
    elif cfg.resume:
        raise UserError(f"--resume: no checkpoint in {out}; start without it")
    write_json(out / "config.json", asdict(cfg))
    print("   ".join(f"{key} {value}" for key, value in asdict(cfg).items() if value != ""))

    # training
    steps = range(start, cfg.steps)
    bar = tqdm(steps, initial=start, total=cfg.steps, desc="sft")
    for step, (lq, hq) in zip(bar, batches(cfg, source, degrade, crops, steps)):
        for group in optimizer.param_groups:
            group["lr"] = one_cycle(step, cfg.steps, cfg.lr)
        optimizer.zero_grad()
        loss = 0.0
        for part in torch.arange(len(lq)).split(cfg.micro_batch or len(lq)):
            part_loss = sft_loss(restorer, lq[part].to(device), hq[part].to(device), noise).sum() / len(lq)
            part_loss.backward()
            loss += part_loss.item()
        grad_norm = torch.nn.utils.clip_grad_norm_(restorer.weights(), cfg.max_grad_norm)
        if not torch.isfinite(grad_norm):
            raise UserError(f"step {step}: the gradient is not finite; lower --lr or use --dtype float32")
        optimizer.step()
        average.update_parameters(restorer.net)
        if step % 10 == 9 or step + 1 == cfg.steps:
            rows.append({"step": step + 1, "loss": loss, "grad_norm": grad_norm.item(),
                         "lr": optimizer.param_groups[0]["lr"]})
            bar.set_postfix({k: f"{v:.3g}" for k, v in rows[-1].items() if k != "step"})
        if (step + 1) % cfg.save_every == 0 or step + 1 == cfg.steps:
            save_checkpoint(out / "checkpoint.safetensors", modules, optimizer, generators,
                            {"step": step + 1, "rows": rows, "config": asdict(cfg)})
            write_rows(out / "metrics.csv", rows)

    # results: the averaged weights, on validation photographs
    restorer.net.load_state_dict(average.module.state_dict())
    restorer.save(out / "model", DTYPES[cfg.store])
    lq, hq, _ = held_out(cfg.task, watched, 64, cfg.size, device)
    scores, restored = evaluate(restorer, lq, hq, {}, restorer.defaults["steps"], restorer.defaults["eta"], [0])
    baseline, _ = evaluate(None, lq, hq, {}, 0, 0, [0])
    save_curves(out / "curves.png", rows, "step", ["loss", "grad_norm", "lr"])
    save_grid(out / "before_after.png", {"lq": lq[:8], "restored": restored[:8], "hq": hq[:8]})
    for name, row in (("lq", baseline), ("restored", scores)):
        print(f"validation {name:9s} psnr_y {row['psnr_y'].mean():.2f} dB   ssim {row['ssim'].mean():.4f}")
    print(f"wrote {out}/model, curves.png, before_after.png")


def main():
    from utils import parse
    train(parse(Config, description="Supervised fine-tuning with the diffusion loss."))


if __name__ == "__main__":
    from utils import run_main
    run_main(main)
