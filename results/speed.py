"""The time of rl.py beside that of its networks alone and of plain DDPO, in one run.

  networks            the passes of an iteration, of restorer, reference and judge (of whole crops),
                      and nothing else
  rl.py               its phases, from rollout to update
  rl.py, DDPO's loss  the same with the loss of examples/ddpo.py: no SFT, no reference
  ddpo-pytorch        DDPO as github.com/kvablack/ddpo-pytorch writes it: each sample at time steps
                      in an order of its own, log-probabilities computed anew in each micro-batch
By turns, on the same samples, micro-batches and views; medians. Peak: of the card, or on Linux of
the process. --race: LPIPS and PSNR-Y on validation photographs over seconds of training.

    python results/speed.py          # laptop, 4 minutes; --clock cpu beside busy processes
    python results/speed.py --race --iterations 20 --out runs/race          # half an hour
"""

import copy
import csv
import functools
import math
import statistics
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples"), str(ROOT / "results")]

import ddpo  # noqa: E402
import elbo  # noqa: E402

import rl  # noqa: E402
from eval import load_metrics, markdown  # noqa: E402
from sample import ddim_step, draw, rollout  # noqa: E402
from utils import UserError, generator, option, parse, pick_device, run_main, to_uint8  # noqa: E402

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def timed(clock, action):
    """(seconds, peak memory in GiB or NaN) of a call."""
    cuda, status = torch.cuda.is_available(), Path("/proc/self/status")
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    elif status.exists():
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    began = clock()
    action()
    if cuda:
        torch.cuda.synchronize()
        return clock() - began, torch.cuda.max_memory_allocated() / 2 ** 30
    words = status.read_text().partition("VmHWM:")[2].split() if status.exists() else ["nan"]
    return clock() - began, float(words[0]) / 2 ** 20


def networks(own, fixed):
    """The passes of one iteration; own: a copy of the restorer that trains, here and below."""
    cfg, scorer = fixed.cfg, fixed.scorer
    for y in fixed.lq.to(own.device).split(cfg.micro_batch):
        condition, z = own.condition(y), torch.randn(own.latent_shape(y), device=y.device)
        t = torch.full((len(y),), 500, device=y.device)
        with torch.no_grad():
            for _ in range(cfg.steps):
                own.predict(z, t, condition)
            own.decode(z, y)
            own.encode(y, y)
            for _ in range(cfg.views * math.ceil(len(y) / scorer.batch)):
                scorer.model(**fixed.tokens, use_cache=False, logits_to_keep=1)
        for _ in range(fixed.passes):
            with torch.no_grad():
                fixed.reference.predict(z, t, condition)
            for _ in range(2):  # RL and SFT
                own.predict(z, t, condition).mean().backward()
    own.net.zero_grad()


def phases(own, step_loss, optimizer, fixed):
    """One iteration of rl.py, with a cap of 1."""
    cfg, lq, gen = fixed.cfg, fixed.lq, generator(fixed.cfg.seed)
    batches, rewards = rl.collect(own, fixed.judge, lq, fixed.hq, gen, cfg, fixed.accelerator)
    known, reward_hq = fixed.memory.mean(), torch.ones(len(lq))
    gains = rl.counted(rewards, reward_hq, cfg)
    advantage = rl.advantages(gains, known).expand(-1, cfg.steps)
    fixed.memory.push(torch.arange(len(lq)), gains)
    weight = rl.weights(cfg.weight, *[rl.iqa_gap(known[:, -1], reward_hq)] * 3)
    for batch in batches:
        batch["advantage"] = advantage[batch["own"]].to(own.device)
        batch["weight"] = weight[batch["own"]].to(own.device)
    loss_of = functools.partial(step_loss, own, fixed.reference, cfg)
    rl.update(loss_of, own, fixed.average, optimizer, batches, lq, gen, fixed.accelerator, False)


def ddpo_pytorch(own, optimizer, fixed):
    """One epoch of ddpo-pytorch, with one inner epoch."""
    samples, device, cfg, gen = [], own.device, fixed.cfg, generator(fixed.cfg.seed)
    for y, x in zip(fixed.lq.split(cfg.micro_batch), fixed.hq.split(cfg.micro_batch)):
        condition, noise = (part.to(device) for part in draw(own, y, cfg.steps, gen))
        with torch.no_grad():
            path = rollout(own, condition, noise, cfg.eta)
            reward = fixed.judge(own.decode(path.z[-1], y.to(device)), x.to(device))
        samples.append((condition, reward, *(part.transpose(0, 1) for part in (
            path.z[:-1], path.z[1:], path.log_prob))))
    condition, reward, z, z_prev, old = (torch.cat(parts) for parts in zip(*samples))
    advantage = ((reward - reward.mean()) / (reward.std() + 1e-8)).clamp(-5, 5)
    order = torch.randperm(len(reward), generator=gen)
    usable = torch.tensor(path.usable)  # each sample has them in an order of its own
    steps = torch.stack([usable[torch.randperm(len(usable), generator=gen)] for _ in order])
    parts = order.split(cfg.micro_batch)
    every = math.ceil(len(parts) / rl.UPDATES)
    for i, part in enumerate(parts):
        for k in steps[part].T:
            output = own.predict(z[part, k], path.t[k], condition[part])
            step = ddim_step(output, z[part, k], *path.alpha_bar[k].T, cfg.eta,
                             own.scheduler.config.prediction_type, z_prev=z_prev[part, k])
            loss, _ = rl.policy_loss(step.log_prob, old[part, k], advantage[part], rl.CLIP_RANGE)
            (loss.mean() / (every * len(usable))).backward()
        if (i + 1) % every == 0 or i + 1 == len(parts):
            torch.nn.utils.clip_grad_norm_(own.weights(), rl.CLIP_NORM)
            optimizer.step()
            optimizer.zero_grad()


