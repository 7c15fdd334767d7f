"""Reinforcement learning of a diffusion restorer with an IQA reward, weighed against SFT by difficulty.

Implements "Enhancing Diffusion-based Restoration Models via Difficulty-Adaptive Reinforcement Learning with IQA
Reward" (arXiv 2511.01645). One iteration, i a sample, k a denoising step, theta_old the weights that sampled:

  1 rollout     z_T .. z_0 for each lq with stochastic DDIM; keep z_t, z_{t-1}, log p_old           sample.rollout
  2 reward      r_i = M(x_hat_i), or r_ik = M(decode(x0_hat(z_{t-1}))) for every k-th step          reward.py
  3 advantage   A = (r - mean(history_i)) / (std(history_i) + delta), minus its batch mean          difficulty.py
  4 difficulty  d_i from ground truth, w_i = sigmoid(k (d_i - m) / s)                               difficulty.py
  5 update      L = mean_i [w_i L_RL,i + (1 - w_i) lambda L_SFT,i] + beta KL(p_theta || p_ref) + mu L_fid
                L_RL,i = max(-A rho, -A clip(rho, 1 - eps, 1 + eps)),  rho = exp(log p_theta - log p_old)
                KL     = ||mu_theta - mu_ref||^2 / (2 sigma_t^2), mean over C, H, W
                L_fid  = (1 - abar_t)^2 ||x0_hat(z_t) - z0||^2 at the visited z_t, mean over C, H, W   (ours alone)
The paper's exact equations are not public: README marks what is the paper's and what is our reconstruction.

Chosen here:
 1. log p is a mean over C, H, W (sample.py), so that clip_range is of the order 1e-3, not 0.2.
 2. A micro-batch is one step k of the same samples that were sampled together: the same arithmetic gives the same
    log p, so rho is exactly 1 before the first optimizer step of an iteration, in any dtype.
 3. Only steps with sigma_t > 0 enter; `updates` optimizer steps share one rollout, each with its own part of the steps.
 4. The reward is capped at the ground truth's own score: to be judged better than a real photograph is no merit.
 5. mu controls itself (--fidelity-budget, FidelityController): the balance of the gradients decides between no
    progress and reward hacking, and no constant suits two seeds. Why not lambda: in trials it held no PSNR; near the
    SFT optimum the SFT gradient should be mostly noise, which Adam scales up (our guess, no ablation). L_fid acts on
    the very states that RL creates, at no extra network pass.
 6. What is evaluated and saved is a running average of the weights over the optimizer steps.

    python rl.py --task sr                                                              # laptop, a few minutes
    python rl.py --task sr --data ~/DIV2K_train_HR --device cuda --inputs 64 --iterations 500 --pool 4096
"""

import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch


# ---- losses: per-sample tensors in, (loss, info) out ----

def policy_loss(log_prob, old_log_prob, advantage, clip_range):
    """Clipped surrogate (Schulman et al. 2017, arXiv 1707.06347, eq. 7): all (B,) -> (loss (B,), info).

    The ratio is of mean log-densities, so one unit of log_prob is one nat per dimension and clip_range about 1e-3.
    """
    ratio = (log_prob - old_log_prob).exp()
    loss = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip_range, 1 + clip_range))
    with torch.no_grad():
        info = {"clip_frac": ((ratio - 1).abs() > clip_range).float().mean(),
                "approx_kl": 0.5 * ((log_prob - old_log_prob) ** 2).mean(),
                "ratio_error": (ratio - 1).abs().max()}
    return loss, info


def learning_rate(iteration, total, peak, warmup=4):
    """A linear rise over the first iterations, because Adam's first steps have full length on a gradient that is still
    mostly noise; then a cosine down to a tenth, so that the run settles."""
    return peak * min(1.0, (iteration + 1) / warmup) * (0.55 + 0.45 * math.cos(math.pi * iteration / total))


