"""Diffusion restorers behind one small interface, so that the same loop trains any of them.

A restorer maps a low-quality image to a distribution over restored images by a diffusion model over a latent z:
  encode(hq, lq) -> z0         the clean latent that stands for hq, (B, C, h, w)
  decode(z, lq) -> image       back to (B, 3, H, W) in [-1, 1]
  predict(z_t, t, lq) -> out   the network's output: epsilon, sample (z0) or v, as `scheduler` says, float32
  scheduler                    diffusers' DDIMScheduler: alphas_cumprod, prediction type, spacing, last step
  net, trainable()             the module and its parameters that train; train_only(part) freezes the others
  defaults                     {"task", "steps", "eta"} the restorer was trained with
  multiple, latent_shape(lq)   sides of lq must be multiples of `multiple`; the shape of z for a given lq
  save(folder), load(...)      diffusers' folder format, safetensors

The pixel restorer, small enough to train on a laptop:
  z0 = residual_scale (hq - lq),   image = lq + z / residual_scale
  out = pixel_shuffle(UNet2DModel([pixel_unshuffle(z_t), pixel_unshuffle(lq)], t))

Chosen here:
 1. The latent is the residual, scaled to about unit variance: lq already holds the low frequencies. Measured in a
    trial: predicting hq itself is 4 dB worse after the same training time.
 2. pixel_unshuffle by 2 quarters the cost of every convolution; no attention, so that any image size works. Group
    normalization still sees the whole input, so a tile's output differs a little from the whole image's.
 3. v-prediction with the squared-cosine schedule (Salimans and Ho 2022, Nichol and Dhariwal 2021), "trailing" steps
    (Lin et al. 2024, arXiv 2305.08891), so that sampling starts from pure noise as training assumes.

    python model.py                    # laptop: prints the size of the shipped restorer
    python model.py --model FOLDER     # any saved restorer
"""

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PIXEL_UNET = dict(block_out_channels=(48, 64, 96), layers_per_block=1, norm_num_groups=8, add_attention=False,
                  down_block_types=("DownBlock2D",) * 3, up_block_types=("UpBlock2D",) * 3)
PIXEL_SCHEDULER = dict(num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction",
                       timestep_spacing="trailing", set_alpha_to_one=True, clip_sample=False)


