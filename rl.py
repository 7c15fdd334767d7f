"""Reinforcement learning of a diffusion restorer with an IQA reward, weighed against SFT by difficulty.

Implements "Enhancing Diffusion-based Restoration Models via Difficulty-Adaptive Reinforcement Learning with IQA
Reward" (arXiv 2511.01645). One iteration, i a sample, k a denoising step, theta_old the weights that sampled:

  1 rollout     z_T .. z_0 for each lq with stochastic DDIM; keep z_t, z_{t-1}, log p_old           sample.rollout
  2 reward      r_i = M(x_hat_i), or r_ik = M(decode(x0_hat(z_{t-1}))) for every k-th step          reward.py
  3 advantage   A = (min(r, M(hq_i)) - mean(history_i)) / (std(history_i) + delta), centred         difficulty.py
  4 difficulty  d_i from ground truth, w_i = sigmoid(k (d_i - m) / s)                               difficulty.py
  5 update      L = mean_i [w_i L_RL,i + (1 - w_i) lambda L_SFT,i] + beta KL(p_theta || p_ref) + price . drop
                L_RL,i = max(-A rho, -A clip(rho, 1 - eps, 1 + eps)),  rho = exp(log p_theta - log p_old)
                KL     = ||mu_theta - mu_ref||^2 / (2 sigma_t^2), mean over C, H, W
                drop   = loss of PSNR-Y and SSIM against the SFT restorer, by the whole chain       (ours alone)
The paper's exact equations are not public: README marks what is the paper's and what is our reconstruction.

Chosen here:
 1. log p is a mean over C, H, W (sample.py), so that clip_range is of the order 1e-3, not 0.2.
 2. A micro-batch is one step k of the same samples that were sampled together: the same arithmetic gives the same
    log p, so rho is exactly 1 before the first optimizer step of an iteration, in any dtype.
 3. Only steps with sigma_t > 0 enter; `updates` optimizer steps share one rollout, each with its own part of the steps.
 4. The reward is capped at the ground truth's own score: to be judged better than a real photograph is no merit. It
    is the mean over --views symmetric views, because most of what one view says among restorations of one input is
    noise (reward.symmetric).
 5. Fidelity is a constraint, not a reward: maximize the judge's score while fidelity falls by at most
    --fidelity-budget. Its Lagrange multiplier, the price of a dB, controls itself (FidelityPrice). Its gradient goes
    through the sampling chain, which is differentiable where a judge is not in practice, and is exact where a policy
    gradient is mostly noise.
 6. --train modulation trains normalizations, biases and time embeddings, a ninth of the weights: they can sharpen and
    calm every feature at every noise level, and collect less noise of the gradient than all weights do.
 7. What is kept is a running average of the weights over the optimizer steps, and of these averages the one with the
    best reward on validation photographs within the budget there.

    python rl.py --task sr                                                              # laptop, about 10 minutes
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
    mostly noise; then a cosine down to 0.3 of the peak, so that the run settles."""
    return peak * min(1.0, (iteration + 1) / warmup) * (0.65 + 0.35 * math.cos(math.pi * iteration / total))


def kl_to_reference(mean, ref_mean, sigma_t):
    """KL between Gaussians of the same sigma_t (B,) > 0: ||mean - ref_mean||^2 / (2 sigma_t^2), mean over C, H, W;
    means (B, C, h, w) -> (B,)."""
    return ((mean - ref_mean) ** 2).flatten(1).mean(1) / (2 * sigma_t ** 2)


def combined_loss(rl, sft, kl, weight, sft_coef, kl_coef):
    """mean_i [w_i rl_i + (1 - w_i) sft_coef sft_i + kl_coef kl_i]; tensors (B,) -> scalar."""
    return (weight * rl + (1 - weight) * sft_coef * sft + kl_coef * kl).mean()