def kl_to_reference(mean, ref_mean, sigma_t):
    """KL between Gaussians of the same sigma_t (B,) > 0: ||mean - ref_mean||^2 / (2 sigma_t^2), mean over C, H, W;
    means (B, C, h, w) -> (B,)."""
    return ((mean - ref_mean) ** 2).flatten(1).mean(1) / (2 * sigma_t ** 2)


def fidelity_loss(x0, z0, alpha_bar_t):
    """(1 - abar_t)^2 ||x0 - z0||^2, mean over C, H, W; x0 is predicted from a z_t that the sampler visited; -> (B,).

    The weight leaves the late steps, where fine texture is decided, to the reward, and holds the structure that the
    early and middle steps decide, where most of the PSNR is lost or won.
    """
    return (1 - alpha_bar_t) ** 2 * ((x0 - z0) ** 2).flatten(1).mean(1)


def combined_loss(rl, sft, kl, fidelity, weight, sft_coef, kl_coef, fidelity_coef):
    """mean_i [w_i rl_i + (1 - w_i) sft_coef sft_i + kl_coef kl_i + fidelity_coef fidelity_i]; tensors (B,) ->
    (scalar loss, info)."""
    loss = (weight * rl + (1 - weight) * sft_coef * sft + kl_coef * kl + fidelity_coef * fidelity).mean()
    return loss, {"rl_loss": rl.mean().detach(), "sft_loss": sft.mean().detach(), "kl": kl.mean().detach(),
                  "fidelity_loss": fidelity.mean().detach()}


class FidelityController:
    """Meant to hold what RL costs in fidelity at a budget: the coefficient of the fidelity loss, a Lagrange multiplier.

    drop = PSNR-Y in dB of the SFT restorer minus that of the present one, on the same inputs, smoothed over iterations.
      e = drop - budget;   I <- clip(I + ki e, 0, span);   coefficient = base max(0, e + I)
    Within the budget the coefficient is 0, as a multiplier of an inequality must be: the loss would only blur what the
    reward has gained. Dual ascent is the integral I alone; it answers late and oscillates. The proportional term damps
    it (Stooke et al. 2020, arXiv 2007.03964). budget < 0: off, the coefficient is 0.
    """

    def __init__(self, budget, base=1e-3, ki=0.1, span=1.0, smooth=0.5):
        self.budget, self.base, self.ki, self.span, self.smooth = budget, base, ki, span, smooth
        self.state = [0.0, 0.0]  # smoothed drop, integral

    def update(self, drop):
        """drop in dB, a float -> the coefficient for this iteration."""
        if self.budget < 0:
            return 0.0
        smoothed = self.smooth * self.state[0] + (1 - self.smooth) * drop
        error = smoothed - self.budget
        integral = max(0.0, min(self.span, self.state[1] + self.ki * error))
        self.state = [smoothed, integral]
        return self.base * max(0.0, error + integral)


