"""Reinforcement learning of a diffusion restorer with an IQA reward, weighed against SFT by difficulty.

Implements "Enhancing Diffusion-based Restoration Models via Difficulty-Adaptive Reinforcement Learning with IQA
Reward" (arXiv 2511.01645). One iteration, i a sample, k a denoising step, theta_old the weights that sampled:

  1 rollout     z_T .. z_0 for each lq with stochastic DDIM; keep z_t, z_{t-1}, log p_old           sample.rollout
  2 reward      r_i = M(x_hat_i), or r_ik = M(decode(x0_hat(z_{t-1}))) for every K-th step          reward.py
  3 advantage   A = (min(r, M(hq_i)) - mean(history_i)) / (std(history_i) + delta), centred         difficulty.py
  4 difficulty  d_i from ground truth, w_i = sigmoid(2 (d_i - m) / s); m, s: median, spread of d    difficulty.py
  5 update      L = mean_i [w_i L_RL,i + (1 - w_i) lambda L_SFT,i] + beta KL(p_theta || p_ref)
                L_RL,i = max(-A rho, -A clip(rho, 1 - eps, 1 + eps)),  rho = exp(log p_theta - log p_old)
                KL     = ||mu_theta - mu_ref||^2 / (2 sigma_t^2), mean over C, H, W
                subject to  drop <= budget: PSNR and SSIM lost against the SFT restorer             (ours alone)
The paper's exact equations are not public: README marks what is the paper's and what is our reconstruction.

Chosen here:
 1. log p is a mean over C, H, W (sample.py), so that clip_range is of the order 1e-3, not 0.2.
 2. A micro-batch is one step k of the same samples that were sampled together: the same arithmetic gives the same
    log p, so rho is exactly 1 before the first optimizer step of an iteration, in any dtype.
 3. Only steps with sigma_t > 0 enter; `updates` optimizer steps share one rollout, each with its own part of the steps.
 4. The reward is capped at the ground truth's own score: to be judged better than a real photograph is no merit. It
    is the mean over --views symmetric views, because most of what one view says among restorations of one input is
    noise (reward.symmetric).
 5. Fidelity is a constraint, not a reward, and each step is a constrained one (ConstrainedAdamW): the loss decides as
    long as a step goes no more than 0.3 of the way to a limit, nine tenths of --fidelity-budget; then the step slides
    along it. The gradients are those of SSIM and of brightness or PSNR (lost_fidelity), on training inputs, through the
    sampling chain. How far a limit is, is measured on validation photographs; the training crops lose more, and with
    --fidelity-on both they count where they do.
 6. --train modulation trains normalizations and time embeddings (Restorer.train_only), a ninth of the small restorer's
    weights: they can sharpen and calm every feature at every noise level, and collect less noise of the gradient.
 7. What is kept is a running average of the weights over the optimizer steps, and of these averages the one with the
    best reward on validation photographs within the budget there; without a budget, the last one.
 8. Every random number belongs to (seed, iteration, sample), so that neither the micro-batch, nor the number of
    processes, nor a resumed run changes it. Processes share out the inputs; rewards, memory and difficulty are
    gathered, gradients are summed once per optimizer step.
 9. --estimator reward puts the judge's own gradient in the place of w L_RL: that of -w min(M(x_hat), M(hq)), through
    one whole chain per input (Clark et al. 2024, DRaFT, arXiv 2309.17400), the same for all `updates` steps. Scores are
    not divided by their spread, so lambda and beta weigh differently. Without the policy's noise all weights can train,
    by small steps (OF_REWARD), but it needs a judge that lets gradients through, and leans towards what fools it.

    python rl.py --task sr                                                              # laptop, about 6 minutes
    python rl.py --task sr --model ldm-sr --reward qrealign-mini --data DIR --size 256 --dtype bfloat16  # one GPU
    accelerate launch --num_processes 8 rl.py --task sr --model ldm-sr --reward qrealign-mini --data DIR --inputs 64
"""

import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F


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


def learning_rate(iteration, total, peak, warmup=8):
    """A linear rise over the first iterations, because Adam's first steps have full length on a gradient that is still
    mostly noise; all on a cosine down to 0.3 of the peak, so that the run settles."""
    return peak * min(1.0, (iteration + 1) / warmup) * (0.65 + 0.35 * math.cos(math.pi * iteration / total))


def kl_to_reference(mean, ref_mean, sigma_t):
    """KL between Gaussians of the same sigma_t (B,) > 0: ||mean - ref_mean||^2 / (2 sigma_t^2), mean over C, H, W;
    means (B, C, h, w) -> (B,)."""
    return ((mean - ref_mean) ** 2).flatten(1).mean(1) / (2 * sigma_t ** 2)


def combined_loss(rl, sft, kl, weight, sft_coef, kl_coef):
    """mean_i [w_i rl_i + (1 - w_i) sft_coef sft_i + kl_coef kl_i]; tensors (B,) -> scalar."""
    return (weight * rl + (1 - weight) * sft_coef * sft + kl_coef * kl).mean()


def fidelity(images, refs):
    """PSNR-Y in dB, 20 SSIM, so that 0.2 dB and 0.01 count the same, and PSNR on RGB in dB; (B, 3, H, W) in [-1, 1]
    twice -> (B, 3)."""
    from reward import psnr, psnr_y, ssim
    return torch.stack([psnr_y(images, refs), 20 * ssim(images, refs), psnr(images, refs)], dim=1)