class PixelRestorer:
    """Residual diffusion in pixel space with a UNet2DModel. Images (B, 3, H, W) in [-1, 1], z of the same shape."""

    family = "pixel"

    def __init__(self, net, scheduler, residual_scale=5.0, unshuffle=2, defaults=None):
        self.net, self.scheduler = net, scheduler
        self.residual_scale, self.unshuffle = residual_scale, unshuffle
        self.defaults = {"task": "sr", "steps": 5, "eta": 1.0} | (defaults or {})
        self.multiple = unshuffle * 2 ** (len(net.config.block_out_channels) - 1)
        self.dtype = torch.float32

    @classmethod
    def create(cls, unshuffle=2, residual_scale=5.0, defaults=None, seed=0, **unet):
        """A restorer with random weights. unet: changes to PIXEL_UNET, e.g. block_out_channels for a larger one."""
        from diffusers import DDIMScheduler, UNet2DModel
        channels = 3 * unshuffle ** 2
        with torch.random.fork_rng(devices=[]):  # diffusers initializes from the global generator only
            torch.manual_seed(seed)
            net = UNet2DModel(in_channels=2 * channels, out_channels=channels, **(PIXEL_UNET | unet))
        return cls(net, DDIMScheduler(**PIXEL_SCHEDULER), residual_scale, unshuffle, defaults)

    @classmethod
    def from_folder(cls, folder, settings):
        from diffusers import DDIMScheduler, UNet2DModel
        net = UNet2DModel.from_pretrained(folder, subfolder="unet", torch_dtype=torch.float32, use_safetensors=True)
        scheduler = DDIMScheduler.from_pretrained(folder, subfolder="scheduler")
        return cls(net, scheduler, settings["residual_scale"], settings["unshuffle"], settings["defaults"])

    def save(self, folder, dtype=torch.float32):
        """Writes unet/, scheduler/ and restorer.json. dtype: of the stored weights; float16 halves the size."""
        net = self.net if dtype == torch.float32 else torch.nn.Module.to(copy.deepcopy(self.net), dtype)
        net.save_pretrained(Path(folder) / "unet", safe_serialization=True)
        self.scheduler.save_pretrained(Path(folder) / "scheduler")
        from utils import write_json
        write_json(Path(folder) / "restorer.json", {
            "family": self.family, "residual_scale": self.residual_scale, "unshuffle": self.unshuffle,
            "defaults": self.defaults})

    def to(self, device, dtype=torch.float32):
        """dtype: of the network's arithmetic (autocast); weights, latents and the scheduler stay float32."""
        self.net.to(device)
        self.dtype = dtype
        return self

    @property
    def device(self):
        return next(self.net.parameters()).device

    def trainable(self):
        """The parameters that an optimizer gets, a list."""
        return [p for p in self.net.parameters() if p.requires_grad]

    def train_only(self, part):
        """Freezes all but a part: "all", or "modulation": normalizations, biases and time embeddings, which scale and
        shift features at each noise level but learn no new filters."""
        for name, p in self.net.named_parameters():
            p.requires_grad_(part == "all" or "norm" in name or "time_emb" in name or name.endswith("bias"))

    def latent_shape(self, lq):
        return lq.shape

    def encode(self, hq, lq):
        return self.residual_scale * (hq - lq)

    def decode(self, z, lq):
        return (lq + z / self.residual_scale).clamp(-1, 1)

    def predict(self, z_t, t, lq):
        """z_t, lq: (B, 3, H, W); t: (B,) integer timesteps. Returns (B, 3, H, W) float32."""
        x = F.pixel_unshuffle(torch.cat([z_t, lq], dim=1), self.unshuffle)  # (B, 6 u^2, H/u, W/u)
        with torch.autocast(x.device.type, self.dtype, enabled=self.dtype != torch.float32):
            out = self.net(x, t).sample
        return F.pixel_shuffle(out.float(), self.unshuffle)  # (B, 3, H, W)

    def frozen_copy(self):
        """The same restorer with weights of its own that do not train: the KL reference."""
        other = copy.copy(self)
        other.net = copy.deepcopy(self.net).requires_grad_(False).eval()
        return other


FAMILIES = {"pixel": PixelRestorer}


def load(name, device="cpu", dtype="float32", task="sr"):
    """The restorer in a folder, or the shipped one (name empty: weights/TASK). Dropout off, ready to sample and train.

    Raises UserError that says what is missing.
    """
    from utils import UserError
    folder = Path(name) if name else Path(__file__).parent / "weights" / task
    if not (folder / "restorer.json").is_file():
        raise UserError(f"--model {folder}: no restorer.json there; give a folder that sft.py or rl.py has saved")
    if dtype not in DTYPES:
        raise UserError(f"--dtype {dtype}: unknown; choose one of {', '.join(DTYPES)}")
    try:
        settings = json.loads((folder / "restorer.json").read_text())
        restorer = FAMILIES[settings["family"]].from_folder(folder, settings)
    except (OSError, KeyError, ValueError, RuntimeError, TypeError) as error:
        raise UserError(f"--model {folder}: incomplete or damaged ({str(error).splitlines()[0]}); "
                        "save it again or copy the whole folder") from None
    restorer.net.eval()
    return restorer.to(device, DTYPES[dtype])


@dataclass
class Config:
    model: Annotated[str, "folder of a saved restorer; empty: the shipped one of --task"] = ""
    task: Annotated[str, "task of the shipped restorer"] = "sr"


def main():
    from utils import parse
    cfg = parse(Config, description="Prints what a saved restorer is.")
    restorer = load(cfg.model, task=cfg.task)
    count = sum(p.numel() for p in restorer.net.parameters())
    print(f"{restorer.family}: {count / 1e6:.2f} M parameters, {restorer.scheduler.config.prediction_type}, "
          f"sides a multiple of {restorer.multiple}, trained as {restorer.defaults}")


if __name__ == "__main__":
    from utils import run_main
    run_main(main)
