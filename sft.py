"""Supervised fine-tuning (SFT): the diffusion loss on pairs (lq, hq), and the stage before RL.

  z_t  = sqrt(abar_t) z0 + sqrt(1 - abar_t) eps,   z0 = encode(hq, lq),  eps ~ N(0, I),  t uniform
  loss = mean over C, H, W of (target - network(z_t, t, lq))^2
  target = eps (Ho et al. 2020, arXiv 2006.11239, eq. 14), z0, or
           v = sqrt(abar_t) eps - sqrt(1 - abar_t) z0 (Salimans and Ho 2022, arXiv 2202.00512)

Notation: z0, eps, z_t, output (B, C, h, w); alpha_bar_t (B,) for abar_t; lq, hq (B, 3, H, W).

Chosen here:
 1. The loss is returned per sample, (B,), because the loss of rl.py weighs samples one by one.
 2. The B times of a batch come from B equal slices of [0, T), one each: less variance at no cost.
 3. What is saved is an exponential moving average (EMA) of the weights.
 4. Crop i of a run and the noise of step i follow from (seed, i): neither the number of workers or
    processes nor resuming changes them (except for the noise that sd-x4-upscaler adds to lq).
 5. For a model with guidance (model.py), this is the loss of the guided output: train it with
    guidance 1.

    python sft.py --task sr                                   # laptop: about 15 minutes
    accelerate launch sft.py --task sr --data DIR --batch 256 --steps 200000 --size 128 --workers 12
"""

import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from data import Crops, get_task, held_out, open_split
from eval import evaluate, format_table, in_batches, save_curves, save_grid
from model import gathered, in_parts, load
from sample import wide
from utils import (UserError, check_resume, generator, load_checkpoint, new_run, option, parse,
                   pick_device, run_main, save_checkpoint, write_json, write_rows)

EMA = 0.995         # decay of the weight average, per step
CLIP_NORM = 1.0     # longer gradients are scaled down
SAVE_EVERY = 400    # steps between checkpoints
RESUMED = ("steps", "out", "resume", "lr", "workers")  # what may change in a resumed run


def add_noise(z0, eps, alpha_bar_t):
    """z_t for clean z0 and noise eps, (B, C, h, w) each; alpha_bar_t (B,)."""
    return wide(alpha_bar_t.sqrt(), z0) * z0 + wide((1 - alpha_bar_t).sqrt(), z0) * eps


def target_of(z0, eps, alpha_bar_t, prediction_type):
    """What the network should say at z_t, (B, C, h, w). ValueError for an unknown type."""
    if prediction_type == "epsilon":
        return eps
    if prediction_type == "sample":
        return z0
    if prediction_type == "v_prediction":
        return wide(alpha_bar_t.sqrt(), z0) * eps - wide((1 - alpha_bar_t).sqrt(), z0) * z0
    raise ValueError(f"prediction type {prediction_type}: expected epsilon, sample, v_prediction")


def draw_noise(restorer, lq, generator):
    """The random numbers of diffusion_loss for lq (B, 3, H, W): t (B,), eps (B, C, h, w)."""
    count, times = len(lq), restorer.scheduler.config.num_train_timesteps
    slices = torch.randperm(count, generator=generator)
    places = (slices + torch.rand(count, generator=generator)) / count
    t = (places * times).long().clamp(max=times - 1)
    return t, torch.randn(restorer.latent_shape(lq), generator=generator)


def diffusion_loss(restorer, z0, condition, t, eps):
    """Squared error of the network at times t (B,) and noise eps, mean over C, H, W -> (B,)."""
    alpha_bar_t = restorer.scheduler.alphas_cumprod[t.cpu()].to(z0.device)
    output = restorer.predict(add_noise(z0, eps, alpha_bar_t), t, condition)
    kind = restorer.scheduler.config.prediction_type
    return ((output - target_of(z0, eps, alpha_bar_t, kind)) ** 2).flatten(1).mean(1)


def learning_rate(step, total, peak, warmup, floor=0.0):
    """A linear rise over `warmup` steps, times a cosine from 1 down to `floor`."""
    cosine = (1 + math.cos(math.pi * step / total)) / 2
    return peak * min(1.0, (step + 1) / warmup) * (floor + (1 - floor) * cosine)


def own_part(count, accelerator):
    """The indices of this process, of `count` samples that the processes share."""
    return torch.arange(count).tensor_split(accelerator.num_processes)[accelerator.process_index]


@torch.no_grad()
def update_average(average, restorer, decay):
    """average <- decay average + (1 - decay) weights, in place."""
    torch._foreach_lerp_(average.weights(), list(restorer.state_dict().values()), 1 - decay)


def load_optimizer(optimizer, state):
    """Gives an optimizer the whole state that it had in a checkpoint."""
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
    for parameter, own in optimizer.state.items():
        own.update({name: in_parts(x, parameter) for name, x in own.items()})


@dataclass
class Config:
    """Supervised fine-tuning with the diffusion loss."""
    # what
    task: str = option("sr", "degradation, see data.py")
    model: str = option("pixel", "restorer to start from: pixel (random weights), folder, hub id")
    data: str = option("", "folder of photographs; empty: those inside the packages")
    lq: str = option("", "folder of low-quality images, with --hq: pairs instead of a task")
    hq: str = option("", "folder of their ground truth")
    match: str = option("same", "how names belong: same, prefix, suffix:LQ,HQ or start:LQ,HQ")
    out: str = option("", "folder of the run; empty: runs/sft-TASK-SEED")
    seed: int = option(0, "seed of crops and noise", least=0)
    # optimization
    steps: int = option(2400, "optimizer steps", least=1)
    batch: int = option(32, "pairs per step, of all processes", least=1)
    accumulate: int = option(1, "parts of a batch whose gradients add up, for less memory", least=1)
    size: int = option(64, "side of a crop in pixels", least=16)
    lr: float = option(1e-3, "peak learning rate of AdamW", least=0)
    trainable: str = option("all", "all, modulation, lora, or words in names of weights")
    # running
    dtype: str = option("bfloat16", "arithmetic of the network", ["bfloat16", "float32"])
    workers: int = option(0, "processes that decode and degrade ahead", least=0)
    resume: bool = option(False, "go on from the last checkpoint in --out")


