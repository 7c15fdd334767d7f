"""Reinforcement learning (RL) of a diffusion restorer with an IQA reward, weighed against SFT.

Implements "Enhancing Diffusion-based Restoration Models via Difficulty-Adaptive Reinforcement
Learning with IQA Reward" (arXiv 2511.01645). One iteration, for samples i:

  1 rollout     z_T .. z_0 for each lq by stochastic DDIM, with log p_old(z_{t-1} | z_t)   sample.py
  2 reward      r_i = M(restored_i), M an MLLM judge; or one for every step               reward.py
  3 advantage   A_i = (min(r_i, M(hq_i)) - mean of the memory of this input) / std    difficulty.py
  4 difficulty  d_i = max(M(hq_i) - mean of the memory, 0),  w_i = sigmoid(2 (d_i - m) / s)   same
  5 update      L = mean_i [w_i L_RL,i + (1 - w_i) lambda L_SFT,i] + beta KL              step_loss
                L_RL,i = max(-A rho, -A clip(rho, 1 - c, 1 + c)), PPO's                 policy_loss
                rho = exp(log p_theta - log p_old)
                KL  = ||mu_theta - mu_ref||^2 / (2 sigma_t^2), mean over C, H, W    kl_to_reference
We did not have the paper's exact equations: the README marks what is the paper's and what is ours.

Chosen here:
 1. log p is a mean over C, H, W (sample.py), so clip_range is of the order 1e-3. The gradient of
    L_RL is 3 to 50 times smaller than that of L_SFT, so lambda is of the order 1e-2.
 2. A micro-batch is one denoising step of samples that were sampled together: the same arithmetic
    gives the same log p, so rho is exactly 1 before the first optimizer step of an iteration.
 3. A reward is capped at the ground truth's own (--cap): to be judged better than a photograph is
    no merit. It is the mean over symmetric views: much of what a single view says is noise.
 4. The denoising steps whose sigma_t is not small (sample.py) are divided at random between the
    optimizer steps of an iteration; if their number is odd, one is left out.
 5. Ours alone: what is judged and kept is a running average of the weights, the one with the best
    reward on validation photographs among those that lost at most --max-drop dB of PSNR there.
 6. All random numbers of an iteration come from (seed, iteration), for all samples at once; each
    process takes its part. So several processes give the same weights as one, up to rounding, and
    a resumed run the same as an unstopped one.

    python rl.py --task sr                                                     # laptop, 4 minutes
    accelerate launch rl.py --task sr --model ldm-sr --reward qrealign-mini --data DIR --size 256 \\
        --steps 20 --micro-batch 8                                             # GPUs
"""

import functools
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from data import get_task, held_out, open_split, pool
from difficulty import RewardMemory, advantages, iqa_gap, weights
from eval import (INSTRUMENTS, compare, describe, evaluate, in_batches, load_metrics,
                  save_curves, save_regions, write_scores)
from model import gathered, load
from reward import load as load_reward
from reward import views
from sample import draw, replay, rollout
from sft import (diffusion_loss, draw_noise, learning_rate, load_optimizer, own_part,
                 update_average)
from utils import (UserError, check_resume, generator, load_checkpoint, new_run, note, one_line,
                   option, parse, pick_device, run_main, save_checkpoint, write_json, write_rows)

UPDATES = 2          # optimizer steps per rollout
MEMORY = 8           # latest rewards of an input that are remembered
WARMUP = 2           # iterations in which the learning rate rises
FLOOR = 0.3          # share of the learning rate that is left at the end
BETAS = (0.9, 0.98)  # of AdamW: the gradient shrinks as w falls, and v must follow
AVERAGE = 0.9        # decay of the weight average, per optimizer step
CLIP_RANGE = 2e-3    # of the ratio of mean log-densities
CLIP_NORM = 1.0      # longer gradients are scaled down
LOOK_EVERY = 4       # iterations between checkpoints, each with a look at validation photographs
RESUMED = ("iterations", "out", "resume", "lr", "micro_batch")  # what may change in a resumed run