@dataclass
class Config:
    # what
    task: Annotated[str, "degradation, a key of data.TASKS"] = "sr"
    model: Annotated[str, "folder of the SFT restorer to start from; empty: weights/TASK"] = ""
    reward: Annotated[str, "judge, mllm:FOLDER, psnr, psnr_y, ssim, pyiqa:NAME"] = "judge"
    data: Annotated[str, "folder of photographs; empty: those inside the packages"] = ""
    out: Annotated[str, "folder of the run; empty: runs/TASK"] = ""
    seed: Annotated[int, "seed of inputs, sampler and losses"] = 0
    # rollout
    iterations: Annotated[int, "rounds of rollout and update"] = 6
    inputs: Annotated[int, "lq images per iteration"] = 16
    samples_per_input: Annotated[int, "restorations of each"] = 4
    pool: Annotated[int, "training inputs that recur; the memory keeps a history of each"] = 64
    size: Annotated[int, "side of a training crop in pixels"] = 64
    steps: Annotated[int, "DDIM steps; 0: as the SFT restorer was trained"] = 0
    eta: Annotated[float, "stochasticity, > 0; -1: as the SFT restorer was trained"] = -1.0
    memory: Annotated[int, "latest rewards of an input that its memory keeps"] = 8
    # update
    updates: Annotated[int, "optimizer steps per rollout"] = 2
    train_steps: Annotated[int, "denoising steps drawn for the update in each iteration; 0: all"] = 6
    micro_batch: Annotated[int, "samples in memory at once"] = 64
    lr: Annotated[float, "peak learning rate of AdamW, see learning_rate"] = 5e-5
    clip_range: Annotated[float, "of the ratio of mean log-densities"] = 2e-3
    kl_coef: Annotated[float, "beta, weight of the KL to the SFT restorer"] = 0.01
    average: Annotated[float, "decay per optimizer step of the weight average that is saved; 0: the last weights"] = 0.9
    # RL against SFT
    weight: Annotated[str, "baseline, running, or fixed:W (0: SFT loss only, 1: RL loss only)"] = "baseline"
    distance: Annotated[str, "of difficulty: iqa_gap, mse or ssim"] = "iqa_gap"
    sft_coef: Annotated[float, "lambda, weight of the SFT loss"] = 0.01
    fidelity_budget: Annotated[float, "PSNR-Y in dB that RL may cost on its inputs; -1: off"] = 0.2
    reward_mode: Annotated[str, "final, step, or step:K (every K-th denoising step is judged)"] = "final"
    # running
    resume: Annotated[bool, "go on from the last checkpoint in --out"] = False
    save_every: Annotated[int, "iterations between checkpoints and between looks at validation images"] = 5
    device: Annotated[str, "auto, cpu, cuda, cuda:1, mps"] = "auto"
    dtype: Annotated[str, "float32, bfloat16 or float16: the network's arithmetic"] = "bfloat16"


def check(cfg):
    """Raises UserError for settings that cannot work, before anything is loaded or written."""
    from difficulty import Difficulty
    from reward import UNSAFE
    from utils import UserError
    for name in ("iterations", "inputs", "samples_per_input", "pool", "updates", "micro_batch", "save_every"):
        if getattr(cfg, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(cfg, name)}: must be at least 1")
    if cfg.memory < 4:
        raise UserError(f"--memory {cfg.memory}: must be at least 4, the least history that an advantage uses")
    if cfg.train_steps < 0 or not 0 <= cfg.average < 1:
        raise UserError(f"--train-steps {cfg.train_steps}, --average {cfg.average}: must be at least 0, the average "
                        "below 1")
    if cfg.inputs > cfg.pool:
        raise UserError(f"--inputs {cfg.inputs}: more than --pool {cfg.pool}; enlarge the pool")
    if cfg.eta <= 0 and cfg.eta != -1:
        raise UserError(f"--eta {cfg.eta}: a deterministic sampler has no log-probabilities to learn from; use 1")
    if cfg.reward == "judge2":
        raise UserError("--reward judge2: it is the independent check and never a reward; use judge")
    if cfg.reward in UNSAFE:
        raise UserError(f"--reward {cfg.reward}: no reward, {UNSAFE[cfg.reward]}; choose another")
    if cfg.distance not in ("iqa_gap", "mse", "ssim"):
        raise UserError(f"--distance {cfg.distance}: unknown; choose iqa_gap, mse or ssim")
    judged_every(cfg.reward_mode)
    try:
        Difficulty(cfg.weight)
    except ValueError as error:
        raise UserError(f"--weight: {error}") from None


def check_resume(cfg, path):
    """Raises UserError if cfg differs from the saved one in more than how long and where the run goes on."""
    import json

    from utils import UserError
    free = ("iterations", "out", "resume", "save_every", "device")
    saved = json.loads(path.read_text()) if path.exists() else {}
    changed = [f"--{key.replace('_', '-')} {value}" for key, value in saved.items()
               if key not in free and getattr(cfg, key, value) != value]
    if changed:
        raise UserError(f"--resume: the run was started with {' '.join(changed)}; resume with the same")


def judged_every(reward_mode):
    """'final' -> 0, 'step' -> 1, 'step:K' -> K."""
    from utils import UserError
    name, _, every = reward_mode.partition(":")
    if reward_mode in ("final", "step"):
        return int(reward_mode == "step")
    if name != "step" or not every.isdigit() or int(every) < 1:
        raise UserError(f"--reward-mode {reward_mode}: choose final, step or step:K with K at least 1")
    return int(every)