def turns(cfg):
    """Prints a table of cfg.iterations turns."""
    from accelerate import Accelerator
    device = pick_device()
    restorer = rl.load(cfg.model, cfg.task, device, cfg.dtype)
    cfg.steps, cfg.eta = restorer.settle(cfg.steps, cfg.eta)
    restorer.train_only(cfg.trainable)
    lq, hq = rl.pool(rl.open_split(cfg, "train"), rl.get_task(cfg.task), cfg.size, 0, cfg.inputs)
    drawn = (x.to(device) for x in draw(restorer, lq[:1], cfg.steps, generator(0)))
    with torch.no_grad():
        usable = len(rollout(restorer, *drawn, cfg.eta).usable)
    scorer = rl.load_reward(cfg.reward, device)
    if not hasattr(scorer, "inputs"):
        raise UserError(f"--reward {cfg.reward}: take a judge by level words")
    fixed = SimpleNamespace(
        cfg=cfg, lq=lq, hq=hq, reference=restorer.frozen_copy(), average=restorer.frozen_copy(),
        memory=rl.RewardMemory(cfg.inputs), scorer=scorer, judge=rl.views(scorer, cfg.views),
        accelerator=Accelerator(cpu=device == "cpu"), passes=usable // rl.UPDATES * rl.UPDATES,
        tokens=scorer.inputs(to_uint8(lq[:min(scorer.batch, cfg.micro_batch)])))
    own = [copy.deepcopy(restorer) for _ in range(4)]
    steps = [fixed.accelerator.prepare(torch.optim.AdamW(one.weights(), 1e-6)) for one in own]
    contest = {
        "networks": lambda: networks(own[0], fixed),
        "rl.py": lambda: phases(own[1], rl.step_loss, steps[1], fixed),
        "rl.py, DDPO's loss": lambda: phases(own[2], ddpo.step_loss, steps[2], fixed),
        "ddpo-pytorch": lambda: ddpo_pytorch(own[3], steps[3], fixed)}
    found = {name: [] for name in contest}
    for turn in range(cfg.iterations + 1):
        for name, action in contest.items():
            found[name].append(timed(CLOCKS[cfg.clock], action))
        print(turn, {name: f"{found[name][-1][0]:.2f} s" for name in found}, flush=True)
    names, lines = ("s", "ms a sample", "of networks", "peak, GiB"), {}
    for name, results in found.items():
        middle = statistics.median(x for x, _ in results[1:])  # the first warmed up
        ratio = statistics.median(x[0] / y[0] for x, y in zip(results[1:], found["networks"][1:]))
        values = middle, 1000 * middle / cfg.inputs, ratio, max(peak for _, peak in results[1:])
        lines[name] = {key: f"{value:.2f}" for key, value in zip(names, values)}
    print(markdown("one iteration", names, lines))


def race(cfg):
    """Trains with each loss; prints what each look at validation photographs showed, and when."""
    memory = rl.advantages
    rl.LOOK_EVERY, rl.report = 2, lambda *args: None
    others = load_metrics(["pyiqa:lpips"], pick_device())
    if not others:
        raise UserError("--race: needs LPIPS, see the line above")
    rl.validate = functools.partial(rl.validate, others=others)
    rl.time = SimpleNamespace(perf_counter=CLOCKS[cfg.clock])
    for name, loss, changes in (
            ("rl.py", rl.step_loss, {}),
            ("ddpo", ddpo.step_loss, {"inputs": 32, "samples": 4, "cap": "none"}),
            ("elbo", elbo.step_loss, {"inputs": 16, "samples": 4, "lr": 1e-4, "sft_coef": 0.1})):
        rl.advantages = ddpo.group_advantages(4) if name == "ddpo" else memory
        file, spent = Path(cfg.out or "runs/race", name, "metrics.csv"), 0.0
        rl.train(replace(cfg, out=str(file.parent), **changes), loss)
        first, *rows = csv.DictReader(file.read_text(encoding="utf-8").splitlines())
        for row in rows:
            spent += float(row["seconds"])
            if row["val_psnr_y"]:
                lpips, psnr_y = (float(row[key]) - float(first[key])
                                 for key in ("val_pyiqa:lpips", "val_psnr_y"))
                print(f"{name}, {spent:.0f} s: LPIPS {lpips:+.4f}, PSNR-Y {psnr_y:+.2f} dB")


@dataclass
class Config(rl.Config):
    """Times rl.py by a level-word judge; --samples, --reward-mode and --resume are not for it."""
    iterations: int = option(6, "turns, or iterations of the race", least=1)
    clock: str = option("wall", "seconds of the wall, or of CPU time", list(CLOCKS))
    race: bool = option(False, "train with each loss instead")


def main():
    cfg = parse(Config)
    race(cfg) if cfg.race else turns(cfg)


if __name__ == "__main__":
    run_main(main)