def fidelity(images, refs):
    """PSNR-Y in dB and 20 SSIM, so that 0.2 dB and 0.01 count the same; (B, 3, H, W) in [-1, 1] twice -> (B, 2)."""
    from reward import psnr_y, ssim
    return torch.stack([psnr_y(images, refs), 20 * ssim(images, refs)], dim=1)


class FidelityPrice:
    """The prices of a dB of PSNR-Y and of 20 SSIM in the loss: Lagrange multipliers that control themselves.

    drop (2,) = `fidelity` of the SFT restorer minus that of the present one, on the same inputs.
      price = unit max(0, I + gain (drop - budget) / budget),   I <- max(0, I + ki (drop - budget) / budget)
    unit (2,) = 1 / (std of the fidelity among SFT restorations of one input), in the scale of L_RL, whose log p is a
    mean over dimensions and steps: at a price of 1 unit one std of fidelity weighs about as much as one of the reward.
    This is the multiplier of an augmented Lagrangian (Nocedal and Wright 2006, eq. 17.36): the proportional term
    bends a trade-off that is nearly a straight line, on which I alone, dual ascent, runs from one end to the other.
    It acts without smoothing: a delay makes it overshoot. I starts at 0: within the budget fidelity is free, because
    a price from the first dB on left most of the budget unspent. budget < 0: off, the prices are 0.
    """

    def __init__(self, budget, unit=(1.0, 1.0), gain=1.0, ki=0.02):
        self.budget, self.gain, self.ki = budget, gain, ki
        self.unit, self.integral = torch.tensor(unit), torch.zeros(2)

    def update(self, drop):
        """drop (2,) -> prices (2,)."""
        if self.budget < 0:
            return torch.zeros_like(drop)
        excess = (drop.detach().cpu() - self.budget) / max(self.budget, 1e-3)
        self.integral = (self.integral + self.ki * excess).clamp(min=0)
        return (self.unit * (self.integral + self.gain * excess).clamp(min=0)).to(drop)

    def state_dict(self):
        return {"unit": self.unit.tolist(), "integral": self.integral.tolist()}

    def load_state_dict(self, state):
        self.unit, self.integral = torch.tensor(state["unit"]), torch.tensor(state["integral"])


