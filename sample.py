"""Stochastic DDIM with log-probabilities, the policy of the reinforcement learning; as a script, restores image files.

Notation            symbol                      shape
  z_t, z_prev       z_t, z_{t-1}                (B, C, h, w)   noisy latents before and after a step
  output            network output              (B, C, h, w)   epsilon, sample (z0) or v
  x0                x0_hat(z_t)                 (B, C, h, w)   the predicted clean latent
  alpha_bar_t/prev  abar_t, abar_{t-1}          (B,)           product of (1 - beta)
  eta               eta >= 0                    float          0: deterministic DDIM, 1: as random as DDPM
  sigma_t           sigma_t                     (B,)           standard deviation of this very step
  mean              mu_theta(z_t, t, lq)        (B, C, h, w)
  log_prob          log p_theta(z_{t-1} | z_t)  (B,)           mean over C, H, W

One step (Song et al. 2021, arXiv 2010.02502, eq. 12 and 16; v: Salimans and Ho 2022, arXiv 2202.00512):
  epsilon   eps = output,                                        x0 = (z_t - sqrt(1 - abar_t) eps) / sqrt(abar_t)
  sample    eps = (z_t - sqrt(abar_t) x0) / sqrt(1 - abar_t),    x0 = output
  v         eps = sqrt(abar_t) v + sqrt(1 - abar_t) z_t,         x0 = sqrt(abar_t) z_t - sqrt(1 - abar_t) v
  sigma_t = eta sqrt((1 - abar_{t-1}) / (1 - abar_t)) sqrt(1 - abar_t / abar_{t-1})
  mean    = sqrt(abar_{t-1}) x0 + sqrt(1 - abar_{t-1} - sigma_t^2) eps
  z_{t-1} = mean + sigma_t noise,   log p = mean[-(z_{t-1} - mean)^2 / (2 sigma_t^2) - log sigma_t - log(2 pi) / 2]

Chosen here because the paper's text is not public [R in the README]:
 1. log_prob is the mean over C, H, W, not the sum: a sum over 10^4 dimensions makes the ratio of two policies
    explode. A clip range for it is then of the order 1e-4 to 1e-2.
 2. A step with sigma_t = 0 (eta = 0, or the last step where alpha_bar_prev = 1) is deterministic: its log_prob is 0
    here and `Rollout.stochastic` keeps it out of every loss.
 3. All arithmetic of the step is float32, whatever the network computes in.

    python sample.py photo.png --out restored                     # laptop: the shipped x4 restorer
    python sample.py folder/ --model runs/sr/model --device cuda  # GPU: a fine-tuned one, a whole folder
"""

import math
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import torch
import torch.nn.functional as F


class Step(NamedTuple):
    z_prev: torch.Tensor    # (B, C, h, w)
    mean: torch.Tensor      # (B, C, h, w)
    sigma_t: torch.Tensor   # (B,)
    x0: torch.Tensor        # (B, C, h, w)
    log_prob: torch.Tensor  # (B,), 0 where sigma_t = 0


def predict_x0(output, z_t, alpha_bar_t, prediction_type):
    """Network output -> (x0, eps), both (B, C, h, w) float32. Raises ValueError for an unknown prediction type."""
    a = alpha_bar_t.view(-1, *[1] * (z_t.ndim - 1))
    signal, spread = a.sqrt(), (1 - a).sqrt()
    if prediction_type == "epsilon":
        return (z_t - spread * output) / signal, output
    if prediction_type == "sample":
        return output, (z_t - signal * output) / spread
    if prediction_type == "v_prediction":
        return signal * z_t - spread * output, signal * output + spread * z_t
    raise ValueError(f"prediction type {prediction_type!r}: expected epsilon, sample or v_prediction")


def gaussian_log_prob(x, mean, sigma):
    """log N(x; mean, sigma^2 I), mean over all but the first dimension; sigma (B,) > 0. Returns (B,)."""
    s = sigma.view(-1, *[1] * (x.ndim - 1))
    density = -((x - mean) ** 2) / (2 * s ** 2) - s.log() - 0.5 * math.log(2 * math.pi)
    return density.flatten(1).mean(1)