class ConstrainedAdamW(torch.optim.Optimizer):
    """AdamW whose step keeps quantities, the drops, within a budget: a step of the loss, bent by Lagrange multipliers.

      m, v <- averages of g and g^2 (Loshchilov and Hutter 2019, arXiv 1711.05101),   D = 1 / (sqrt(v) + eps)
      h_j  <- average, as m, of the gradient of drop j,                               E = 1 / (1 / D + rms(1 / D) / 10)
      b_j   = rate (drop_j - budget) / lr - min(0, <h_j, D m>)
      lam  >= 0, of the shortest bend ||sum lam_j h_j|| with sum_k <h_j, E h_k> lam_k >= b_j; at most bound ||m||
      theta <- theta - lr (D m + E sum_j lam_j h_j),                                  ||m||^2 = <m, D m>, of h with E
    The bend is the shortest, in the metric 1 / E, that makes drop_j' <= drop_j - rate (drop_j - budget) to first order:
    a projection of the step, as in constrained policy optimization (Achiam et al. 2017, arXiv 1705.10528, eq. 11), with
    Adam's metric for the Fisher matrix. So `rate` is the share of the distance to a limit that one step may go, or has
    to go back; a drop far from its limit costs nothing. lam needs no scale and no memory: a penalty or dual ascent
    answers late here, and the drop swings about the limit.
    min(0, .): where the loss promises to lower a drop by itself, it is not believed, because h is of training inputs.
    h is kept out of v: it is often longer than g, and would shrink the steps long after it is needed. E is D with a
    floor, rms over the tensor: a weight whose g happens to be near 0 has a huge D in the first steps. m is as small as
    its g, h is not: with D the first step of sr moves one weight by 7600 lr, with E by 62 lr.
    beta2 is 0.98, an average over 25 iterations of two steps: as w falls, the gradient shrinks to a third of its first
    length, and a v that remembers the whole run would shorten all later steps as much.
    Without set_constraint, and as long as the step would not go too far towards a limit, this is torch.optim.AdamW.
    """

    def __init__(self, weights, lr, betas=(0.9, 0.98), eps=1e-8, weight_decay=0.0, rate=0.3, bound=3.0):
        super().__init__(weights, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))
        self.rate, self.bound, self.multiplier, self.constraint = rate, bound, 0.0, None

    def set_constraint(self, gradients, excess):
        """For the next step. gradients: of the drops, one tensor (K, *shape) per weight. excess: drop - budget, K
        floats; K must not change."""
        self.constraint = (gradients, excess)

    @torch.no_grad()
    def step(self):
        group, = self.param_groups
        lr, (beta1, beta2), eps = group["lr"], group["betas"], group["eps"]
        weights = [p for p in group["params"] if p.grad is not None]
        gradients, excess = self.constraint or ([None] * len(group["params"]), [])
        gradient_of, count = dict(zip(group["params"], gradients)), len(excess)

        def directions(p):  # m and the h without the bias of their zero start, and these times D or E: (1 + K, numel)
            state = self.state[p]
            step = state["step"].item()
            both = torch.cat([state["m"][None], state["h"]]) if count else state["m"][None]
            both = both.flatten(1) / (1 - beta1 ** step)
            root = (state["v"] / (1 - beta2 ** step)).sqrt().flatten() + eps
            moves = both / (root + 0.1 * root.square().mean().sqrt())
            moves[0] = both[0] / root
            return both, moves
        products = torch.zeros(1 + count, 1 + count, device=weights[0].device)  # <row, D or E column> of m, h_1 .. h_K
        for p in weights:
            state = self.state[p]
            if not state:
                state |= {key: torch.zeros_like(p) for key in ("m", "v")} | {"step": torch.zeros(())}
            state["step"] += 1
            state["m"].lerp_(p.grad, 1 - beta1), state["v"].lerp_(p.grad ** 2, 1 - beta2)
            if count:
                state.setdefault("h", torch.zeros_like(gradient_of[p])).lerp_(gradient_of[p], 1 - beta1)
                both, moves = directions(p)
                products += both @ moves.T
        lam = [0.0] * count
        if count:
            (mm, *_), *rows = products.tolist()
            hm, hh = [row[0] for row in rows], [row[1:] for row in rows]
            wanted = [self.rate * e / lr - min(x, 0.0) for e, x in zip(excess, hm)]
            for _ in range(100):  # Hildreth's method (1957): each multiplier in turn, the others held
                for j in range(count):
                    others = sum(hh[j][k] * lam[k] for k in range(count) if k != j)
                    lam[j] = max(0.0, (wanted[j] - others) / max(hh[j][j], 1e-30))
            length = math.sqrt(max(0.0, sum(a * b * hh[j][k] for j, a in enumerate(lam) for k, b in enumerate(lam))))
            self.multiplier = length / math.sqrt(max(mm, 1e-30))  # length of the bend, relative to the step's
            if self.multiplier > self.bound:
                lam, self.multiplier = [x * self.bound / self.multiplier for x in lam], self.bound
        factors = torch.tensor([1.0, *lam], device=weights[0].device)
        for p in weights:
            _, moves = directions(p)  # again: to keep them all would cost more copies of the weights
            p.mul_(1 - lr * group["weight_decay"]).sub_(lr * (factors @ moves).view_as(p))
        self.constraint = None


def better(row, best, sft, limits):
    """Whether the averaged weights of `row` replace those of `best`: rows of validation scores, `sft` the SFT model's.

    They must have the higher reward, and have lost at most limits[column] of each column against `sft`. limits empty:
    no constraint, the latest weights are taken, not the best."""
    return not limits or (row["val_reward"] > best["val_reward"]
                          and all(sft[column] - row[column] <= limit for column, limit in limits.items()))