def better(row, best, sft, budget):
    """Whether the averaged weights of `row` replace those of `best`: rows of validation scores, `sft` the SFT model's.

    They must have the higher reward, and have lost at most `budget` dB of PSNR-Y and budget / 20 of SSIM: 0.01 for
    0.2 dB. budget < 0: no constraint, the latest weights are taken, not the best."""
    if budget < 0:
        return True
    return (row["val_reward"] > best["val_reward"] and sft["val_psnr_y"] - row["val_psnr_y"] <= budget
            and sft["val_ssim"] - row["val_ssim"] <= budget / 20)


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
    iterations: Annotated[int, "rounds of rollout and update"] = 60
    inputs: Annotated[int, "lq images per iteration"] = 16
    samples_per_input: Annotated[int, "restorations of each"] = 4
    pool: Annotated[int, "training inputs that recur; the memory keeps a history of each"] = 256
    size: Annotated[int, "side of a training crop in pixels"] = 64
    steps: Annotated[int, "DDIM steps; 0: as the SFT restorer was trained"] = 0
    eta: Annotated[float, "stochasticity, > 0; -1: as the SFT restorer was trained"] = -1.0
    views: Annotated[int, "symmetric views of an image, 1 to 8, whose rewards are averaged"] = 8
    memory: Annotated[int, "latest rewards of an input that its memory keeps"] = 16
    # update
    train: Annotated[str, "weights that train: modulation (norms, biases, time embeddings) or all"] = "modulation"
    updates: Annotated[int, "optimizer steps per rollout"] = 2
    train_steps: Annotated[int, "denoising steps drawn for the update in each iteration; 0: all"] = 0
    micro_batch: Annotated[int, "samples in memory at once"] = 64
    lr: Annotated[float, "peak learning rate of AdamW, see learning_rate"] = 4e-4
    clip_range: Annotated[float, "of the ratio of mean log-densities"] = 2e-3
    kl_coef: Annotated[float, "beta, weight of the KL to the SFT restorer"] = 0.001
    average: Annotated[float, "decay per optimizer step of the weight average that is saved; 0: the last weights"] = 0.9
    # RL against SFT
    weight: Annotated[str, "baseline, running, or fixed:W (0: SFT loss only, 1: RL loss only)"] = "baseline"
    distance: Annotated[str, "of difficulty: iqa_gap, mse or ssim"] = "iqa_gap"
    sft_coef: Annotated[float, "lambda, weight of the SFT loss"] = 0.001
    fidelity_budget: Annotated[float, "PSNR-Y in dB, and 20 SSIM, that RL may cost; -1: off"] = 0.2
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
    if not 1 <= cfg.views <= 8:
        raise UserError(f"--views {cfg.views}: must be from 1 to 8, the symmetries of a square")
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
    if cfg.train not in ("modulation", "all"):
        raise UserError(f"--train {cfg.train}: unknown; choose modulation or all")
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
    from sample import rollout
    start = time.perf_counter()
    trajectory = rollout(restorer, lq, cfg.steps, cfg.eta, noise)
    rolled = time.perf_counter()
    images = stepwise_images(restorer, trajectory, lq, judged_every(cfg.reward_mode))
    rewards = {k: judge(image, hq) for k, image in images.items()}
    last = images[len(trajectory.t) - 1]
    return {"trajectory": trajectory, "rewards": rewards, "reward": rewards[len(trajectory.t) - 1], "image": last,
            "fidelity": fidelity(last, hq), "lq": lq, "hq": hq,
            "seconds_rollout": rolled - start, "seconds_reward": time.perf_counter() - rolled}


def distances(batch, reward_hq, kind):
    """Distance of each sample of `collect` to its ground truth, (B,); reward_hq (B,) is used by iqa_gap."""
    from difficulty import iqa_gap, mse, ssim_distance
    if kind == "iqa_gap":
        return iqa_gap(batch["reward"], reward_hq)
    return mse(batch["image"], batch["hq"]) if kind == "mse" else ssim_distance(batch["fidelity"][:, 1] / 20)


def step_advantages(batches, memory):
    """Advantages of every denoising step, a (N, B) tensor per batch; a step that was not judged takes the next judged
    one's. All batches count as one, so that the result does not depend on the micro-batch."""
    from difficulty import advantages
    sizes = [len(b["keys"]) for b in batches]
    keys, cap = sum((b["keys"] for b in batches), []), torch.cat([b["cap"] for b in batches])
    judged = batches[0]["rewards"]
    result = [None] * (max(judged) + 1)  # the last step is always judged
    for k in range(len(result) - 1, -1, -1):
        if k in judged:
            own = [f"{key}:{k}" for key in keys] if len(judged) > 1 else keys
            latest = advantages(torch.minimum(torch.cat([b["rewards"][k] for b in batches]), cap), own, memory)
        result[k] = latest
    return torch.stack(result).split(sizes, dim=1)