def ddim_step(output, z_t, alpha_bar_t, alpha_bar_prev, eta, prediction_type, z_prev=None, noise=None, clip_x0=None):
    """One stochastic DDIM step in float32, from t to any earlier time, with its log-probability.

    output, z_t: (B, C, h, w). alpha_bar_t, alpha_bar_prev: (B,), each sample may be at its own time.
    z_prev: a step already taken, whose log-probability is asked for; else z_prev = mean + sigma_t noise.
    noise: (B, C, h, w) standard normal, needed only without z_prev. clip_x0: bound on |x0| or None.
    Returns a Step. Raises ValueError if neither z_prev nor noise is given and some sigma_t > 0.
    """
    output, z_t = output.float(), z_t.float()
    a, b = alpha_bar_t.float(), alpha_bar_prev.float()
    x0, eps = predict_x0(output, z_t, a, prediction_type)
    if clip_x0 is not None:
        x0 = x0.clamp(-clip_x0, clip_x0)  # eps stays as predicted, as in diffusers' DDIMScheduler
    sigma_t = eta * ((1 - b) / (1 - a)).sqrt() * (1 - a / b).clamp(min=0).sqrt()
    wide = (slice(None),) + (None,) * (z_t.ndim - 1)
    # eta > 1 may ask for more variance than the step has: then no direction towards z_t is left
    mean = b.sqrt()[wide] * x0 + (1 - b - sigma_t ** 2).clamp(min=0).sqrt()[wide] * eps
    if z_prev is None:
        if noise is None and bool((sigma_t > 0).any()):
            raise ValueError("ddim_step: a stochastic step needs noise or z_prev")
        z_prev = mean if noise is None else mean + sigma_t[wide] * noise
    stochastic = sigma_t > 0
    log_prob = gaussian_log_prob(z_prev.detach(), mean, torch.where(stochastic, sigma_t, 1.0))
    return Step(z_prev, mean, sigma_t, x0, torch.where(stochastic, log_prob, torch.zeros_like(log_prob)))


def time_grid(scheduler, steps):
    """The sampling times of a diffusers DDIMScheduler: t (N,) int, alpha_bar_t (N,), alpha_bar_prev (N,), float32."""
    scheduler.set_timesteps(steps)
    t = scheduler.timesteps.cpu().long()
    previous = t - scheduler.config.num_train_timesteps // steps
    alphas = scheduler.alphas_cumprod.float()
    return t, alphas[t], torch.where(previous >= 0, alphas[previous.clamp(min=0)], scheduler.final_alpha_cumprod)


def normal(shape, generator, device):
    """Standard normal noise drawn on the CPU (the same numbers on every device). generator: one, or a list of B, one
    per sample, which makes each sample independent of its batch."""
    if isinstance(generator, (list, tuple)):
        return torch.stack([torch.randn(shape[1:], generator=g) for g in generator]).to(device)
    return torch.randn(shape, generator=generator).to(device)


class Rollout(NamedTuple):
    condition: torch.Tensor   # (B, ...)             what the network saw of lq at every step, restorer.condition
    z: torch.Tensor           # (N + 1, B, C, h, w)  z_T ... z_0
    x0: torch.Tensor          # (N, B, C, h, w)      x0[k] is predicted from z[k]
    log_prob: torch.Tensor    # (N, B)               of z[k + 1] given z[k]
    t: torch.Tensor           # (N,)
    alpha_bar: torch.Tensor   # (N, 2)               alpha_bar_t, alpha_bar_prev
    sigma_t: torch.Tensor     # (N,)

    @property
    def stochastic(self):
        """(N,) bool, sigma_t > 0: the steps that a policy loss may use."""
        return self.sigma_t > 0


def clip_of(scheduler):
    """The bound on |x0| that a diffusers scheduler's config asks for, or None. Raises ValueError for dynamic bounds."""
    if scheduler.config.get("thresholding"):
        raise ValueError("schedulers with dynamic thresholding are not supported: their steps are not Gaussian")
    return scheduler.config.get("clip_sample_range", 1.0) if scheduler.config.get("clip_sample") else None