# ---- losses: per-sample tensors in, (loss, info) out ----

def policy_loss(log_prob, old_log_prob, advantage, clip_range):
    """PPO's clipped surrogate (Schulman et al. 2017, arXiv 1707.06347, eq. 7); (B,) each -> (B,).

    The ratio is of mean log-densities: one unit of log_prob is one nat per dimension.
    """
    ratio = (log_prob - old_log_prob).exp()
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    loss = torch.maximum(-advantage * ratio, -advantage * clipped)
    info = {"clip_frac": ((ratio - 1).abs() > clip_range).float().mean(),
            "approx_kl": 0.5 * (log_prob - old_log_prob).square().mean(),
            "ratio_error": (ratio - 1).abs().max()}
    return loss, info


def kl_to_reference(mean, ref_mean, sigma_t):
    """KL of two Gaussians of the same sigma_t (B,): ||mean - ref_mean||^2 / (2 sigma_t^2).

    Mean over C, H, W, as log_prob is; means (B, C, h, w) -> (B,).
    """
    return (mean - ref_mean).square().flatten(1).mean(1) / (2 * sigma_t.to(mean.device) ** 2)


def step_loss(restorer, reference, cfg, batch, k):
    """The loss of the paper for denoising step k of a batch of samples -> (loss, info).

    info["terms"] holds its three terms, which add up to the loss.
    """
    path, w = batch["path"], batch["weight"]
    step = replay(restorer, path, k, cfg.eta)                                       # Eq. 3
    advantage = batch["advantage"][:, k]
    rl, info = policy_loss(step.log_prob, path.log_prob[k], advantage, CLIP_RANGE)
    sft = diffusion_loss(restorer, batch["z0"], path.condition, batch["t"], batch["eps"])
    with torch.no_grad():
        ref_mean = replay(reference, path, k, cfg.eta).mean
    kl = kl_to_reference(step.mean, ref_mean, step.sigma_t)                         # Eq. 10
    terms = {"rl": (w * rl).mean(), "sft": ((1 - w) * cfg.sft_coef * sft).mean(),   # Eq. 4
             "kl": (cfg.kl_coef * kl).mean()}
    info |= {"terms": terms, "rl_loss": rl.mean(), "sft_loss": sft.mean(), "kl": kl.mean()}
    return sum(terms.values()), info


# ---- the phases of a run ----

def shared_pool(source, degrade, cfg, accelerator):
    """The training crops (lq, hq), (pool, 3, size, size) each; each process makes its part."""
    own = own_part(cfg.pool, accelerator)
    lq, hq = pool(source, degrade, cfg.size, cfg.seed, len(own), int(own[0]))
    if accelerator.num_processes > 1:
        lq, hq = (accelerator.gather(x.to(accelerator.device)).cpu() for x in (lq, hq))
    return lq, hq


@torch.no_grad()
def collect(restorer, judge, lq, hq, gen, cfg, accelerator, keep=True):
    """Rollout and reward of samples lq, hq (S, 3, H, W), the noise drawn for all of them.

    -> (batches of this process: dicts, [] unless keep; rewards (S, K) of all, on the CPU). K is 1
    for --reward-mode final. For step, step k is judged by the clean image that is predicted from
    its result.
    """
    condition, noise = draw(restorer, lq, cfg.steps, gen)
    own = own_part(len(lq), accelerator)
    judged = range(cfg.steps) if cfg.reward_mode == "step" else [cfg.steps - 1]
    batches, rewards = [], []
    for part in own.split(cfg.micro_batch):
        y, x, c, n = (z.to(accelerator.device) for z in (lq[part], hq[part], condition[part],
                                                         noise[:, part]))
        path = rollout(restorer, c, n, cfg.eta)
        clean = [*path.x0[1:], path.z[-1]]
        rewards.append(torch.stack([judge(restorer.decode(clean[k], y), x) for k in judged], 1))
        if keep:
            z0 = restorer.encode(x, y)
            batches.append({"own": part, "lq": y, "noise": n, "path": path, "z0": z0})
    rewards = accelerator.gather(torch.cat(rewards).to(accelerator.device)).cpu()
    return batches, rewards