def update(restorer, reference, average, optimizer, batches, price, cfg, noise):
    """`cfg.updates` optimizer steps on collected batches. Returns the means of what was logged, the ratio error first.

    Each optimizer step gets its own part of the drawn denoising steps; a micro-batch is one of them in one batch, and
    then one chain for the fidelity of its part of the inputs.
    """
    usable = batches[0]["trajectory"].stochastic.nonzero().flatten().cpu()
    drawn = usable[torch.randperm(len(usable), generator=noise)][:cfg.train_steps or None]
    logs, total = [], sum(len(batch["lq"]) for batch in batches)
    parts = drawn.tensor_split(min(cfg.updates, len(drawn)))
    for index, part in enumerate(parts):
        optimizer.zero_grad()
        for batch in batches:
            share = len(batch["lq"]) / total
            for k in part.tolist():
                loss, info = step_loss(restorer, reference, batch, k, len(part) * (k == part[0]), cfg, noise)
                (loss * share / len(part)).backward()
                logs.append({key: value.item() for key, value in info.items()})
            if cfg.fidelity_budget >= 0:
                drop = chain_drop(restorer, batch, index, len(parts), cfg, noise)
                prices = price.update(drop)
                ((prices * drop).sum() * share).backward()
                logs.append(dict(zip(("psnr_drop", "ssim_drop", "psnr_price", "ssim_price"),
                                     [drop[0].item(), drop[1].item() / 20, *(prices / price.unit.to(drop)).tolist()])))
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
    return means | {"ratio_error": logs[0]["ratio_error"]}


def step_loss(restorer, reference, batch, k, share, cfg, noise):
    """The combined loss of step k of a batch -> (loss, info).

    share: of the SFT and KL terms in it, which need no more than one step of each optimizer step: the number of steps
    for that one, 0 for the others, the same expectation at a fraction of the cost. For the same reason the samples of
    an input share one draw of the SFT loss. A term whose coefficient is 0 costs no network pass.
    """
    from sft import sft_loss
    path, lq, hq, repeats = batch["trajectory"], batch["lq"], batch["hq"], cfg.samples_per_input
    step = repeat_step(restorer, path, k, lq, cfg.eta)
    rl, info = policy_loss(step.log_prob, path.log_prob[k], batch["advantage"][k], cfg.clip_range)
    sft = kl = torch.zeros_like(rl)
    if share * cfg.sft_coef > 0 and (batch["weight"] < 1).any():
        sft = sft_loss(restorer, lq[::repeats], hq[::repeats], noise).repeat_interleave(repeats)
        info["sft_loss"] = sft.mean().detach()
    if share * cfg.kl_coef > 0:
        with torch.no_grad():
            ref = repeat_step(reference, path, k, lq, cfg.eta)
        kl = kl_to_reference(step.mean, ref.mean, step.sigma_t)
        info["kl"] = kl.mean().detach()
    loss = combined_loss(rl, sft, kl, batch["weight"], share * cfg.sft_coef, share * cfg.kl_coef)
    return loss, info | {"rl_loss": rl.mean().detach(), "loss": loss.detach()}


def chain_drop(restorer, batch, part, parts, cfg, noise):
    """Fidelity lost against the SFT restorer, mean over a part of the inputs of a batch, (2,), with its gradient
    through all steps of a fresh chain of each input."""
    from sample import rollout
    inputs = len(batch["lq"]) // cfg.samples_per_input
    own = slice(cfg.samples_per_input * (part % inputs), None, cfg.samples_per_input * min(parts, inputs))
    lq, hq, sft = (batch[key][own] for key in ("lq", "hq", "fidelity_sft"))
    z = rollout(restorer, lq, cfg.steps, cfg.eta, noise, keep=False, grad=True).z[-1]
    return (sft - fidelity(restorer.decode(z, lq), hq)).mean(0)


def repeat_step(restorer, path, k, lq, eta):
    """Step k of a rollout once more with the present weights: the Step from its z_t to its z_{t-1}."""
    from sample import ddim_step
    a, b = (x.expand(len(lq)) for x in path.alpha_bar[k])
    output = restorer.predict(path.z[k], path.t[k].expand(len(lq)), lq)
    return ddim_step(output, path.z[k], a, b, eta, restorer.scheduler.config.prediction_type, path.z[k + 1])


