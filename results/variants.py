"""The claims as a table of settings, and what they need that no flag of rl.py gives.

`claims` has the rows of each claim. METHODS take the place of one function of rl.py each:

  group       restorations of one input are compared with each other, no memory   examples/ddpo.py
  hard, easy  w = 1 for the harder or easier half of the inputs, else 0           difficulty.weights
  noisiestN   the first N denoising steps train, the others do not                rl.collect
  sigma       the advantage of step k times sigma_k / mean sigma                  rl.step_loss
  likelihood  -log p_theta of the ground truth's own step in the place of L_SFT   rl.step_loss
  gradient    the reward as a plain loss through the chain        examples/reward_gradient.py
  curve       outside metrics beside the reward at each look at validation        rl.validate

Used by results/claims.py; a variant of your own is a line in METHODS.
"""

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples"), str(ROOT / "results")]

import ddpo  # noqa: E402
import reward_gradient  # noqa: E402
from new_reward import judge  # noqa: E402

import reward  # noqa: E402
import rl  # noqa: E402
from difficulty import median_spread  # noqa: E402
from eval import INSTRUMENTS, load_metrics  # noqa: E402
from sample import Rollout, ddim_step, replay  # noqa: E402
from sft import add_noise  # noqa: E402
from utils import pick_device  # noqa: E402


TASKS = ("sr", "sr2", "denoise", "deblur", "jpeg", "derain", "dehaze", "lowlight", "real")