def train(cfg):
    """Runs the SFT stage; leaves config, metrics, checkpoint, pictures and model/ in cfg.out."""
    from accelerate import Accelerator
    from accelerate.utils import DataLoaderConfiguration

    # set-up
    accelerator = Accelerator(cpu=pick_device() == "cpu", mixed_precision="no",
                              gradient_accumulation_steps=cfg.accumulate,
                              dataloader_config=DataLoaderConfiguration(split_batches=True))
    part = cfg.batch // cfg.accumulate
    if cfg.batch % (cfg.accumulate * accelerator.num_processes):
        raise UserError(f"--batch {cfg.batch}: must be a multiple of --accumulate times processes")
    degrade, source = get_task(cfg.task), open_split(cfg, "train")
    val = in_batches(*held_out(open_split(cfg, "val"), degrade, cfg.size, 64)[:2],
                     accelerator.device)
    restorer = load(cfg.model, cfg.task, accelerator.device, cfg.dtype)
    restorer.defaults |= {"task": cfg.task, "size": cfg.size}
    restorer.check_size(cfg.size)
    restorer.train_only(cfg.trainable)
    average = restorer.frozen_copy()
    optimizer = torch.optim.AdamW(restorer.weights(), lr=cfg.lr)
    restorer.net, optimizer = accelerator.prepare(restorer.net, optimizer)
    restorer.train_only(cfg.trainable)  # FSDP has put others in the place of the parameters
    start, rows = 0, []
    out = Path(cfg.out or f"runs/sft-{cfg.task}-{cfg.seed}")
    if accelerator.is_main_process:
        new_run(out, cfg.resume)
        print(f"{accelerator.num_processes} process(es), {accelerator.device}: {cfg}")
    accelerator.wait_for_everyone()
    if cfg.resume:
        state, info = load_checkpoint(out / "checkpoint.safetensors")
        check_resume(cfg, info, RESUMED, source.names)
        restorer.load_state_dict(state["weights"])
        average.load_state_dict(state["average"])
        load_optimizer(optimizer, state["optimizer"])
        start, rows = info["step"], info["rows"]
    done, total = start * cfg.batch, cfg.steps * cfg.batch
    crops = Crops(source, degrade, cfg.size, cfg.seed, max(0, total - done), done)
    loader = torch.utils.data.DataLoader(crops, part, num_workers=cfg.workers)
    loader = accelerator.prepare(loader)

    # training
    own = own_part(part, accelerator)
    bar = tqdm(total=cfg.steps, initial=start, desc="sft", disable=not accelerator.is_main_process)
    for i, (lq, hq) in enumerate(loader, start * cfg.accumulate):
        step = i // cfg.accumulate
        optimizer.param_groups[0]["lr"] = learning_rate(step, cfg.steps, cfg.lr, cfg.steps / 10)
        with accelerator.accumulate(restorer.net):
            gen = generator(cfg.seed, 2, i)
            t, eps = draw_noise(restorer, lq.repeat(accelerator.num_processes, 1, 1, 1), gen)
            t, eps = t[own].to(lq.device), eps[own].to(lq.device)
            z0 = restorer.encode(hq, lq)
            loss = diffusion_loss(restorer, z0, restorer.condition(lq, gen), t, eps).mean()
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                grad_norm = accelerator.clip_grad_norm_(restorer.weights(), CLIP_NORM)
                if not grad_norm.isfinite():
                    raise UserError(f"step {step}: the gradient is not finite; lower --lr")
            optimizer.step()
            optimizer.zero_grad()
        if not accelerator.sync_gradients:
            continue
        update_average(average, restorer, EMA)
        bar.update()
        if step % 10 == 9 or step + 1 == cfg.steps:
            mean = accelerator.gather(loss.detach()).mean().item()
            rows.append({"step": step + 1, "loss": mean, "grad_norm": grad_norm.item()})
            bar.set_postfix(loss=f"{mean:.3g}")
        if (step + 1) % SAVE_EVERY and step + 1 < cfg.steps:
            continue
        state = {"weights": restorer.state_dict(), "average": average.state_dict(),
                 "optimizer": gathered(optimizer.state_dict()["state"])}
        if accelerator.is_main_process:
            save_checkpoint(out / "checkpoint.safetensors", state,
                            {"step": step + 1, "rows": rows, "config": asdict(cfg),
                             "photographs": source.names})
            write_json(out / "config.json", asdict(cfg))
            write_rows(out / "metrics.csv", rows)

    # the averaged weights on validation photographs
    if accelerator.is_main_process:
        average.save(out / "model")
        report(average, val, rows, out)


def report(restorer, val, rows, out):
    """Prints scores on validation batches, draws the curves and eight examples."""
    before, _ = evaluate(None, val, {})
    after, images = evaluate(restorer, val, {})
    print(format_table({"lq": before, "restored": after}))
    save_curves(out / "curves.png", rows, "step")
    columns = zip(("lq", "hq", "restored"), (*zip(*val), images))
    save_grid(out / "before_after.png", {name: torch.cat(x)[:8] for name, x in columns})
    print(f"wrote {out}/model, metrics.csv, curves.png, before_after.png")


def main():
    train(parse(Config))


if __name__ == "__main__":
    run_main(main)