def measure_pool(restorer, judge, pool, cfg, noise, memory, difficulty):
    """What the SFT restorer does on each training input, from two restorations of each: first memory and distances.

    Returns {"fidelity": [(2,) of each input], "reward_hq": [...], "spread": (2,)}; spread is the standard deviation of
    the fidelity among the restorations of one input.
    """
    from tqdm import tqdm
    repeats, batches = 2, []
    for ids in tqdm(torch.arange(cfg.pool).split(max(1, cfg.micro_batch // repeats)), desc="baseline", unit="batch"):
        lq, hq = pool[0][ids], pool[1][ids]
        batch = collect(restorer, judge, lq.repeat_interleave(repeats, 0), hq.repeat_interleave(repeats, 0), cfg, noise)
        batches.append({"keys": [str(i) for i in ids.tolist() for _ in range(repeats)], "rewards": batch["rewards"],
                        "cap": judge(hq, hq).repeat_interleave(repeats), "fidelity": batch["fidelity"]})
        distance = distances(batch, batches[-1]["cap"], cfg.distance)
        difficulty.observe(batches[-1]["keys"], distance)
    difficulty.set_anchor()
    step_advantages(batches, memory)
    fidelities = torch.cat([b["fidelity"] for b in batches]).view(-1, repeats, 2)
    return {"fidelity": fidelities.mean(1).tolist(), "spread": fidelities.std(1).mean(0).clamp(min=1e-3).tolist(),
            "reward_hq": torch.cat([b["cap"] for b in batches])[::repeats].tolist()}


def train(cfg):
    """Runs the RL stage; see the top of this file. Returns the summary, also written to cfg.out/summary.json."""
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
    from tqdm import tqdm

    from data import get_task, photographs, random_crops
    from difficulty import Difficulty, RewardMemory
    from eval import evaluate, held_out, save_curves
    from model import load
    from reward import load as load_reward
    from reward import symmetric
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
    reference, scorer = restorer.frozen_copy(), load_reward(cfg.reward, device)
    judge = symmetric(scorer, cfg.views)
    restorer.train_only(cfg.train)
    optimizer = torch.optim.AdamW(restorer.trainable(), lr=cfg.lr, weight_decay=0.0)
    average = AveragedModel(restorer.net, multi_avg_fn=get_ema_multi_avg_fn(cfg.average))
    average.update_parameters(restorer.net)  # the first update copies: the average starts at the SFT weights
    averaged, best = reference.frozen_copy(), reference.frozen_copy()
    averaged.net = average.module
    memory, difficulty = RewardMemory(cfg.memory), Difficulty(cfg.weight)
    price = FidelityPrice(cfg.fidelity_budget)
    generators = {name: generator(cfg.seed, 20, i) for i, name in enumerate(("inputs", "rollout", "update"))}
    fixed = generator(cfg.seed, 21)
    photographs("test", cfg.data, cfg.size)  # a missing photograph ends the run here, not at its final table
    hq = random_crops(photographs("train", cfg.data, cfg.size), cfg.pool, cfg.size, fixed)
    pool = (degrade(hq, fixed)[0].to(device), hq.to(device))
    modules, rows, start = {"net": restorer.net, "average": average, "best": best.net}, [], 0
    watched = held_out(cfg.task, cfg.data, "val", 64, cfg.size, device)[:2]
    watchers = {name: load_reward(name, device) for name in ("judge", "judge2") if name != cfg.reward}
    watchers["reward"] = scorer  # loaded once when it is the judge itself

    def look(candidate):
        scores = evaluate(candidate, *watched, watchers, cfg.steps, cfg.eta, [0])[0]
        scores.setdefault("judge", scores["reward"])
        return {f"val_{key}": scores[key].mean().item() for key in ("reward", "judge", "judge2", "psnr_y", "ssim")}

    if cfg.resume:
        if not (out / "checkpoint.safetensors").exists():
            raise UserError(f"--resume: no checkpoint in {out}; start without it")
        check_resume(cfg, out / "config.json")
        info = load_checkpoint(out / "checkpoint.safetensors", modules, optimizer, generators)
        start, rows, baseline, chosen_at = info["iteration"], info["rows"], info["baseline"], info["chosen_at"]
        memory.load_state_dict(info["memory"]), difficulty.load_state_dict(info["difficulty"])
        price.load_state_dict(info["price"])
    else:
        write_json(out / "config.json", asdict(cfg))
        print("   ".join(f"{key} {value}" for key, value in asdict(cfg).items() if value != ""))
        baseline = measure_pool(restorer, judge, pool, cfg, generators["rollout"], memory, difficulty)
        rows = [{"iteration": 0, "distance": sum(difficulty.latest.values()) / cfg.pool} | look(averaged)]
        dimensions, chosen_at = reference.latent_shape(pool[0][:1]).numel() * (cfg.steps - 1), 0
        price.unit = 1 / (torch.tensor(baseline["spread"]) * dimensions)
    fidelity_sft, reward_hq = (torch.tensor(baseline[key], device=device) for key in ("fidelity", "reward_hq"))

    for iteration in (bar := tqdm(range(start, cfg.iterations), initial=start, total=cfg.iterations, desc="rl")):
        # rollout and reward, in batches that fit into memory
        chosen = torch.randperm(cfg.pool, generator=generators["inputs"])[:cfg.inputs]
        batches = []
        for ids in chosen.split(max(1, cfg.micro_batch // cfg.samples_per_input)):
            ids = ids.repeat_interleave(cfg.samples_per_input).to(device)
            batch = collect(restorer, judge, pool[0][ids], pool[1][ids], cfg, generators["rollout"])
            batches.append(batch | {"keys": [str(i) for i in ids.tolist()], "cap": reward_hq[ids],
                                    "fidelity_sft": fidelity_sft[ids]})

        # advantage from the memory of each input
        for batch, advantage in zip(batches, step_advantages(batches, memory)):
            batch["advantage"] = advantage

        # difficulty, and the weight between RL and SFT
        for batch in batches:
            batch["distance"] = distances(batch, batch["cap"], cfg.distance)
            difficulty.observe(batch["keys"], batch["distance"])
        for batch in batches:
            batch["weight"] = difficulty.weight(batch["distance"])

        # update
        optimizer.param_groups[0]["lr"] = learning_rate(iteration, cfg.iterations, cfg.lr)
        began = time.perf_counter()
        losses = update(restorer, reference, average, optimizer, batches, price, cfg, generators["update"])

        # log, and keep the best average so far
        row = {"iteration": iteration + 1}
        for key in ("reward", "distance", "weight"):
            row[key] = torch.cat([b[key] for b in batches]).mean().item()
        psnr, ssim = torch.cat([b["fidelity"] for b in batches]).mean(0).tolist()
        row |= {"psnr_y": psnr, "ssim": ssim / 20} | losses
        row |= {key: sum(b[key] for b in batches) for key in ("seconds_rollout", "seconds_reward")}
        row["seconds_update"] = time.perf_counter() - began
        rows.append(row)
        bar.set_postfix({k: f"{row[k]:.3f}" for k in ("reward", "distance", "weight", "psnr_drop") if k in row})
        if (iteration + 1) % cfg.save_every == 0 or iteration + 1 == cfg.iterations:
            row |= look(averaged)
            if better(row, rows[chosen_at], rows[0], cfg.fidelity_budget):
                best.net.load_state_dict(average.module.state_dict())
                chosen_at = iteration + 1
            save_checkpoint(out / "checkpoint.safetensors", modules, optimizer, generators, {
                "iteration": iteration + 1, "rows": rows, "baseline": baseline, "price": price.state_dict(),
                "chosen_at": chosen_at, "memory": memory.state_dict(), "difficulty": difficulty.state_dict()})
            write_rows(out / "metrics.csv", rows)
            save_curves(out / "curves.png", rows, "iteration", [k for k in rows[-1] if k != "iteration"])

    best.save(out / "model")
    print(f"kept the weights of iteration {chosen_at}, the best on validation photographs")
    return report(cfg, reference, best, out, device)


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
