"""Stochastic DDIM with log-probabilities, the policy of RL; as a script, restores image files.

Notation              symbol                      shape
  z_t, z_prev         z_t, z_{t-1}                (B, C, h, w)  noisy latents around a step
  output              network output              (B, C, h, w)  epsilon, sample (z0) or v
  x0                  x0_hat(z_t)                 (B, C, h, w)  the predicted clean latent
  alpha_bar_t, _prev  abar_t, abar_{t-1}          (B,)          product of (1 - beta)
  eta                 eta >= 0                    float         0: deterministic, 1: as DDPM
  sigma_t             sigma_t                     (B,)          standard deviation of the step
  mean                mu_theta(z_t, t, lq)        (B, C, h, w)
  log_prob            log p_theta(z_{t-1} | z_t)  (B,)          mean over C, H, W

One step (Song et al. 2021, arXiv 2010.02502, eq. 12, 16; v: Salimans, Ho 2022, arXiv 2202.00512):
  epsilon   eps = output,                          x0 = (z_t - sqrt(1 - abar_t) eps) / sqrt(abar_t)
  sample    x0 = output,                           eps = (z_t - sqrt(abar_t) x0) / sqrt(1 - abar_t)
  v         x0 = sqrt(abar_t) z_t - sqrt(1 - abar_t) v,  eps = sqrt(abar_t) v + sqrt(1 - abar_t) z_t
  sigma_t = eta sqrt((1 - abar_{t-1}) / (1 - abar_t)) sqrt(1 - abar_t / abar_{t-1})
  mean    = sqrt(abar_{t-1}) x0 + sqrt(1 - abar_{t-1} - sigma_t^2) eps
  z_{t-1} = mean + sigma_t noise
  log p   = mean over C, H, W of -(z_{t-1} - mean)^2 / (2 sigma_t^2) - log sigma_t - log(2 pi) / 2

Chosen here because we did not have the paper's text [R in the README]:
 1. log_prob is the mean over C, H, W, not the sum: a sum over 10^4 dimensions makes the ratio of
    two policies explode. With the mean, the clip range is of the order 1e-4 to 1e-2.
 2. A step with sigma_t = 0 (eta = 0, or the last one, where abar_{t-1} = 1) is deterministic: its
    log_prob is set to 0. The gradient of log_prob grows as 1 / sigma_t, and Stable Diffusion's
    "leading" times end in small sigma_t: on `sr`, one step with 0.003, the largest being 0.41, made
    up 0.92 of the gradient's norm (results/LOG.md). `Rollout.usable` leaves out both kinds of step.
 3. All arithmetic of the step is float32, whatever the network computes in.
 4. All noise is drawn beforehand (`draw`), so that a rollout is a function of its noise: a batch
    can be cut into parts, for memory or for several processes, and gives the same samples.

A restorer here is any object that has scheduler (a DDIMScheduler of diffusers), latent_shape(lq),
condition(lq, generator) and predict(z_t, t, condition), as in model.py; `restore` also needs
device, defaults, settle, multiple, factor and decode. These functions need torch only and can be
copied alone; the script needs the files beside it.

    python sample.py photo.png                                   # laptop: the shipped x4 restorer
    python sample.py folder/ --model runs/sr-0/model --out album       # a fine-tuned one, on a GPU
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F


def wide(x, like):
    """(B,) -> (B, 1, 1, 1) on the device of `like`."""
    return x.to(like.device).view(-1, *[1] * (like.ndim - 1))


class Step(NamedTuple):
    z_prev: torch.Tensor    # (B, C, h, w)
    mean: torch.Tensor      # (B, C, h, w)
    sigma_t: torch.Tensor   # (B,)
    x0: torch.Tensor        # (B, C, h, w)
    log_prob: torch.Tensor  # (B,), 0 where sigma_t = 0


def predict_x0(output, z_t, alpha_bar_t, prediction_type):
    """Network output -> (x0, eps), (B, C, h, w) each. ValueError for an unknown prediction type."""
    signal = wide(alpha_bar_t.sqrt(), z_t)
    spread = wide((1 - alpha_bar_t).sqrt(), z_t)
    if prediction_type == "epsilon":
        return (z_t - spread * output) / signal, output
    if prediction_type == "sample":
        return output, (z_t - signal * output) / spread
    if prediction_type == "v_prediction":
        return signal * z_t - spread * output, signal * output + spread * z_t
    raise ValueError(f"prediction type {prediction_type}: expected epsilon, sample, v_prediction")


def gaussian_log_prob(x, mean, sigma):
    """log N(x; mean, sigma^2 I), mean over all but the first dimension; sigma (B,) > 0 -> (B,)."""
    s = wide(sigma, x)
    density = -((x - mean) ** 2) / (2 * s ** 2) - s.log() - 0.5 * math.log(2 * math.pi)
    return density.flatten(1).mean(1)


def ddim_step(output, z_t, alpha_bar_t, alpha_bar_prev, eta, prediction_type,
              z_prev=None, noise=None, clip_x0=None):
    """One stochastic DDIM step, from t to any earlier time, with its log-probability -> Step.

    output, z_t: (B, C, h, w). alpha_bar_t, alpha_bar_prev: (B,), each sample at its own time.
    z_prev: a step already taken, whose log-probability is asked for.
    noise: standard normal (B, C, h, w), needed only without z_prev. clip_x0: bound on |x0| or None.
    """
    output, z_t = output.float(), z_t.float()
    a, b = alpha_bar_t.float(), alpha_bar_prev.float()
    x0, eps = predict_x0(output, z_t, a, prediction_type)
    if clip_x0 is not None:
        x0 = x0.clamp(-clip_x0, clip_x0)  # eps stays as predicted, as in diffusers' DDIMScheduler
    sigma_t = eta * ((1 - b) / (1 - a)).sqrt() * (1 - a / b).clamp(min=0).sqrt()
    # an eta above 1 may ask for more variance than the step has: no direction towards z_t is left
    direction = (1 - b - sigma_t ** 2).clamp(min=0).sqrt()
    mean = wide(b.sqrt(), x0) * x0 + wide(direction, x0) * eps
    if z_prev is None:
        z_prev = mean + wide(sigma_t, x0) * noise
    stochastic = sigma_t > 0
    log_prob = gaussian_log_prob(z_prev.detach(), mean, torch.where(stochastic, sigma_t, 1.0))
    log_prob = torch.where(stochastic.to(log_prob.device), log_prob, 0.0)
    return Step(z_prev, mean, sigma_t, x0, log_prob)


def time_grid(scheduler, steps):
    """The sampling times of a diffusers DDIMScheduler: t (N,) int, alpha_bar_t and _prev (N,)."""
    scheduler.set_timesteps(steps)
    last = scheduler.config.num_train_timesteps - 1
    t = scheduler.timesteps.cpu().long().clamp(max=last)  # a steps_offset can lead one too far
    previous = t - scheduler.config.num_train_timesteps // steps
    previous[-1] = -1  # "trailing" may stop at 0, with a sigma so small that log p explodes
    alphas = scheduler.alphas_cumprod.float()
    alpha_bar_prev = alphas[previous.clamp(min=0)]
    alpha_bar_prev[previous < 0] = scheduler.final_alpha_cumprod
    return t, alphas[t], alpha_bar_prev


def clip_of(scheduler):
    """The bound on |x0| that a diffusers scheduler asks for, or None."""
    return scheduler.config.clip_sample_range if scheduler.config.get("clip_sample") else None


class Rollout(NamedTuple):
    condition: torch.Tensor   # (B, ...)             what the network saw of lq at every step
    z: torch.Tensor           # (N + 1, B, C, h, w)  z_T ... z_0
    x0: torch.Tensor          # (N, B, C, h, w)      x0[k] is predicted from z[k]
    log_prob: torch.Tensor    # (N, B)               of z[k + 1] given z[k]
    t: torch.Tensor           # (N,)
    alpha_bar: torch.Tensor   # (N, 2)               alpha_bar_t, alpha_bar_prev
    sigma_t: torch.Tensor     # (N,)

    @property
    def usable(self):
        """The steps k for a policy loss, a list: sigma_t is above a tenth of the largest."""
        return (self.sigma_t > 0.1 * self.sigma_t.max()).nonzero().flatten().tolist()


def draw(restorer, lq, steps, generator):
    """All random numbers of a rollout of lq (B, 3, H, W): (condition, noise (N + 1, B, C, h, w)).

    On the CPU, so that they are the same for every device; noise[0] is z_T.
    """
    noise = torch.randn(steps + 1, *restorer.latent_shape(lq), generator=generator)
    return restorer.condition(lq, generator), noise


def rollout(restorer, condition, noise, eta, predict=None):
    """Samples z_T ... z_0 -> Rollout, which keeps all that the update needs.

    condition, noise: of `draw`, or a part of them. predict: in the place of restorer.predict.
    """
    count = noise.shape[1]
    grid = time_grid(restorer.scheduler, len(noise) - 1)
    t, *alpha_bars = (x.to(noise.device) for x in grid)  # once: each copy waits for the card
    kind, clip = restorer.scheduler.config.prediction_type, clip_of(restorer.scheduler)
    z, steps = [noise[0]], []
    for k in range(len(t)):
        output = (predict or restorer.predict)(z[k], t[k].expand(count), condition)
        a, b = (alpha_bar[k].expand(count) for alpha_bar in alpha_bars)
        steps.append(ddim_step(output, z[k], a, b, eta, kind, noise=noise[k + 1], clip_x0=clip))
        z.append(steps[k].z_prev)
    x0 = torch.stack([step.x0 for step in steps])
    log_prob = torch.stack([step.log_prob for step in steps])
    sigma_t = torch.stack([step.sigma_t[0] for step in steps])
    return Rollout(condition, torch.stack(z), x0, log_prob, t, torch.stack(alpha_bars, 1), sigma_t)


def replay(restorer, path, k, eta):
    """Step k of a rollout `path` again, by the present weights, with a gradient -> Step.

    The same batch gives the same arithmetic, so before any update log_prob is path.log_prob[k].
    """
    count = path.z.shape[1]
    z_t, z_prev = path.z[k].detach(), path.z[k + 1].detach()
    output = restorer.predict(z_t, path.t[k].expand(count), path.condition)
    a, b = (alpha_bar.expand(count) for alpha_bar in path.alpha_bar[k])
    scheduler = restorer.scheduler
    return ddim_step(output, z_t, a, b, eta, scheduler.config.prediction_type,
                     z_prev=z_prev, clip_x0=clip_of(scheduler))


# ---- images of any size ----

def tile_starts(length, tile, overlap):
    """Where tiles start that cover `length` and share at least `overlap` with their neighbours."""
    if length <= tile:
        return [0]
    count = math.ceil((length - overlap) / (tile - overlap))
    return [round(i * (length - tile) / (count - 1)) for i in range(count)]


def tiled(restorer, tile):
    """restorer.predict over tiles of `tile` pixels that overlap by a quarter, for larger inputs.

    Outputs are blended at every step (MultiDiffusion, Bar-Tal et al. 2023, arXiv 2302.08113), not
    the restored tiles at the end: two random samples averaged would be blurred where tiles meet.
    """
    unit = restorer.multiple  # pixels; tiles start and end at multiples of it
    side = max(1, tile // unit)

    def predict(z_t, t, condition):
        fine = unit // restorer.factor                        # latent pixels per unit
        seen = fine * condition.shape[-1] // z_t.shape[-1]    # pixels of the condition per unit
        high, broad = (length // fine for length in z_t.shape[-2:])
        total, weight = torch.zeros_like(z_t), torch.zeros_like(z_t[:1, :1])
        for y in tile_starts(high, side, side // 4):
            for x in tile_starts(broad, side, side // 4):
                own = (..., slice(y * fine, (y + side) * fine), slice(x * fine, (x + side) * fine))
                part = (..., slice(y * seen, (y + side) * seen), slice(x * seen, (x + side) * seen))
                ramps = [torch.bartlett_window(n + 2, False)[1:-1] for n in z_t[own].shape[-2:]]
                window = torch.outer(*ramps).to(z_t)  # rises from all four sides
                total[own] += window * restorer.predict(z_t[own], t, condition[part])
                weight[own] += window
        return total / weight
    return predict


@torch.no_grad()
def restore(restorer, lq, steps, eta, generator, tile=0):
    """lq (B, 3, H, W) in [-1, 1] of any size -> restored images of the same size and range.

    steps 0, eta -1: as the restorer was trained. Pads to the restorer's multiple; sides above
    `tile` pixels (0: those of its training, at least 256) go through overlapping tiles.
    """
    tile = tile or max(256, restorer.defaults["size"])
    steps, eta = restorer.settle(steps, eta)
    height, width = lq.shape[-2:]
    down, right = -height % restorer.multiple, -width % restorer.multiple
    mode = "reflect" if down < height and right < width else "replicate"
    padded = F.pad(lq, (0, right, 0, down), mode=mode)
    condition, noise = draw(restorer, padded, steps, generator)
    predict = tiled(restorer, tile) if max(padded.shape[-2:]) > tile else None
    path = rollout(restorer, condition, noise.to(lq.device), eta, predict)
    return restorer.decode(path.z[-1], padded)[..., :height, :width]


# ---- files ----

def targets(inputs, out):
    """{its PNG in `out`: file} of files and folders; folders are searched, their tree is kept.

    Raises UserError where a PNG is taken, so no input is written over.
    """
    from utils import UserError, list_images
    files = {}
    for name in map(Path, inputs):
        if not name.exists():
            raise UserError(f"{name}: no such file or folder")
        home = name if name.is_dir() else name.parent
        for file in list_images(name) if name.is_dir() else [name]:
            target = (out / file.relative_to(home)).with_suffix(".png")
            if target in files or target.exists():
                raise UserError(f"{file}: {target} is taken; rename it or choose another --out")
            files[target] = file
    if not files:
        raise UserError("no images; give image files or folders that hold some")
    return files


def main():
    from tqdm import tqdm

    from data import resize
    from model import load
    from utils import UserError, generator, option, parse, pick_device, read_image, write_image

    @dataclass
    class Config:
        """Restores image files."""
        model: str = option("", "folder or name of a restorer; empty: the shipped one of --task")
        task: str = option("", "see data.py; empty: that of --model, or sr")
        scale: int = option(0, "bicubic enlargement before; 0: 4 for sr, 2 for sr2, ...", least=0)
        out: str = option("runs/restored", "folder for the PNGs")
        steps: int = option(0, "DDIM steps, up to 1000; 0: as the restorer was trained", least=0)
        eta: float = option(-1.0, "stochasticity, 0: none; -1: as it was trained", least=-1)
        tile: int = option(0, "largest side that the network sees at once; 0: as trained", least=0)
        seed: int = option(0, "seed of the sampler, the same for every image")

    cfg, inputs = parse(Config, positional="image files or folders")
    files = targets(inputs, Path(cfg.out))
    restorer = load(cfg.model, cfg.task or "sr", pick_device())
    task = cfg.task or (restorer.defaults["task"] if cfg.model else "sr")
    scale = cfg.scale or {"sr": 4, "sr2": 2, "sr3": 3, "sr4": 4}.get(task, 1)
    steps, eta = restorer.settle(cfg.steps, cfg.eta)
    failed = 0
    bar = tqdm(files.items(), unit="image")
    for target, file in bar:
        bar.set_postfix_str(file.name)
        try:
            lq = read_image(file)[None]
        except UserError as error:
            bar.write(f"skipped {error}", file=sys.stderr)
            failed += 1
            continue
        lq = resize(lq, [side * scale for side in lq.shape[-2:]]).clamp(-1, 1)
        noise = generator(cfg.seed)
        image = restore(restorer, lq.to(restorer.device), steps, eta, noise, cfg.tile)
        write_image(target, image[0])
    print(f"wrote {len(files) - failed} PNGs to {cfg.out} ({steps} steps, eta {eta})")
    if failed:
        raise UserError(f"{failed} of {len(files)} files could not be read, see above")


if __name__ == "__main__":
    from utils import run_main
    run_main(main)