def rollout(restorer, lq, steps, eta, generator, keep=True, predict=None, grad=False):
    """Samples z_T .. z_0 for each lq (B, 3, H, W) and keeps what the update needs.

    generator: one torch.Generator or a list of B. keep: False stores only the last z, for plain restoration (then z is
    (1, B, ...) and x0 (1, B, ...)). predict: replaces restorer.predict, for tiles. grad: True records the gradient of
    the last z through all steps, with the noise held fixed; memory grows with the steps. Returns a Rollout.
    """
    with torch.set_grad_enabled(grad):
        predict, device, scheduler = predict or restorer.predict, lq.device, restorer.scheduler
        grid, kind, clip = time_grid(scheduler, steps), scheduler.config.prediction_type, clip_of(scheduler)
        z_t = normal(restorer.latent_shape(lq), generator, device)
        condition = restorer.condition(lq, generator)
        z, x0, log_prob, sigma = [z_t], [], [], []
        for t, a, b in zip(*(g.to(device) for g in grid)):
            t, a, b = (v.expand(len(lq)) for v in (t, a, b))
            # noise is drawn even where sigma_t = 0, so that eta does not shift the random numbers of later samples
            step = ddim_step(predict(z_t, t, condition), z_t, a, b, eta, kind,
                             noise=normal(z_t.shape, generator, device), clip_x0=clip)
            z_t = step.z_prev
            if not keep:
                z, x0 = [], []
            z.append(z_t), x0.append(step.x0), log_prob.append(step.log_prob), sigma.append(step.sigma_t[0])
        return Rollout(condition, torch.stack(z), torch.stack(x0), torch.stack(log_prob), grid[0].to(device),
                       torch.stack(grid[1:], dim=1).to(device), torch.stack(sigma))


def repeat_step(restorer, path, k, eta):
    """Step k of a Rollout once more with the present weights: the Step from its z_t to its z_{t-1}."""
    t, a, b = (x.expand(path.z.shape[1]) for x in (path.t[k], *path.alpha_bar[k]))
    return ddim_step(restorer.predict(path.z[k], t, path.condition), path.z[k], a, b, eta,
                     restorer.scheduler.config.prediction_type, path.z[k + 1], clip_x0=clip_of(restorer.scheduler))


# ---- images of any size ----

def tile_starts(length, tile, overlap):
    """Where tiles of side `tile` start so that they cover `length` and neighbours share at least `overlap`."""
    if length <= tile:
        return [0]
    count = math.ceil((length - overlap) / (tile - overlap))
    return [round(i * (length - tile) / (count - 1)) for i in range(count)]