# ---- the phases of an iteration ----

def stepwise_images(restorer, trajectory, lq, every):
    """The images to judge: {step k: (B, 3, H, W)}, the last step always, others only if every > 0.

    Step k leads to z_{t-1}; the clean image predicted from it is what the next step computed anyway, x0[k + 1].
    """
    last = len(trajectory.t) - 1
    chosen = range(last, -1, -every) if every else [last]
    return {k: restorer.decode(trajectory.z[-1] if k == last else trajectory.x0[k + 1], lq) for k in chosen}


def collect(restorer, judge, lq, hq, cfg, noise):
    """Rollout and reward for a batch of samples (B, 3, H, W): a dict of what difficulty, advantage and update need."""
    from reward import psnr_y, ssim
    from sample import rollout
    start = time.perf_counter()
    trajectory = rollout(restorer, lq, cfg.steps, cfg.eta, noise)
    rolled = time.perf_counter()
    images = stepwise_images(restorer, trajectory, lq, judged_every(cfg.reward_mode))
    rewards = {k: judge(image, hq) for k, image in images.items()}
    last = images[len(trajectory.t) - 1]
    return {"trajectory": trajectory, "rewards": rewards, "reward": rewards[len(trajectory.t) - 1], "image": last,
            "psnr_y": psnr_y(last, hq), "ssim": ssim(last, hq), "lq": lq, "hq": hq,
            "seconds_rollout": rolled - start, "seconds_reward": time.perf_counter() - rolled}


def distances(batch, reward_hq, kind):
    """Distance of each sample of `collect` to its ground truth, (B,); reward_hq (B,) is used by iqa_gap."""
    from difficulty import iqa_gap, mse, ssim_distance
    if kind == "iqa_gap":
        return iqa_gap(batch["reward"], reward_hq)
    return mse(batch["image"], batch["hq"]) if kind == "mse" else ssim_distance(batch["ssim"])


def step_advantages(batches, memory):
    """Advantages of every denoising step, a (N, B) tensor per batch; a step that was not judged takes the next judged
    one's. All batches count as one, so that the result does not depend on the micro-batch."""
    from difficulty import advantages
    sizes, count = [len(b["keys"]) for b in batches], len(batches[0]["trajectory"].t)
    keys, cap = sum((b["keys"] for b in batches), []), torch.cat([b["cap"] for b in batches])
    result, judged = [None] * count, batches[0]["rewards"]
    for k in range(count - 1, -1, -1):
        if k in judged:
            own = [f"{key}:{k}" for key in keys] if len(judged) > 1 else keys
            latest = advantages(torch.minimum(torch.cat([b["rewards"][k] for b in batches]), cap), own, memory)
        result[k] = latest
    return torch.stack(result).split(sizes, dim=1)