@torch.no_grad()
def baseline(restorer, judge, memory, lq, hq, cfg, accelerator):
    """Fills the memory with two restorations of each input by the SFT model.

    -> the scores of the ground truth hq, (inputs,), on the CPU.
    """
    quiet = not accelerator.is_main_process
    rewards = []
    own = own_part(len(hq), accelerator)
    for part in tqdm(own.split(cfg.micro_batch), "judge hq", disable=quiet):
        x = hq[part].to(accelerator.device)
        rewards.append(judge(x, x))
    reward_hq = accelerator.gather(torch.cat(rewards).to(accelerator.device)).cpu()
    for n in tqdm(range(2), "baseline", disable=quiet):
        gen = generator(cfg.seed, 20, n)
        _, rewards = collect(restorer, judge, lq, hq, gen, cfg, accelerator, keep=False)
        memory.push(torch.arange(cfg.pool), counted(rewards, reward_hq, cfg))
    return reward_hq


def update(loss_of, restorer, average, optimizer, batches, lq, gen, accelerator, look):
    """UPDATES optimizer steps, each on its own part of the denoising steps -> what to log.

    loss_of(batch, k): step_loss. batches: of `collect`, with advantage (b, N) and weight (b,).
    lq: of the samples of all processes, for which noise is drawn. look: also the share of each
    term in the gradient's norm, for the first micro-batch.
    """
    usable = torch.tensor(batches[0]["path"].usable)
    usable = usable[torch.randperm(len(usable), generator=gen)].tolist()
    part = max(1, len(usable) // UPDATES)
    accelerator.gradient_accumulation_steps = part * len(batches)
    logs, norms, shares = [], [], {}
    for k in usable[:part * UPDATES]:
        t, eps = draw_noise(restorer, lq, gen)
        for batch in batches:
            batch["t"], batch["eps"] = t[batch["own"]], eps[batch["own"]].to(accelerator.device)
            with accelerator.accumulate(restorer.net):
                loss, info = loss_of(batch, k)
                terms = info.pop("terms")
                if look and not logs and not accelerator.is_fsdp2:  # its weights are in parts
                    shares = grad_shares(terms, restorer.weights())
                accelerator.backward(loss)
                logs.append({key: x.detach() for key, x in info.items()})
                if accelerator.sync_gradients:
                    norms.append(accelerator.clip_grad_norm_(restorer.weights(), CLIP_NORM))
                optimizer.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                update_average(average, restorer, AVERAGE)
    own = {key: torch.stack([log[key] for log in logs]).mean() for key in logs[0]}
    row = {key: accelerator.gather(x).mean().item() for key, x in own.items()}
    row["grad_norm"] = torch.stack(norms).mean().item()
    if "ratio_error" in row:
        row["ratio_error"] = accelerator.gather(logs[0]["ratio_error"]).max().item()
    if not math.isfinite(row["grad_norm"]):
        raise UserError("the gradient is not finite; lower --lr; --resume if it saved anything")
    return row | shares


def counted(rewards, reward_hq, cfg):
    """Rewards (S, K) that count: none more than the ground truth's own (S,), unless --cap none."""
    if rewards.isnan().all():
        raise UserError(f"--reward {cfg.reward}: gives no score; see what it answers by reward.py")
    return torch.minimum(rewards, reward_hq[:, None]) if cfg.cap == "hq" else rewards


def grad_shares(terms, parameters):
    """{term: its share of the gradient's norm} of the scalars in `terms`; stores no gradient."""
    norms = {}
    for name, term in terms.items():
        grads = torch.autograd.grad(term, parameters, retain_graph=True, materialize_grads=True)
        norms[name] = torch.nn.utils.get_total_norm(grads).item()
    total = max(sum(norms.values()), 1e-30)
    return {f"share_{name}": norm / total for name, norm in norms.items()}


def validate(average, val, judge, cfg, others=None):
    """Means over the validation batches of what the averaged weights restore, a dict of floats.

    others: {name: metric} beside the reward."""
    metrics = {"reward": judge} | (others or {})
    scores, _ = evaluate(average, val, metrics, cfg.steps, cfg.eta)
    return {f"val_{name.split()[0]}": x.nanmean().item() for name, x in scores.items()}


def better(row, best, start, max_drop):
    """Whether the validation scores `row` beat those of `best` and lost at most max_drop dB."""
    kept = all(start[key] - row[key] <= max_drop for key in ("val_psnr_y", "val_psnr"))
    return kept and row["val_reward"] > best["val_reward"]


@dataclass
class Config:
    """Reinforcement learning of a diffusion restorer, weighed against SFT by difficulty."""
    # what
    task: str = option("sr", "degradation, see data.py")
    model: str = option("", "SFT restorer: folder, hub id, name in model.py; empty: shipped one")
    reward: str = option("judge", "judge, see reward.py")
    data: str = option("", "folder of photographs; empty: those inside the packages")
    lq: str = option("", "folder of low-quality images, with --hq: pairs instead of a task")
    hq: str = option("", "folder of their ground truth")
    match: str = option("same", "how names belong: same, prefix, suffix:LQ,HQ or start:LQ,HQ")
    out: str = option("", "folder of the run; empty: runs/TASK-SEED")
    seed: int = option(0, "seed of inputs, sampler and losses", least=0)
    # rollout and reward
    iterations: int = option(12, "rounds of rollout and update", least=1)
    inputs: int = option(128, "lq images per iteration", least=1)
    samples: int = option(1, "restorations of each", least=1)
    pool: int = option(512, "training crops that come back; each has a memory", least=2)
    size: int = option(64, "side of a crop in pixels", least=32)
    steps: int = option(0, "DDIM steps; 0: as the SFT restorer was trained", least=0)
    eta: float = option(-1.0, "stochasticity of the policy; -1: as trained", least=-1)
    views: int = option(8, "turned and mirrored views of an image that are judged", [1, 2, 4, 8])
    reward_mode: str = option("final", "a reward at the end, or at every step", ["final", "step"])
    cap: str = option("hq", "what a reward counts up to: that of hq, or none", ["hq", "none"])
    # loss
    weight: str = option("baseline", "w: baseline, running (see difficulty.py) or fixed:W")
    sft_coef: float = option(3e-2, "lambda, of the SFT loss", least=0)
    kl_coef: float = option(1e-3, "beta, of the KL to the SFT restorer", least=0)
    max_drop: float = option(0.12, "dB of PSNR that a kept average may lose on validation", least=0)
    # running
    trainable: str = option("modulation", "modulation, lora, all, or words in names of weights")
    lr: float = option(6e-4, "peak learning rate of AdamW", least=0)
    micro_batch: int = option(64, "samples in memory at once", least=1)
    dtype: str = option("bfloat16", "arithmetic of the network", ["bfloat16", "float32"])
    resume: bool = option(False, "go on from the last checkpoint in --out")


def check(cfg, restorer, processes):
    """Raises UserError for settings that cannot work together, before anything is written."""
    local = cfg.inputs * cfg.samples // processes
    rules = {
        f"--inputs {cfg.inputs}: more than --pool {cfg.pool}": cfg.inputs <= cfg.pool,
        f"--inputs {cfg.inputs}, --pool {cfg.pool}: must be multiples of {processes} processes":
            cfg.inputs % processes == cfg.pool % processes == 0,
        f"--micro-batch {cfg.micro_batch}: must divide {local}, the samples of a process":
            cfg.micro_batch >= local or local % cfg.micro_batch == 0,
        f"--steps {cfg.steps}: must be at least 2": cfg.steps >= 2,
        f"--eta {cfg.eta}: must be at least 0.01, or there is no policy": cfg.eta >= 0.01,
        "--inputs 1: needs --samples 2, or there is nothing to compare":
            cfg.inputs * cfg.samples > 1,
        "--reward judge2: is the check, never a reward; use judge": cfg.reward != "judge2",
    }
    for rule, holds in rules.items():
        if not holds:
            raise UserError(rule)
    restorer.check_size(cfg.size)
    learned = restorer.defaults["task"]
    task, kinds = cfg.task.replace("sr4", "sr"), tuple(learned.replace("sr4", "sr").split("+"))
    if task not in kinds and (task[:2] == "sr" or not task.startswith(kinds)):
        note(f"--model {cfg.model} has learned {learned}, --task is {cfg.task}")
    with one_line(f"--weight {cfg.weight}", "choose baseline, running or fixed:W"):
        weights(cfg.weight, *torch.ones(3, 2))


def train(cfg, step_loss=step_loss):
    """Runs RL; leaves config, metrics, checkpoint, pictures, scores and model/ in cfg.out.

    step_loss: another estimator in the place of the paper's loss, see examples/.
    """
    from accelerate import Accelerator

    # set-up; on a CPU the accelerator must be told so, or torchrun starts strangers
    accelerator = Accelerator(cpu=pick_device() == "cpu", mixed_precision="no")
    device, main = accelerator.device, accelerator.is_main_process
    degrade, source = get_task(cfg.task), open_split(cfg, "train")
    val_source, test_source = open_split(cfg, "val"), open_split(cfg, "test")
    restorer = load(cfg.model, cfg.task, device, cfg.dtype)
    cfg.steps, cfg.eta = restorer.settle(cfg.steps, cfg.eta)
    check(cfg, restorer, accelerator.num_processes)
    restorer.train_only(cfg.trainable)
    restorer.defaults |= {key: getattr(cfg, key) for key in ("task", "steps", "eta", "size")}
    reference, average = restorer.frozen_copy(), restorer.frozen_copy()
    optimizer = torch.optim.AdamW(restorer.weights(), cfg.lr, BETAS, weight_decay=0.0)
    restorer.net, optimizer = accelerator.prepare(restorer.net, optimizer)
    restorer.train_only(cfg.trainable)  # FSDP has put others in the place of the parameters
    scorer = load_reward(cfg.reward, device)
    judge = views(scorer, cfg.views)

    out = Path(cfg.out or f"runs/{cfg.task}-{cfg.seed}")
    if main:
        new_run(out, cfg.resume)
        print(f"{accelerator.num_processes} process(es), {device}: {cfg}\n{len(source)} images "
              f"to train, {len(val_source)} for validation, {len(test_source)} to test")

    # data: training crops that come back, validation crops
    lq, hq = shared_pool(source, degrade, cfg, accelerator)
    photographs = [source.names, val_source.names]
    val = in_batches(*held_out(val_source, degrade, cfg.size, 64)[:2], device)
    memory = RewardMemory(cfg.pool, cfg.steps if cfg.reward_mode == "step" else 1, MEMORY)

    # what a stopped run left, or what the SFT model makes of the pool
    if cfg.resume:
        state, info = load_checkpoint(out / "checkpoint.safetensors")
        check_resume(cfg, info, RESUMED, photographs)
        for part, name in ((restorer, "weights"), (average, "average"), (memory, "memory")):
            part.load_state_dict(state[name])
        load_optimizer(optimizer, state["optimizer"])
        best, reward_hq, distance_sft = state["best"], state["reward_hq"], state["distance_sft"]
        start, rows, chosen = info["iteration"], info["rows"], info["chosen"]
    else:
        best = {name: x.clone() for name, x in average.state_dict().items()}
        reward_hq = baseline(restorer, judge, memory, lq, hq, cfg, accelerator)
        distance_sft = iqa_gap(memory.mean()[:, -1], reward_hq)
        start, rows, chosen = 0, [{"iteration": 0, **validate(average, val, judge, cfg)}], 0

    bar = tqdm(range(start, cfg.iterations), "rl", cfg.iterations, initial=start, disable=not main)
    for iteration in bar:
        # rollout and reward
        began, gen = time.perf_counter(), generator(cfg.seed, 21, iteration)
        ids = torch.randperm(cfg.pool, generator=gen)[:cfg.inputs].repeat_interleave(cfg.samples)
        batches, rewards = collect(restorer, judge, lq[ids], hq[ids], gen, cfg, accelerator)

        # advantage, from the memory of each input before it sees these rewards
        known = memory.mean()
        gains = counted(rewards, reward_hq[ids], cfg)
        advantage = advantages(gains, known[ids]).expand(-1, cfg.steps)
        memory.push(ids, gains)

        # difficulty, by the memory too, and the weight between RL and SFT
        distance = iqa_gap(known[:, -1], reward_hq)
        weight = weights(cfg.weight, distance[ids], distance_sft, distance)
        for batch in batches:
            batch["advantage"] = advantage[batch["own"]].to(device)
            batch["weight"] = weight[batch["own"]].to(device)

        # update
        rate = learning_rate(iteration, cfg.iterations, cfg.lr, WARMUP, FLOOR)
        optimizer.param_groups[0]["lr"] = rate
        look = (iteration + 1) % LOOK_EVERY == 0 or iteration + 1 == cfg.iterations
        loss_of = functools.partial(step_loss, restorer, reference, cfg)
        logs = update(loss_of, restorer, average, optimizer, batches, lq[ids], gen, accelerator,
                      look)
        del batches, batch  # or two rollouts lie in memory at the next

        # log; every few iterations a look at validation photographs, and a checkpoint
        row = {"iteration": iteration + 1, "reward": rewards[:, -1].nanmean().item(),
               "distance": distance[ids].nanmean().item(), "weight": weight.mean().item(),
               "spread": (gains - known[ids])[:, -1].square().nanmean().sqrt().item()} | logs
        rows.append(row | {"seconds": time.perf_counter() - began})
        bar.set_postfix({key: f"{row[key]:.3f}" for key in ("reward", "distance", "weight")})
        if not look:
            continue
        rows[-1] |= validate(average, val, judge, cfg)
        if better(rows[-1], rows[chosen], rows[0], cfg.max_drop):
            best = {name: x.clone() for name, x in average.state_dict().items()}
            chosen = iteration + 1
        state = {"weights": restorer.state_dict(), "average": average.state_dict(), "best": best,
                 "optimizer": gathered(optimizer.state_dict()["state"]), "reward_hq": reward_hq,
                 "memory": memory.state_dict(), "distance_sft": distance_sft}
        if main:
            save_checkpoint(out / "checkpoint.safetensors", state, {
                "iteration": iteration + 1, "rows": rows, "chosen": chosen, "config": asdict(cfg),
                "photographs": photographs})
            write_json(out / "config.json", asdict(cfg))
            write_rows(out / "metrics.csv", rows)

    # the best average on test photographs
    average.load_state_dict(best)
    if main:
        average.save(out / "model")
        save_curves(out / "curves.png", rows, "iteration")
        print(f"kept the average of iteration {chosen}, by its validation scores" if chosen else
              "nothing beat the SFT restorer within --max-drop: model/ is the SFT restorer")
        report(cfg, reference, average, scorer, test_source, degrade, out)


def report(cfg, reference, average, judge, source, degrade, out):
    """Table, picture and scores.csv: the SFT restorer and the new one on test photographs."""
    lq, hq, names = held_out(source, degrade, cfg.size, 128)
    instruments = dict.fromkeys([cfg.reward, *INSTRUMENTS])
    metrics = load_metrics(instruments, reference.device, {cfg.reward: judge})
    restorers = {"sft": reference, "rl": average}
    batches = in_batches(lq, hq, reference.device)
    rows = compare(restorers, batches, metrics, cfg.steps, cfg.eta)
    write_scores(out / "scores.csv", rows, names)
    print(f"{len(names)} crops of {len(source)} images, 3 sampler seeds")
    print(describe(rows, ["sft", "rl"]))
    save_regions(out / "regions.png", source, degrade, restorers, judge, cfg.steps, cfg.eta)
    print(f"wrote {out}: model/, metrics.csv, curves.png, scores.csv, regions.png")


def main():
    train(parse(Config))


if __name__ == "__main__":
    run_main(main)