@dataclass
class Config:
    # what
    task: Annotated[str, "degradation, a key of data.TASKS; empty: that of --dataset, or sr"] = ""
    model: Annotated[str, "SFT restorer to start from: folder, hub id or name in model.py; empty: weights/TASK"] = ""
    revision: Annotated[str, "branch, tag or commit of a hub id"] = ""
    reward: Annotated[str, "a name or sum of names of reward.py"] = "judge"
    data: Annotated[str, "folder of photographs; empty: those inside the packages"] = ""
    lq: Annotated[str, "folder of low-quality images, with --hq: pairs instead of a task"] = ""
    hq: Annotated[str, "folder of their ground truth"] = ""
    match: Annotated[str, "same, prefix, rain, suffix:LQ,HQ or start:LQ,HQ: how names of lq and hq belong"] = "same"
    dataset: Annotated[str, "a key of data.DATASETS, instead of --lq, --hq and --match"] = ""
    root: Annotated[str, "folder of --dataset"] = "."
    out: Annotated[str, "folder of the run; empty: runs/TASK"] = ""
    seed: Annotated[int, "seed of inputs, sampler and losses"] = 0
    # rollout
    iterations: Annotated[int, "rounds of rollout and update"] = 40
    inputs: Annotated[int, "lq images per iteration"] = 16
    samples_per_input: Annotated[int, "restorations of each"] = 4
    pool: Annotated[int, "training inputs that recur; the memory keeps a history of each"] = 256
    size: Annotated[int, "side of a training crop in pixels"] = 64
    steps: Annotated[int, "DDIM steps; 0: as the SFT restorer was trained"] = 0
    eta: Annotated[float, "stochasticity, > 0; -1: as the SFT restorer was trained"] = -1.0
    views: Annotated[int, "symmetric views of an image, 1 to 8, whose rewards are averaged"] = 8
    memory: Annotated[int, "latest rewards of an input that its memory keeps"] = 16
    # update
    train: Annotated[str, "weights that train: modulation (norms, time embeddings, see model.py) or all"] = "modulation"
    updates: Annotated[int, "optimizer steps per rollout"] = 2
    train_steps: Annotated[int, "denoising steps that the update trains, the noisiest first; 0: all"] = 0
    micro_batch: Annotated[int, "samples in memory at once"] = 64
    lr: Annotated[float, "peak learning rate of AdamW, see learning_rate"] = 4e-4
    estimator: Annotated[str, "policy, or reward: the judge's own gradient, with other defaults (README)"] = "policy"
    clip_range: Annotated[float, "of the ratio of mean log-densities"] = 2e-3
    kl_coef: Annotated[float, "beta, weight of the KL to the SFT restorer"] = 1e-5
    average: Annotated[float, "decay per optimizer step of the weight average that is saved; 0: the last weights"] = 0.9
    # RL against SFT
    weight: Annotated[str, "relative to the SFT model: baseline, the present one: running; or fixed:W"] = "baseline"
    distance: Annotated[str, "of difficulty: iqa_gap, mse or ssim"] = "iqa_gap"
    sft_coef: Annotated[float, "lambda, weight of the SFT loss"] = 1e-5
    fidelity_budget: Annotated[float, "dB of PSNR-Y (reward: also RGB) and 20 SSIM that RL may cost; -1: off"] = 0.2
    fidelity_on: Annotated[str, "where it is measured: val, or both: the worse of val and training inputs"] = "val"
    reward_mode: Annotated[str, "final, step, or step:K (every K-th denoising step is judged)"] = "final"
    # running
    workers: Annotated[int, "processes that decode pairs; 0: none"] = 0
    resume: Annotated[bool, "go on from the last checkpoint in --out"] = False
    save_every: Annotated[int, "iterations between checkpoints and between looks at validation images"] = 5
    device: Annotated[str, "auto, cpu, cuda, cuda:1, mps"] = "auto"
    reward_device: Annotated[str, "device of the reward; empty: as --device"] = ""
    dtype: Annotated[str, "bfloat16 or float32: arithmetic, and weights of frozen parts"] = "bfloat16"
    gradient_checkpointing: Annotated[bool, "compute activations again instead of keeping them"] = False
    trust_remote_code: Annotated[bool, "run Python code that a hub id of a reward brings along"] = False


# The command line's defaults with --estimator reward: with little noise in the gradient all weights can train, by small
# steps; the score of one restoration per input is enough, because nothing is compared. All weights can also learn the
# training photographs by heart, so these count for the budget. It is small because it need not be large, and because
# what deblur loses differs from one validation photograph to the next (its mean over the seven has an error of 0.12 dB)
OF_REWARD = dict(train="all", updates=1, lr=6e-5, inputs=24, samples_per_input=1, iterations=60, fidelity_on="both",
                 fidelity_budget=0.05)


def check(cfg):
    """Raises UserError for settings that cannot work, before anything is loaded or written."""
    from difficulty import Difficulty
    from reward import UNSAFE, terms
    from utils import UserError
    for name in ("iterations", "inputs", "samples_per_input", "pool", "updates", "micro_batch", "save_every", "size"):
        if getattr(cfg, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(cfg, name)}: must be at least 1")
    if not 1 <= cfg.views <= 8:
        raise UserError(f"--views {cfg.views}: must be from 1 to 8, the symmetries of a square")
    if cfg.memory < 4:
        raise UserError(f"--memory {cfg.memory}: must be at least 4, the least history that an advantage uses")
    if cfg.train_steps < 0 or not 0 <= cfg.average < 1:
        raise UserError(f"--train-steps {cfg.train_steps}, --average {cfg.average}: must be at least 0, the average "
                        "below 1")
    if cfg.workers < 0 or not (cfg.lr > 0 and cfg.clip_range > 0 and cfg.sft_coef >= 0 and cfg.kl_coef >= 0):
        raise UserError(f"--lr {cfg.lr}, --clip-range {cfg.clip_range}: must be above 0; --sft-coef {cfg.sft_coef}, "
                        f"--kl-coef {cfg.kl_coef}, --workers {cfg.workers}: at least 0")
    if cfg.inputs > cfg.pool:
        raise UserError(f"--inputs {cfg.inputs}: more than --pool {cfg.pool}; enlarge the pool")
    if cfg.eta <= 0 and cfg.eta != -1:
        raise UserError(f"--eta {cfg.eta}: a deterministic sampler has no log-probabilities to learn from; use 1")
    for name in (term.partition("?")[0] for _, term in terms(cfg.reward)):
        if name.partition(":")[0] == "judge2":
            raise UserError("--reward judge2: it is the independent check and never a reward; use judge")
        if name in UNSAFE:
            raise UserError(f"--reward {name}: no reward, {UNSAFE[name]}; choose another")
    if cfg.dtype == "float16":
        raise UserError("--dtype float16: small gradients vanish in it; train with bfloat16 or float32")
    if cfg.train not in ("modulation", "all"):
        raise UserError(f"--train {cfg.train}: unknown; choose modulation or all")
    if cfg.fidelity_on not in ("val", "both"):
        raise UserError(f"--fidelity-on {cfg.fidelity_on}: unknown; choose val or both")
    if cfg.estimator not in ("policy", "reward"):
        raise UserError(f"--estimator {cfg.estimator}: unknown; choose policy or reward")
    if cfg.estimator == "reward" and cfg.reward_mode != "final":
        raise UserError(f"--estimator reward: judges the final image only, not --reward-mode {cfg.reward_mode}")
    if cfg.distance not in ("iqa_gap", "mse", "ssim"):
        raise UserError(f"--distance {cfg.distance}: unknown; choose iqa_gap, mse or ssim")
    judged_every(cfg.reward_mode)
    try:
        Difficulty(cfg.weight)
    except ValueError as error:
        raise UserError(f"--weight: {error}") from None


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
    rewards = {k: judge(image, hq).to(lq.device) for k, image in images.items()}
    image = images[len(trajectory.t) - 1]
    return {"trajectory": trajectory, "rewards": rewards, "image": image, "fidelity": fidelity(image, hq), "lq": lq,
            "hq": hq, "seconds_rollout": rolled - start, "seconds_reward": time.perf_counter() - rolled}