def update(restorer, reference, average, optimizer, batches, cfg, fidelity_coef, noise):
    """`cfg.updates` optimizer steps on collected batches. Returns the means of what was logged, the ratio error first.

    Each optimizer step gets its own part of the drawn denoising steps, a micro-batch is one of them in one batch.
    """
    from sample import ddim_step
    from sft import sft_loss
    kind = restorer.scheduler.config.prediction_type
    usable = batches[0]["trajectory"].stochastic.nonzero().flatten().cpu()
    drawn = usable[torch.randperm(len(usable), generator=noise)][:cfg.train_steps or None]
    logs, first = [], None
    total = sum(len(batch["lq"]) for batch in batches)
    for part in drawn.tensor_split(min(cfg.updates, len(drawn))):
        optimizer.zero_grad()
        for batch in batches:
            path, lq, hq, weight = batch["trajectory"], batch["lq"], batch["hq"], batch["weight"]
            batch["z0"] = restorer.encode(hq, lq)
            for k in part.tolist():
                a, b = (x.expand(len(lq)) for x in path.alpha_bar[k])
                t = path.t[k].expand(len(lq))
                step = ddim_step(restorer.predict(path.z[k], t, lq), path.z[k], a, b, cfg.eta, kind, path.z[k + 1])
                rl, info = policy_loss(step.log_prob, path.log_prob[k], batch["advantage"][k], cfg.clip_range)
                with torch.no_grad():
                    ref = ddim_step(reference.predict(path.z[k], t, lq), path.z[k], a, b, cfg.eta, kind, path.z[k + 1])
                kl = kl_to_reference(step.mean, ref.mean, step.sigma_t)
                # one SFT draw per input, shared by its samples: the same expectation at a fraction of the cost
                sft = sft_loss(restorer, lq[::cfg.samples_per_input], hq[::cfg.samples_per_input], noise)
                fidelity = fidelity_loss(step.x0, batch["z0"], a)
                loss, parts = combined_loss(rl, sft.repeat_interleave(cfg.samples_per_input), kl, fidelity, weight,
                                            cfg.sft_coef, cfg.kl_coef, fidelity_coef)
                (loss * len(lq) / (len(part) * total)).backward()
                first = info["ratio_error"].item() if first is None else first
                logs.append({key: value.item() for key, value in {**info, **parts, "loss": loss.detach()}.items()})
        grad_norm = torch.nn.utils.clip_grad_norm_(restorer.trainable(), 1.0)
        if not torch.isfinite(grad_norm):
            from utils import UserError
            raise UserError("the gradient is not finite; lower --lr or use --dtype float32; --resume goes on from "
                            "the last checkpoint")
        logs[-1]["grad_norm"] = grad_norm.item()
        optimizer.step()
        average.update_parameters(restorer.net)
    keys = dict.fromkeys(key for log in logs for key in log)
    means = {key: sum(log[key] for log in logs if key in log) / sum(key in log for log in logs) for key in keys}
    return means | {"ratio_error": first}