def claims(cfg):
    """{claim: {row: changes of cfg}}; the first row is the one that others are compared with.

    "method": of METHODS. "apart": the budget is another one. Rows named "A, B" are joined to a line
    in the figure.
    """
    far = {"max_drop": 99.0}  # how far each goes is what is asked
    weights = {"adaptive": "baseline", "w 0.25": "fixed:0.25", "w 0.5": "fixed:0.5",
               "w 0.75": "fixed:0.75"}
    group = {n: {"inputs": cfg.inputs * cfg.samples // n, "samples": n} for n in (1, 2, 4, 8)}
    curve = {"method": "curve", "iterations": 4 * cfg.iterations} | far
    return {
        "C1": {name: {"reward": name} for name in
               ("judge", "psnr", "ssim", "pyiqa:lpips", "judge+psnr")},
        "C2": {"SFT elsewhere, hard half": {"method": "hard"},
               "SFT elsewhere, easy half": {"method": "easy"},
               "SFT elsewhere, both by halves": {"weight": "fixed:0.5"},  # as much RL, as much SFT
               "no SFT, hard half": {"method": "hard", "sft_coef": 0.0},
               "no SFT, easy half": {"method": "easy", "sft_coef": 0.0},
               "no SFT, all": {"weight": "fixed:1"}},
        "C3": {"adaptive": {}, "RL only": {"weight": "fixed:1"}, "SFT only": {"weight": "fixed:0"},
               "half": {"weight": "fixed:0.5"}},
        "C4": {f"{name}, lambda {x:g}": {"weight": weight, "sft_coef": x} | far
               for name, weight in weights.items() for x in (3e-2, 1e-2, 1e-1)},
        "C5": {name or "shipped": {"model": name} for name in cfg.models},
        "C6": {task: {"task": task} for task in TASKS},
        "C7": {"memory, 1": group[1],
               **{f"memory, {n}": group[n] for n in (2, 4, 8)},
               **{f"group, {n}": group[n] | {"method": "group"} for n in (2, 4, 8)},
               "KL, 0": {"kl_coef": 0.0}, "KL, 0.01": {"kl_coef": 1e-2},
               "A sigma / mean": {"method": "sigma"},
               "likelihood of hq": {"method": "likelihood", "sft_coef": 5 * cfg.sft_coef},
               "judge's gradient *": {"method": "gradient", "lr": 1e-4, "micro_batch": 16,
                                      "apart": True},
               "noisiest steps, 2": {"method": "noisiest2"},
               "noisiest steps, 4": {"method": "noisiest4"},
               "length *, half": {"iterations": max(1, cfg.iterations // 2), "apart": True},
               "length *, double": {"iterations": 2 * cfg.iterations, "apart": True}},
        "C8": {f"{name}, {word}": {"reward": name} | changes | curve for name in cfg.rewards
               for word, changes in (("with SFT", {}), ("without", {"sft_coef": 0.0}),
                                     ("with SFT, w 0.5", {"weight": "fixed:0.5"}))}}


# ---- what takes the place of a function of rl.py ----

def judge_and_psnr(images, refs):
    """A reward: judge + PSNR / 10 dB. Restorations of one input differ by 0.034 and 0.28 dB."""
    return judge(images.device)(images) + reward.psnr(images, refs) / 10


def half(hard):
    """w = 1 for the half of the inputs that is hard, or easy, by the present model; else 0."""
    def weights(spec, distance, distance_sft, distance_now):
        middle, _ = median_spread(distance_now)
        return (distance > middle if hard else distance <= middle).float()
    return weights


def by_sigma(restorer, reference, cfg, batch, k):
    """rl.step_loss with the advantage of step k times sigma_k / mean sigma."""
    path = batch["path"]
    share = path.sigma_t[k] / path.sigma_t[path.usable].mean()
    return rl.step_loss(restorer, reference, cfg,
                        batch | {"advantage": batch["advantage"] * share}, k)


def likelihood(restorer, reference, cfg, batch, k):
    """rl.step_loss with -log p_theta of the ground truth's own step k in the place of L_SFT.

    From z_t = z0 noised, DDIM with the true z0 and eps leads to N(mu, sigma_t^2): the mean of
    -log p_theta over it is ||mu - mu_theta||^2 / (2 sigma_t^2) and a constant; mean over C, H, W.
    Its gradient is a sixth of that of L_SFT (sr, 8 steps, median of steps): lambda is five times.
    """
    _, info = rl.step_loss(restorer, reference, replace(cfg, sft_coef=0.0), batch, k)
    path, eps, z = batch["path"], batch["eps"], batch["path"].z.clone()
    a, b = (x.expand(len(eps)) for x in path.alpha_bar[k])
    z[k] = add_noise(batch["z0"], eps, a)
    truth = ddim_step(eps, z[k], a, b, cfg.eta, "epsilon", z_prev=z[k])
    own = replay(restorer, path._replace(z=z), k, cfg.eta)
    info["sft_loss"] = rl.kl_to_reference(own.mean, truth.mean, own.sigma_t)
    info["terms"]["sft"] = ((1 - batch["weight"]) * cfg.sft_coef * info["sft_loss"]).mean()
    info["sft_loss"] = info["sft_loss"].mean()
    return sum(info["terms"].values()), info


def noisiest(count, collect=rl.collect):
    """rl.collect, of whose steps the first `count` train: fewer passes, as many updates."""
    class Part(Rollout):
        @property
        def usable(self):
            return super().usable[:count]

    def part(*args, **keep):
        batches, rewards = collect(*args, **keep)
        return [batch | {"path": Part(*batch["path"])} for batch in batches], rewards
    return part


def curve():
    """rl.validate with outside metrics beside the reward."""
    return partial(rl.validate, others=load_metrics(INSTRUMENTS, pick_device()))


reward.REWARDS["judge+psnr"] = judge_and_psnr
METHODS = {  # cfg -> {name of a function of rl.py: its replacement}
    "": lambda cfg: {},
    "group": lambda cfg: {"advantages": ddpo.group_advantages(cfg.samples)},
    "hard": lambda cfg: {"weights": half(True)},
    "easy": lambda cfg: {"weights": half(False)},
    "noisiest2": lambda cfg: {"collect": noisiest(2)},
    "noisiest4": lambda cfg: {"collect": noisiest(4)},
    "sigma": lambda cfg: {"step_loss": by_sigma},
    "likelihood": lambda cfg: {"step_loss": likelihood},
    "gradient": lambda cfg: {"step_loss": reward_gradient.make_step_loss(cfg)},
    "curve": lambda cfg: {"validate": curve()}}