def distances(batch, reward_hq, kind):
    """Distance of each sample of `collect` to its ground truth, (B,); reward_hq (B,) is used by iqa_gap."""
    from difficulty import iqa_gap, mse, ssim_distance
    if kind == "iqa_gap":
        return iqa_gap(batch["rewards"][max(batch["rewards"])], reward_hq)
    return mse(batch["image"], batch["hq"]) if kind == "mse" else ssim_distance(batch["fidelity"][:, 1] / 20)


def step_advantages(rewards, keys, cap, memory):
    """Advantages (N, B) of every denoising step from rewards {step: (B,)}; a step that was not judged takes the next
    judged one's. cap (B,): the rewards of the ground truths."""
    from difficulty import advantages
    result = [None] * (max(rewards) + 1)  # the last step is always judged
    for k in range(len(result) - 1, -1, -1):
        if k in rewards:
            own = [f"{key}:{k}" for key in keys] if len(rewards) > 1 else keys
            latest = advantages(torch.minimum(rewards[k], cap), own, memory)
        result[k] = latest
    return torch.stack(result)


def step_loss(restorer, reference, batch, k, share, cfg, noise):
    """The combined loss of step k of a batch -> (loss, info). noise: a generator for each input of the batch.

    share: of the SFT and KL terms in it, which need no more than one step of each optimizer step: the number of steps
    for that one, 0 for the others, the same expectation at a fraction of the cost. For the same reason the samples of
    an input share one draw of the SFT loss. A term whose coefficient is 0 costs no network pass.
    """
    from sample import repeat_step
    from sft import sft_loss
    path, lq, hq, repeats = batch["trajectory"], batch["lq"], batch["hq"], cfg.samples_per_input
    step = repeat_step(restorer, path, k, cfg.eta)
    rl, info = policy_loss(step.log_prob, path.log_prob[k], batch["advantage"][k], cfg.clip_range)
    sft = kl = torch.zeros_like(rl)
    if share * cfg.sft_coef > 0 and (batch["weight"] < 1).any():
        sft = sft_loss(restorer, lq[::repeats], hq[::repeats], noise).repeat_interleave(repeats)
        info["sft_loss"] = sft.mean().detach()
    if share * cfg.kl_coef > 0:
        with torch.no_grad():
            ref = repeat_step(reference, path, k, cfg.eta)
        kl = kl_to_reference(step.mean, ref.mean, step.sigma_t)
        info["kl"] = kl.mean().detach()
    loss = combined_loss(rl, sft, kl, batch["weight"], share * cfg.sft_coef, share * cfg.kl_coef)
    return loss, info | {"rl_loss": rl.mean().detach(), "loss": loss.detach()}


def lost_fidelity(images, refs, estimator):
    """What the constraint's gradients are taken of, up to constants; (B, 3, H, W) in [-1, 1] twice -> K tensors (B,).

    estimator reward: minus PSNR-Y, minus 20 SSIM and minus PSNR on RGB, each for its own limit: what Y does not see,
    a judge may paint over.
    policy: one for both limits, minus 20 SSIM and minus the part of PSNR-Y that lies in the means of 16 x 16 pixels.
    Where brightness is sure SSIM restores PSNR as well (their gradients have a cosine of 0.93 for sr, 64 inputs) and
    takes less of the reward, which prefers anything to the blur that PSNR asks for and that the noise of the policy
    gradient brings anyway. SSIM hardly sees a wrong brightness, though, and block means hold no blur. As these means
    are orthogonal to the rest of the error, the gradient of PSNR splits the same way: 10 / ln 10 * (mean of squared
    means) / (mean squared error), of which only the numerator is differentiated. Blocks that the border cuts are
    averaged over what is left of them, but weigh as whole ones."""
    from reward import luma, ssim
    if estimator == "reward":
        return list(-fidelity(images, refs).T)
    error = luma(images) - luma(refs)
    coarse = F.avg_pool2d(error, 16, ceil_mode=True).square().flatten(1).mean(1)
    of_psnr = 10 / math.log(10) * coarse / error.square().flatten(1).mean(1).detach().clamp(min=1e-10)
    return [of_psnr - 20 * ssim(images, refs)]