def measure_pool(restorer, judge, pool, cfg, noise, memory, difficulty):
    """What the SFT restorer does on each training input: its PSNR-Y, the ground truth's reward, first memory and
    distances. Returns {"psnr_y": [...], "reward_hq": [...]}, a float per input."""
    from tqdm import tqdm
    result = {"psnr_y": [], "reward_hq": []}
    per_batch, repeats = max(1, cfg.micro_batch // cfg.samples_per_input), cfg.samples_per_input
    for start in tqdm(range(0, cfg.pool, per_batch), desc="baseline", unit="batch"):
        lq, hq = (x[start:start + per_batch] for x in pool)
        keys = [str(i) for i in range(start, start + len(lq)) for _ in range(repeats)]
        reward_hq = judge(hq, hq)
        batch = collect(restorer, judge, lq.repeat_interleave(repeats, 0), hq.repeat_interleave(repeats, 0), cfg, noise)
        batch |= {"keys": keys, "cap": reward_hq.repeat_interleave(repeats)}
        step_advantages([batch], memory)
        difficulty.observe(keys, distances(batch, batch["cap"], cfg.distance))
        result["psnr_y"] += batch["psnr_y"].view(-1, repeats).mean(1).tolist()
        result["reward_hq"] += reward_hq.tolist()
    difficulty.set_anchor()
    return result


def train(cfg):
    """Runs the RL stage; see the top of this file. Returns the summary, also written to cfg.out/summary.json."""
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
    from tqdm import tqdm

    from data import get_task, photographs, random_crops
    from difficulty import Difficulty, RewardMemory
    from eval import evaluate, held_out, save_curves
    from model import load
    from reward import load as load_reward
    from utils import (UserError, generator, load_checkpoint, pick_device, save_checkpoint, write_json, write_rows)

    # set-up
    check(cfg)
    out, device, degrade = Path(cfg.out or f"runs/{cfg.task}"), pick_device(cfg.device), get_task(cfg.task)
    restorer = load(cfg.model, device, cfg.dtype, cfg.task)
    cfg.steps, cfg.eta = cfg.steps or restorer.defaults["steps"], cfg.eta if cfg.eta > 0 else restorer.defaults["eta"]
    times = restorer.scheduler.config.num_train_timesteps
    if cfg.steps < 2 or times % cfg.steps or cfg.eta <= 0:
        raise UserError(f"--steps {cfg.steps}, --eta {cfg.eta}: steps must divide {times} and be at least 2, eta be "
                        "above 0, else a step is missing, of nearly no noise, or has no log-probability")
    if cfg.size % restorer.multiple:
        raise UserError(f"--size {cfg.size}: must be a multiple of {restorer.multiple}")
    restorer.defaults |= {"task": cfg.task, "steps": cfg.steps, "eta": cfg.eta}
    reference, judge = restorer.frozen_copy(), load_reward(cfg.reward, device)
    optimizer = torch.optim.AdamW(restorer.trainable(), lr=cfg.lr, weight_decay=0.0)
    average = AveragedModel(restorer.net, multi_avg_fn=get_ema_multi_avg_fn(cfg.average))
    average.update_parameters(restorer.net)  # the first update copies: the average starts at the SFT weights
    averaged = restorer.frozen_copy()
    averaged.net = average.module
    memory, difficulty = RewardMemory(cfg.memory), Difficulty(cfg.weight)
    controller = FidelityController(cfg.fidelity_budget)
    generators = {name: generator(cfg.seed, 20, i) for i, name in enumerate(("inputs", "rollout", "update"))}
    fixed = generator(cfg.seed, 21)
    photographs("test", cfg.data, cfg.size)  # a missing photograph ends the run here, not at its final table
    hq = random_crops(photographs("train", cfg.data, cfg.size), cfg.pool, cfg.size, fixed)
    pool = (degrade(hq, fixed).to(device), hq.to(device))
    modules, rows, start = {"net": restorer.net, "average": average}, [], 0
    watched = held_out(cfg.task, cfg.data, "val", 32, cfg.size, device)[:2]
    watchers = {"judge": load_reward("judge", device), "judge2": load_reward("judge2", device)}

    def look(candidate):
        scores = evaluate(candidate, *watched, watchers, cfg.steps, cfg.eta, [0])[0]
        return {f"val_{key}": scores[key].mean().item() for key in ("judge", "judge2", "psnr_y", "ssim")}

    if cfg.resume:
        if not (out / "checkpoint.safetensors").exists():
            raise UserError(f"--resume: no checkpoint in {out}; start without it")
        check_resume(cfg, out / "config.json")
        info = load_checkpoint(out / "checkpoint.safetensors", modules, optimizer, generators)
        start, rows, baseline, controller.state = info["iteration"], info["rows"], info["baseline"], info["controller"]
        memory.load_state_dict(info["memory"]), difficulty.load_state_dict(info["difficulty"])
    else:
        write_json(out / "config.json", asdict(cfg))
        print("   ".join(f"{key} {value}" for key, value in asdict(cfg).items() if value != ""))
        baseline = measure_pool(restorer, judge, pool, cfg, generators["rollout"], memory, difficulty)
        rows = [{"iteration": 0, "distance": sum(difficulty.latest.values()) / cfg.pool} | look(averaged)]
    psnr_sft, reward_hq = (torch.tensor(baseline[key], device=device) for key in ("psnr_y", "reward_hq"))

    for iteration in (bar := tqdm(range(start, cfg.iterations), initial=start, total=cfg.iterations, desc="rl")):
        # rollout and reward, in batches that fit into memory
        chosen = torch.randperm(cfg.pool, generator=generators["inputs"])[:cfg.inputs]
        batches = []
        for ids in chosen.split(max(1, cfg.micro_batch // cfg.samples_per_input)):
            ids = ids.repeat_interleave(cfg.samples_per_input).to(device)
            batch = collect(restorer, judge, pool[0][ids], pool[1][ids], cfg, generators["rollout"])
            batches.append(batch | {"keys": [str(i) for i in ids.tolist()], "ids": ids, "cap": reward_hq[ids]})

        # advantage from the memory of each input
        for batch, advantage in zip(batches, step_advantages(batches, memory)):
            batch["advantage"] = advantage

        # difficulty, weights, and the balance between RL and SFT
        for batch in batches:
            batch["distance"] = distances(batch, batch["cap"], cfg.distance)
            difficulty.observe(batch["keys"], batch["distance"])
        for batch in batches:
            batch["weight"] = difficulty.weight(batch["distance"])
        drop = torch.cat([psnr_sft[b["ids"]] - b["psnr_y"] for b in batches]).mean().item()
        fidelity_coef = controller.update(drop)

        # update
        optimizer.param_groups[0]["lr"] = learning_rate(iteration, cfg.iterations, cfg.lr)
        began = time.perf_counter()
        losses = update(restorer, reference, average, optimizer, batches, cfg, fidelity_coef, generators["update"])

        # log
        row = {"iteration": iteration + 1}
        for key in ("reward", "distance", "weight", "psnr_y", "ssim"):
            row[key] = torch.cat([b[key] for b in batches]).mean().item()
        row |= {"psnr_drop": drop, "fidelity_coef": fidelity_coef} | losses
        row |= {key: sum(b[key] for b in batches) for key in ("seconds_rollout", "seconds_reward")}
        row["seconds_update"] = time.perf_counter() - began
        done = iteration + 1 == cfg.iterations
        if (iteration + 1) % cfg.save_every == 0 or done:
            row |= look(averaged)
        rows.append(row)
        bar.set_postfix({k: f"{row[k]:.3f}" for k in ("reward", "distance", "weight", "psnr_drop", "fidelity_coef")})
        if (iteration + 1) % cfg.save_every == 0 or done:
            save_checkpoint(out / "checkpoint.safetensors", modules, optimizer, generators, {
                "iteration": iteration + 1, "rows": rows, "baseline": baseline, "controller": controller.state,
                "memory": memory.state_dict(), "difficulty": difficulty.state_dict()})
            write_rows(out / "metrics.csv", rows)
            save_curves(out / "curves.png", rows, "iteration", [k for k in rows[-1] if k != "iteration"])

    averaged.save(out / "model")
    return report(cfg, reference, averaged, out, device)


def report(cfg, reference, restorer, out, device):
    """Table, picture and summary.json: the SFT restorer against the new one on held-out test images."""
    import eval
    from utils import write_json
    settings = eval.Config(task=cfg.task, data=cfg.data, size=cfg.size, out=str(out))
    rows, images, _ = eval.compare({"sft": reference, "rl": restorer}, settings, device)
    print(eval.format_table(rows))
    means = {name: {key: eval.mean_se(row[key])[0] if key in row else None
                    for key in ("judge", "judge2", "psnr_y", "ssim")} for name, row in rows.items()}
    closed = eval.gap_closed(*(means[name]["judge"] for name in ("rl", "sft", "hq")))
    print(f"judge gap closed {closed:.0%}   psnr_y {means['rl']['psnr_y'] - means['sft']['psnr_y']:+.2f} dB   "
          f"ssim {means['rl']['ssim'] - means['sft']['ssim']:+.4f}")
    write_json(out / "summary.json", means)
    order = (rows["hq"]["judge"] - rows["sft"]["judge"]).argsort(descending=True)
    picks = order[torch.linspace(0, len(order) - 1, min(6, len(order))).long()]  # from the hardest to the easiest
    eval.save_grid(out / "before_after.png", {name: images[name][picks] for name in ("lq", "sft", "rl", "hq")},
                   {name: [f"judge {rows[name]['judge'][i]:.2f}" + (
                       f"  {rows[name]['psnr_y'][i]:.1f} dB" if name != "hq" else "") for i in picks]
                    for name in ("lq", "sft", "rl", "hq")})
    print(f"wrote {out}: model/, summary.json, metrics.csv, curves.png, before_after.png")
    return means


def main():
    from utils import parse
    train(parse(Config, description="Reinforcement learning of a diffusion restorer, weighed against SFT."))


if __name__ == "__main__":
    from utils import run_main
    run_main(main)