def tiled_predict(restorer, tile, overlap):
    """restorer.predict over overlapping tiles, blended by a pyramid window, for inputs larger than `tile` pixels of lq.

    The outputs are blended at every step (as MultiDiffusion does, Bar-Tal et al. 2023, arXiv 2302.08113), not the
    restored tiles at the end: two random samples averaged would be blurred where tiles meet.
    """
    m = restorer.multiple
    tile, overlap = max(1, tile // m), min(overlap // m, max(1, tile // m) - 1)  # in units of m pixels of lq

    def predict(z_t, t, condition):
        unit = m // restorer.factor                                   # latent pixels per unit
        seen = unit * condition.shape[-1] // z_t.shape[-1]            # pixels of the condition per unit
        high, wide = (side // unit for side in z_t.shape[-2:])
        if max(high, wide) <= tile:
            return restorer.predict(z_t, t, condition)
        total, weights = torch.zeros_like(z_t), torch.zeros_like(z_t[:1, :1])
        for y in tile_starts(high, tile, overlap):
            for x in tile_starts(wide, tile, overlap):
                own, part = ((..., slice(y * s, (y + tile) * s), slice(x * s, (x + tile) * s)) for s in (unit, seen))
                z = z_t[own]
                window = torch.minimum(*torch.meshgrid(*map(ramp, z.shape[-2:]), indexing="ij")).to(z)
                total[own] += window * restorer.predict(z, t, condition[part])
                weights[own] += window
        return total / weights
    return predict


def ramp(length):
    """Rises by one per pixel from both ends: 1, 2, 3, ..., 3, 2, 1, as a (length,) tensor."""
    return torch.minimum(torch.arange(1, length + 1), torch.arange(length, 0, -1)).float()


def restore(restorer, lq, steps, eta, generator, tile=256, overlap=64):
    """lq (B, 3, H, W) in [-1, 1] of any size -> restored images of the same size and range.

    Reflect-pads to the restorer's multiple; larger sides than `tile` go through `tiled_predict`. Tiles overlap by half
    of their side at most: small ones would be too many.
    """
    height, width = lq.shape[-2:]
    m = restorer.multiple
    down, right = -height % m, -width % m
    mode = "reflect" if down < height and right < width else "replicate"  # reflection cannot exceed the image
    padded = F.pad(lq, (0, right, 0, down), mode=mode)
    trajectory = rollout(restorer, padded, steps, eta, generator, keep=False,
                         predict=tiled_predict(restorer, tile, min(overlap, tile // 2)))
    with torch.no_grad():
        return restorer.decode(trajectory.z[-1], padded)[..., :height, :width]


def chosen_steps(restorer, steps):
    """The DDIM steps of a flag --steps; 0: as the restorer was trained. Raises UserError if it cannot take as many."""
    most = restorer.scheduler.config.num_train_timesteps
    if not 0 <= steps <= most:
        from utils import UserError
        raise UserError(f"--steps {steps}: must be from 1 to {most}, or 0: as the restorer was trained")
    return steps or restorer.defaults["steps"]


@dataclass
class Config:
    model: Annotated[str, "folder of a saved restorer; empty: the shipped one of --task"] = ""
    task: Annotated[str, "sr, sr2, sr3: the input is enlarged first; empty: as --model says, or sr"] = ""
    out: Annotated[str, "folder for the PNGs"] = "restored"
    scale: Annotated[int, "bicubic enlargement before restoration; 0: 4 for sr, else 1"] = 0
    steps: Annotated[int, "DDIM steps; 0: as trained"] = 0
    eta: Annotated[float, "stochasticity of the sampler; -1: as trained"] = -1.0
    tile: Annotated[int, "largest side in pixels that the network sees at once"] = 256
    overlap: Annotated[int, "pixels that neighbouring tiles share, half of --tile at most"] = 64
    seed: Annotated[int, "seed of the sampler, the same for every image"] = 0
    device: Annotated[str, "auto, cpu, cuda, cuda:1, mps"] = "auto"
    dtype: Annotated[str, "float32, bfloat16 or float16: the network's arithmetic"] = "float32"


def main():
    from pathlib import Path

    from tqdm import tqdm

    from data import list_images, resize, split_task
    from model import load
    from utils import UserError, generator, make_folder, parse, pick_device, read_image, write_image
    cfg, inputs = parse(Config, description="Restores image files.", positional="image files or folders")
    if not inputs:
        raise UserError("no input: give image files or folders")
    if cfg.overlap < 0 or cfg.tile < 8 or cfg.scale < 0:
        raise UserError(f"--overlap {cfg.overlap}, --tile {cfg.tile}, --scale {cfg.scale}: at least 0, 8 and 0")
    make_folder(cfg.out)
    files = []  # (file, path of its PNG)
    for name in map(Path, inputs):
        if not name.exists():
            raise UserError(f"{name}: no such file or folder")
        found = list_images(name) if name.is_dir() else [name]
        files += [(f, Path(cfg.out) / (f.relative_to(name) if name.is_dir() else Path(f.name)).with_suffix(".png"))
                  for f in found]
    if len({target for _, target in files}) < len(files):
        raise UserError("two inputs would be written to one PNG; restore them into different --out folders")
    if not files:
        raise UserError(f"{' '.join(inputs)}: no images found")
    device = pick_device(cfg.device)
    restorer = load(cfg.model, device, cfg.dtype, cfg.task or "sr")
    steps, eta = chosen_steps(restorer, cfg.steps), cfg.eta if cfg.eta >= 0 else restorer.defaults["eta"]
    base, options = split_task(cfg.task or (restorer.defaults["task"] if cfg.model else "sr"))
    scale = cfg.scale or (options.get("scale", 4) if base == "sr" else 1)
    failed = 0
    for file, target in (bar := tqdm(files, unit="image")):
        bar.set_postfix_str(file.name)
        try:
            lq = read_image(file)[None].to(device)
        except UserError as error:
            bar.write(f"skipped {error}")
            failed += 1
            continue
        lq = resize(lq, [side * scale for side in lq.shape[-2:]]).clamp(-1, 1) if scale > 1 else lq
        write_image(target, restore(restorer, lq, steps, eta, generator(cfg.seed), cfg.tile, cfg.overlap)[0])
    print(f"wrote {len(files) - failed} PNGs to {cfg.out} ({steps} steps, eta {eta}, seed {cfg.seed})")
    if failed:
        raise UserError(f"{failed} of {len(files)} files could not be read, see above")


if __name__ == "__main__":
    from utils import run_main
    run_main(main)