def chain_gradient(restorer, lq, loss, cfg, noise):
    """Gradients of losses of restorations, means over inputs, through whole chains of fresh noise, one for each input:
    a list of one tensor (K, *shape) per weight.

    loss(images, part): (b, 3, H, W) that belong to lq[part] -> K tensors (b,). Inputs go through in parts, because a
    chain keeps all its steps in memory."""
    from torch.utils.checkpoint import checkpoint

    from sample import rollout
    weights, count, gradients = restorer.weights(), max(1, cfg.micro_batch // cfg.steps), []

    def predict(*inputs):
        return checkpoint(restorer.predict, *inputs, use_reentrant=False)
    for i in range(0, len(lq), count):
        own = slice(i, i + count)
        z = rollout(restorer, lq[own], cfg.steps, cfg.eta, noise[own], keep=False, grad=True,
                    predict=predict if cfg.gradient_checkpointing else None).z[-1]
        losses = loss(restorer.decode(z, lq[own]), own)
        gradients = gradients or [torch.zeros(len(losses), *p.shape, device=p.device) for p in weights]
        for k, x in enumerate(losses):  # added one by one: each is a copy of all weights
            torch._foreach_add_([g[k] for g in gradients], torch.autograd.grad(
                x.sum() / len(lq), weights, retain_graph=k + 1 < len(losses), materialize_grads=True))
    return gradients


def summed(gradients):
    """The gradients of all processes added up; one message, because many small ones are slow."""
    from accelerate import PartialState
    from accelerate.utils import reduce
    if PartialState().num_processes == 1:
        return gradients
    flat = reduce(torch.cat([g.flatten() for g in gradients]), "sum")
    return [part.view_as(g) for part, g in zip(flat.split([g.numel() for g in gradients]), gradients)]


def differentiable_reward(scorer, cfg, device):
    """For --estimator reward: the mean over views of a reward's `differentiable`, images (B, 3, H, W) -> (B,), whose
    activations are computed again view by view, so that memory holds those of one. Raises UserError if there is none,
    or if no gradient comes through."""
    from torch.utils.checkpoint import checkpoint

    from reward import symmetric
    from utils import UserError
    if not hasattr(scorer, "differentiable"):
        raise UserError(f"--estimator reward: {cfg.reward} has no gradient; use an MLLM judge that scores by level "
                        "words, or --estimator policy")
    scorer.model.requires_grad_(False)
    probe = torch.zeros(1, 3, cfg.size, cfg.size, device=device, requires_grad=True)
    if not scorer.differentiable(probe).requires_grad:
        raise UserError(f"--estimator reward: the image processor of {cfg.reward} lets no gradient through; use "
                        "--estimator policy")
    return symmetric(lambda images, refs=None: checkpoint(scorer.differentiable, images, use_reentrant=False),
                     cfg.views)


def update(restorer, reference, average, optimizer, batches, total, excess, cfg, noise, differentiable=None):
    """`cfg.updates` optimizer steps on collected batches. Returns the means of what was logged, the ratio error first.

    Each optimizer step gets its own part of the denoising steps; a micro-batch is one step in one batch. The gradients
    of the fidelity and of a judge, like the drop, are those of the weights before them.
    batches: of `collect`, with `advantage` (N, B), `weight` (B,) and `cap` (B,), the rewards of the ground truths.
    total: samples in the batches of all processes. excess: drops - limit, a float for each of lost_fidelity, or None
    without a budget. differentiable: with --estimator reward, the reward that lets gradients through; advantages are
    then 0, and a step is repeated for SFT, KL and ratio_error only.
    noise(*stream, inputs=False): the generator of a purpose, or a list of them, one for each input of this process.
    """
    usable = batches[0]["trajectory"].stochastic.nonzero().flatten().cpu()[:cfg.train_steps or None]
    drawn = usable[torch.randperm(len(usable), generator=noise(0))]
    parts, repeats, logs = drawn.tensor_split(min(cfg.updates, len(drawn))), cfg.samples_per_input, []
    lq, hq = (torch.cat([batch[key] for batch in batches])[::repeats] for key in ("lq", "hq"))

    cap, weight = (torch.cat([batch[key] for batch in batches]).view(-1, repeats).mean(1) for key in ("cap", "weight"))

    def losses(images, part):  # of the same restorations: first the judge's, then the drops
        found = [-weight[part] * torch.minimum(differentiable(images), cap[part])] if differentiable else []
        return found + (lost_fidelity(images, hq[part], cfg.estimator) if excess is not None else [])
    chains = []
    if differentiable or excess is not None:
        chains = chain_gradient(restorer, lq, losses, cfg, noise(2, inputs=True))
        torch._foreach_div_(chains, total / repeats / len(lq))  # the mean over the inputs of all processes
        chains = summed(chains)
    sound = all(gradient.isfinite().all() for gradient in chains)
    for index, part in enumerate(parts):
        optimizer.zero_grad()
        own = noise(1, index, inputs=True)
        for batch in batches:
            mine, own = own[:len(batch["lq"]) // repeats], own[len(batch["lq"]) // repeats:]
            for k in part[:1 if differentiable else None].tolist():  # the first also has the SFT and KL terms
                loss, info = step_loss(restorer, reference, batch, k, len(part) * (k == part[0]), cfg, mine)
                (loss * len(batch["lq"]) / total / len(part)).backward()
                logs.append({key: value.item() for key, value in info.items()})
        weights = restorer.weights()
        gradients = summed([torch.zeros_like(p) if p.grad is None else p.grad for p in weights])
        if differentiable:
            torch._foreach_add_(gradients, [g[0] for g in chains])
        for p, gradient in zip(weights, gradients):
            p.grad = gradient
        grad_norm = torch.nn.utils.clip_grad_norm_(weights, 1.0)
        if not (sound and torch.isfinite(grad_norm)):
            from utils import UserError
            raise UserError("the gradient is not finite; lower --lr or use --dtype float32; --resume goes on from "
                            "the last checkpoint")
        logs[-1]["grad_norm"] = grad_norm.item()
        if excess is not None:
            optimizer.set_constraint([g[-len(excess):] for g in chains], excess)
        optimizer.step()
        if excess is not None:
            logs[-1]["constraint"] = optimizer.multiplier
        with torch.no_grad():
            torch._foreach_lerp_(average.weights(), restorer.weights(), 1 - cfg.average)
    keys = dict.fromkeys(key for log in logs for key in log)
    means = {key: sum(log[key] for log in logs if key in log) / sum(key in log for log in logs) for key in keys}
    return means | {"ratio_error": logs[0]["ratio_error"]}


# ---- processes: each holds its own share of the samples, all hold the memory and the difficulty of all ----

def own_share(x, world):
    """The part of x (a tensor) that belongs to this process: contiguous and of equal size."""
    return x.tensor_split(world.num_processes)[world.process_index]


def everyone(parts):
    """The tensors of the batches of this process, then those of the other processes, in the order of the samples."""
    from accelerate.utils import gather
    return gather(torch.cat(parts).contiguous())


def measure_scale(scorer, restorer, pool, cfg, world):
    """Fixes the mean and spread of each term of a sum of rewards, from the SFT restorations of the pool and from its
    ground truths, over all processes: what remembers rewards needs one scale from first to last."""
    from accelerate.utils import reduce

    from sample import rollout
    from utils import generator
    device = restorer.device
    for part in own_share(torch.arange(cfg.pool), world).split(cfg.micro_batch):
        own, (lq, hq) = [generator(cfg.seed, 25, i) for i in part.tolist()], (x[part].to(device) for x in pool)
        z = rollout(restorer, lq, cfg.steps, cfg.eta, own, keep=False).z[-1]
        with torch.no_grad():
            scorer.observe(restorer.decode(z, lq), hq), scorer.observe(hq, hq)
    scorer.update(lambda pending: reduce(pending.to(device), "sum") if world.num_processes > 1 else pending)
    scorer.freeze()


def measure_pool(restorer, judge, pool, cfg, world, memory, difficulty):
    """What the SFT restorer does on each training input, from two restorations of each: first memory and distances.

    Returns the rewards of the ground truths, (pool,), and the `fidelity` of the restorations, (pool, 3)."""
    from tqdm import tqdm

    from utils import generator
    repeats, batches = 2, []
    ids = torch.arange(cfg.pool).repeat_interleave(repeats)
    for part in tqdm(own_share(torch.arange(len(ids)), world).split(max(repeats, cfg.micro_batch // repeats * repeats)),
                     desc="baseline", unit="batch", disable=not world.is_main_process):
        own = [generator(cfg.seed, 23, i) for i in part.tolist()]
        batch = collect(restorer, judge, *(x[ids[part]].to(restorer.device) for x in pool), cfg, own)
        cap = judge(batch["hq"][::repeats], batch["hq"][::repeats]).to(restorer.device).repeat_interleave(repeats)
        batches.append({"rewards": batch["rewards"], "cap": cap, "distance": distances(batch, cap, cfg.distance),
                        "fidelity": batch["fidelity"]})
    cap, distance, found = (everyone([b[key] for b in batches]) for key in ("cap", "distance", "fidelity"))
    keys = [str(i) for i in ids.tolist()]
    difficulty.observe(keys, distance)
    difficulty.set_anchor()
    step_advantages({k: everyone([b["rewards"][k] for b in batches]) for k in batches[0]["rewards"]}, keys, cap, memory)
    return cap[::repeats], found.unflatten(0, (-1, repeats)).mean(1)


def train(cfg):
    """Runs the RL stage; see the top of this file. Returns the summary, also written to cfg.out/summary.json."""
    from types import SimpleNamespace

    from accelerate import PartialState
    from tqdm import tqdm

    from data import Pairs, get_task, open_split, pair_crops, random_crops
    from difficulty import Difficulty, RewardMemory
    from eval import CROPS, evaluate, held_out, save_curves
    from model import load
    from reward import load as load_reward
    from reward import symmetric
    from utils import (UserError, check_resume, generator, load_checkpoint, pick_device, save_checkpoint, write_json,
                       write_rows)

    # set-up
    check(cfg)
    world = PartialState(cpu=cfg.device == "cpu")
    device = str(world.device) if world.num_processes > 1 else pick_device(cfg.device)
    for name in ("inputs", "pool"):
        if getattr(cfg, name) % world.num_processes:
            raise UserError(f"--{name} {getattr(cfg, name)}: must be a multiple of the {world.num_processes} processes")
    # all three splits are opened here: a missing photograph ends the run now, not at its final table
    sources = {split: open_split(cfg, split) for split in ("train", "val", "test")}
    out, degrade = Path(cfg.out or f"runs/{cfg.task}"), get_task(cfg.task)
    restorer = load(cfg.model, device, cfg.dtype, cfg.task, cfg.revision or None)
    cfg.steps, cfg.eta = cfg.steps or restorer.defaults["steps"], cfg.eta if cfg.eta > 0 else restorer.defaults["eta"]
    times = restorer.scheduler.config.num_train_timesteps
    if cfg.steps < 2 or times % cfg.steps or cfg.eta <= 0:
        raise UserError(f"--steps {cfg.steps}, --eta {cfg.eta}: steps must divide {times} and be at least 2, eta be "
                        "above 0, else a step is missing, of nearly no noise, or has no log-probability")
    if cfg.size % restorer.multiple:
        raise UserError(f"--size {cfg.size}: must be a multiple of {restorer.multiple}")
    restorer.defaults |= {"task": cfg.task, "steps": cfg.steps, "eta": cfg.eta}
    restorer.train_only(cfg.train)
    if cfg.gradient_checkpointing:
        restorer.checkpoint_gradients()
    reference, average = restorer.frozen_copy(), restorer.frozen_copy()
    optimizer = ConstrainedAdamW(restorer.weights(), lr=cfg.lr)
    best = {name: value.cpu().clone() for name, value in reference.state_dict().items()}
    reward_device = pick_device(cfg.reward_device, "--reward-device") if cfg.reward_device else device
    scorer = load_reward(cfg.reward, reward_device, trust_remote_code=cfg.trust_remote_code)
    judge = symmetric(scorer, cfg.views)
    differentiable = differentiable_reward(scorer, cfg, device) if cfg.estimator == "reward" else None
    memory, difficulty = RewardMemory(cfg.memory), Difficulty(cfg.weight)
    fixed = generator(cfg.seed, 20)
    if isinstance(sources["train"], Pairs):
        lq, hq = pair_crops(sources["train"], cfg.pool, cfg.size, fixed, workers=cfg.workers)
        severity = torch.zeros(cfg.pool)  # unknown
    else:
        hq = random_crops(sources["train"], cfg.pool, cfg.size, fixed)
        lq, severity = degrade(hq, fixed)
    pool = (lq, hq)  # not on the device: a pool of large crops would fill it
    modules = {"net": restorer, "average": average,
               "best": SimpleNamespace(state_dict=lambda: best, load_state_dict=best.update)}
    test = held_out(cfg.task, sources["test"], CROPS, cfg.size, "cpu", cfg.workers)[:2]
    lq, hq = held_out(cfg.task, sources["val"], 64, cfg.size, device, cfg.workers)[:2]
    if len(lq) < world.num_processes:
        raise UserError(f"--data: only {len(lq)} validation crops for {world.num_processes} processes; add photographs "
                        "or lower --size")
    watched = own_share(torch.arange(len(lq) // world.num_processes * world.num_processes), world)
    watchers = {name: load_reward(name, device) for name in ("judge", "judge2") if name != cfg.reward}
    watchers["reward"] = scorer  # loaded once when it is the judge itself

    def scores_on_validation(candidate, judges):  # of this process's crops
        return evaluate(candidate, lq[watched], hq[watched], judges, cfg.steps, cfg.eta, [0],
                        min(32, cfg.micro_batch), int(watched[0]))[0]

    def look(candidate):
        own = scores_on_validation(candidate, watchers)
        scores = {key: everyone([value.to(device)]).nanmean().item() for key, value in own.items()}
        scores.setdefault("judge", scores["reward"])
        return {f"val_{key}": value for key, value in scores.items()}

    def fidelity_on_validation(candidate):  # (3,), asked for in every iteration
        own = scores_on_validation(candidate, {})
        own = torch.stack([own["psnr_y"], 20 * own["ssim"], own["psnr"]], dim=1)
        return everyone([own.to(device)]).mean(0).cpu()

    start, rows, chosen_at, lost = 0, [], 0, torch.zeros(3)  # lost: running average of the training inputs' drop
    if cfg.resume:
        if not (out / "checkpoint.safetensors").exists():
            raise UserError(f"--resume: no checkpoint in {out}; start without it")
        info = load_checkpoint(out / "checkpoint.safetensors", modules, optimizer, {})
        free = ("iterations", "out", "resume", "save_every", "device", "reward_device", "micro_batch", "lr", "dtype",
                "gradient_checkpointing", "workers")
        if "lost" not in info:
            raise UserError(f"--resume: {out}/checkpoint.safetensors is of an older version of rl.py; start without it")
        check_resume(cfg, info["config"], free)
        start, rows, chosen_at = info["iteration"], info["rows"], info["chosen_at"]
        reward_hq, fidelity_pool = (torch.tensor(info[key], device=device) for key in ("reward_hq", "fidelity_pool"))
        lost = torch.tensor(info["lost"])
        memory.load_state_dict(info["memory"]), difficulty.load_state_dict(info["difficulty"])
        if info["scorer"]:
            scorer.load_state_dict(info["scorer"])
    else:
        if world.is_main_process:
            write_json(out / "config.json", asdict(cfg))
            (out / "summary.json").unlink(missing_ok=True)  # an earlier run's: eval.py would take it for this one's
            print("   ".join(f"{key} {value}" for key, value in asdict(cfg).items() if value != ""))
        if hasattr(scorer, "freeze"):
            measure_scale(scorer, restorer, pool, cfg, world)
        reward_hq, fidelity_pool = measure_pool(restorer, judge, pool, cfg, world, memory, difficulty)
        distance = sum(difficulty.latest.values()) / len(difficulty.latest)
        rows = [{"iteration": 0, "distance": distance} | look(average)]
        if world.is_main_process and len(severity.unique()) > 1:
            from scipy.stats import spearmanr
            found = {"mse": -fidelity_pool[:, 2], "ssim": -fidelity_pool[:, 1]}  # negative PSNR ranks as mse does
            found[cfg.distance] = torch.tensor([difficulty.latest[str(i)] for i in range(cfg.pool)])
            print("rank correlation of distance and severity, training inputs: " + "   ".join(
                f"{name} {spearmanr(x.cpu(), severity).statistic:.2f}" for name, x in found.items()))

    constrained, repeats = cfg.fidelity_budget >= 0, cfg.samples_per_input
    limits = {"val_psnr_y": cfg.fidelity_budget, "val_ssim": cfg.fidelity_budget / 20} if constrained else {}
    if limits and differentiable:
        limits["val_psnr"] = cfg.fidelity_budget
    fidelity_sft = fidelity_on_validation(reference) if constrained else None
    for iteration in (bar := tqdm(range(start, cfg.iterations), initial=start, total=cfg.iterations, desc="rl",
                                  disable=not world.is_main_process)):
        # rollout and reward, in batches that fit into memory
        order = torch.randperm(cfg.pool, generator=generator(cfg.seed, 21, iteration))[:cfg.inputs]
        ids, places = order.repeat_interleave(repeats), own_share(torch.arange(cfg.inputs * repeats), world)
        keys, cap, batches = [str(i) for i in ids.tolist()], reward_hq[ids.to(device)], []
        for part in places.split(max(repeats, cfg.micro_batch // repeats * repeats)):
            own = [generator(cfg.seed, 22, iteration, i) for i in part.tolist()]
            batches.append(collect(restorer, judge, *(x[ids[part]].to(device) for x in pool), cfg, own))

        # advantage from the memory of each input, over all processes
        rewards = {k: everyone([b["rewards"][k] for b in batches]) for k in batches[0]["rewards"]}
        advantage = step_advantages(rewards, keys, cap, memory)

        # difficulty, and the weight between RL and SFT
        sizes = [len(b["lq"]) for b in batches]
        caps = own_share(cap, world).split(sizes)
        distance = everyone([distances(b, c, cfg.distance) for b, c in zip(batches, caps)])
        difficulty.observe(keys, distance)
        weight = difficulty.weight(distance)
        if differentiable:
            advantage = torch.zeros_like(advantage)
        own = (own_share(x, world).split(sizes) for x in (advantage.T, weight))
        for batch, c, a, w in zip(batches, caps, *own):
            batch |= {"advantage": a.T, "weight": w, "cap": c}

        # update
        def noise(*stream, inputs=False):
            if not inputs:
                return generator(cfg.seed, 24, iteration, *stream)
            own = own_share(torch.arange(cfg.inputs), world).tolist()
            return [generator(cfg.seed, 24, iteration, *stream, i) for i in own]
        optimizer.param_groups[0]["lr"] = learning_rate(iteration, cfg.iterations, cfg.lr)
        began = time.perf_counter()
        found = everyone([b["fidelity"] for b in batches])
        drop = fidelity_sft - fidelity_on_validation(restorer) if constrained else None
        if constrained and cfg.fidelity_on == "both":  # averaged: 24 inputs of dehaze say no more than +-1 dB
            lost.lerp_((fidelity_pool[ids.to(device)] - found).mean(0).cpu(), 0.2)
            drop = torch.maximum(drop, lost)
        # aims a little inside the budget: the drop comes to rest at its limit, and only averages within the budget are
        # kept
        excess = None if drop is None else [x - 0.9 * cfg.fidelity_budget for x in (
            drop.tolist() if differentiable else [drop[:2].max().item()])]
        losses = update(restorer, reference, average, optimizer, batches, len(ids), excess, cfg, noise, differentiable)

        # log, and keep the best average so far
        reward = rewards[max(rewards)]
        row = {"iteration": iteration + 1, "reward": reward.nanmean().item(), "distance": distance.nanmean().item(),
               "weight": weight.mean().item()}
        psnr, ssim, _ = found.mean(0).tolist()
        row |= {"psnr_y": psnr, "ssim": ssim / 20} | losses
        if drop is not None:
            row |= {"psnr_drop": drop[0].item(), "ssim_drop": drop[1].item() / 20, "psnr_rgb_drop": drop[2].item()}
        row |= {key: sum(b[key] for b in batches) for key in ("seconds_rollout", "seconds_reward")}
        row["seconds_update"] = time.perf_counter() - began
        rows.append(row)
        bar.set_postfix({k: f"{row[k]:.3f}" for k in ("reward", "distance", "weight", "psnr_drop") if k in row})
        if (iteration + 1) % cfg.save_every == 0 or iteration + 1 == cfg.iterations:
            row |= look(average)
            if better(row, rows[chosen_at], rows[0], limits):
                best.update({name: value.cpu().clone() for name, value in average.state_dict().items()})
                chosen_at = iteration + 1
            if world.is_main_process:
                save_checkpoint(out / "checkpoint.safetensors", modules, optimizer, {}, {
                    "iteration": iteration + 1, "rows": rows, "reward_hq": reward_hq.tolist(), "chosen_at": chosen_at,
                    "fidelity_pool": fidelity_pool.tolist(), "config": asdict(cfg), "lost": lost.tolist(),
                    "memory": memory.state_dict(), "difficulty": difficulty.state_dict(),
                    "scorer": scorer.state_dict() if hasattr(scorer, "freeze") else None})
                write_rows(out / "metrics.csv", rows)
                save_curves(out / "curves.png", rows, "iteration", [k for k in rows[-1] if k != "iteration"])

    if not world.is_main_process:
        return None
    average.load_state_dict(best)
    average.save(out / "model")
    print(f"kept the weights of iteration {chosen_at}, " + (
        "the best on validation photographs" if constrained else "the last, as there is no budget"))
    judges = {name: watchers.get(name, scorer) for name in ("judge", "judge2")}
    judges |= {} if cfg.reward == "judge" else {"reward": scorer}
    return report(cfg, reference, average, out, *(x.to(device) for x in test), judges)


def report(cfg, reference, restorer, out, lq, hq, judges):
    """Table, picture, scores.csv and summary.json: the SFT restorer against the new one on held-out test images."""
    import eval
    from utils import write_json, write_rows
    rows, images = eval.compare({"sft": reference, "rl": restorer}, lq, hq, judges, batch=min(32, cfg.micro_batch))
    print(eval.format_table(rows))
    means = {name: {key: eval.mean_se(row[key])[0] if key in row else None
                    for key in ("judge", "judge2", "psnr_y", "ssim")} for name, row in rows.items()}
    closed = "   ".join(f"{name} {eval.said_of_gap(*(rows[r][name].mean() for r in ('rl', 'sft', 'hq')))}"
                        for name in ("judge", "reward") if name in judges)
    print(f"{closed}   psnr_y {means['rl']['psnr_y'] - means['sft']['psnr_y']:+.2f} dB   "
          f"ssim {means['rl']['ssim'] - means['sft']['ssim']:+.4f}")
    write_rows(out / "scores.csv", [{"model": name, "crop": i} | {key: row[key][i].item() for key in row}
                                    for name, row in rows.items() for i in range(len(lq))])
    write_json(out / "summary.json", means)
    order = (rows["hq"]["judge"] - rows["sft"]["judge"]).argsort(descending=True)
    picks = order[torch.linspace(0, len(order) - 1, min(6, len(order))).long()]  # from the hardest to the easiest
    eval.save_grid(out / "before_after.png", {name: images[name][picks] for name in ("lq", "sft", "rl", "hq")},
                   {name: [f"judge {rows[name]['judge'][i]:.2f}" + (
                       f"  {rows[name]['psnr_y'][i]:.1f} dB" if name != "hq" else "") for i in picks]
                    for name in ("lq", "sft", "rl", "hq")})
    print(f"wrote {out}: model/, summary.json, scores.csv, metrics.csv, curves.png, before_after.png")
    return means


def main():
    import argparse

    from utils import parse
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)  # what the other defaults depend on
    first.add_argument("--estimator")
    defaults = OF_REWARD if first.parse_known_args()[0].estimator == "reward" else {}
    train(parse(Config, description="Reinforcement learning of a diffusion restorer, weighed against SFT.",
                defaults=defaults))


if __name__ == "__main__":
    from utils import run_main
    run_main(main)
