"""Trains a small VQ autoencoder; around it stands an ldm-sr whose UNet has still to learn.

At full scale a latent restorer is downloaded; this begins a small one of the same classes, in a
folder that sft.py, rl.py and the stock pipeline load.

  loss = (decode(e) - x)^2 + 0.02 (|z - sg e|^2 + 0.25 |sg z - e|^2),   z = encode(x)
(van den Oord et al. 2017, arXiv 1711.00937, eq. 3; e: the entry of the codebook nearest to z, sg:
without gradient; the weights of the brackets are those of diffusers.)

Chosen here
 1. Factor 2: three channels of a quarter of the pixels. With factor 4, as published, z0 would
    have no more numbers than lq of x4 itself.
 2. The codebook starts as a grid over [-2, 2]^3. The stock start lies next to 0, where few entries
    get chosen. Latents then have about unit variance, which diffusion wants.

    python weights/train_autoencoder.py --data photos --out runs/latent               # laptop
    python sft.py --task sr --model runs/latent/model --data photos --out runs/sft-latent
    python rl.py --task sr --model runs/sft-latent/model --max-drop 99 --out runs/rl-latent
"""

import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import model  # noqa: E402
from data import Crops, get_task, held_out, open_split  # noqa: E402
from eval import save_grid  # noqa: E402
from reward import psnr  # noqa: E402
from sft import learning_rate  # noqa: E402
from utils import (UserError, new_run, option, parse, pick_device, run_main,  # noqa: E402
                   write_json)

LEVELS = 10  # of each channel in the codebook: with 16 its search takes two thirds of the time


def build():
    """-> an ldm-sr with random weights: autoencoder of factor 2, the rest as a pixel one has."""
    from diffusers import UNet2DModel, VQModel
    vae = model.seeded(VQModel, block_out_channels=(32, 64), norm_num_groups=8,
                       num_vq_embeddings=LEVELS ** 3, mid_block_add_attention=False,
                       down_block_types=["DownEncoderBlock2D"] * 2,
                       up_block_types=["UpDecoderBlock2D"] * 2)
    line = torch.linspace(-2, 2, LEVELS)
    vae.quantize.embedding.weight.data.copy_(torch.cartesian_prod(line, line, line))
    pixel = model.PixelRestorer.create()
    net = model.seeded(UNet2DModel.from_config, pixel.net.config, in_channels=6, out_channels=3)
    return model.LDMSR(net, pixel.scheduler, {"vqvae": vae}, defaults=pixel.defaults)


@dataclass
class Config:
    """Trains the autoencoder of a small latent restorer."""
    data: str = option("", "folder of photographs; empty: those inside the packages")
    model: str = option("", "folder of an earlier run's model to go on from; empty: random weights")
    out: str = option("runs/latent", "folder of the run")
    seed: int = option(0, "seed of the crops", least=0)
    steps: int = option(2000, "optimizer steps", least=1)
    batch: int = option(16, "crops per step", least=1)
    size: int = option(64, "side of a crop in pixels", least=16)
    lr: float = option(1e-3, "peak learning rate of AdamW", least=0)


def train(cfg):
    """Leaves model/, the restorer, and reconstructions.png in cfg.out; prints their PSNR."""
    device, degrade = pick_device(), get_task("sr")  # the crops' lq is not used
    photographs = SimpleNamespace(data=cfg.data, lq="", hq="")
    source = open_split(photographs, "train")
    _, hq, _ = held_out(open_split(photographs, "val"), degrade, cfg.size, 64)
    restorer = model.load(cfg.model) if cfg.model else build()
    if restorer.family != "ldm-sr":
        raise UserError(f"--model {cfg.model}: is no ldm-sr; give the model of an earlier run")
    restorer.to(device, torch.bfloat16).check_size(cfg.size)
    out, vae = new_run(cfg.out), restorer.vae.requires_grad_(True).train()
    optimizer = torch.optim.AdamW(vae.parameters(), cfg.lr)
    crops = Crops(source, degrade, cfg.size, cfg.seed, cfg.steps * cfg.batch)
    bar = tqdm(DataLoader(crops, cfg.batch), "autoencoder")
    for step, (_, x) in enumerate(bar):
        optimizer.param_groups[0]["lr"] = learning_rate(step, cfg.steps, cfg.lr, cfg.steps / 10)
        x = x.to(device)
        with torch.autocast(x.device.type, enabled=restorer.dtype == torch.bfloat16,
                            dtype=torch.bfloat16):
            image, commitment = vae(x, return_dict=False)
            loss = (image - x).square().mean() + 0.02 * commitment
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        if not norm.isfinite():
            raise UserError(f"step {step}: the gradient is not finite; lower --lr")
        optimizer.step()
        if step % 10 == 9:
            bar.set_postfix(loss=f"{loss.item():.3g}")
    vae.requires_grad_(False).eval()
    with torch.no_grad():
        images = restorer.decode(restorer.encode(hq.to(device), None), None).cpu()
    print(f"validation: {psnr(images, hq).mean():.2f} dB")
    save_grid(out / "reconstructions.png", {"hq": hq[:8], "reconstruction": images[:8]})
    restorer.save(out / "model")
    write_json(out / "config.json", asdict(cfg))
    print(f"wrote {out}: model/, config.json, reconstructions.png")


def main():
    train(parse(Config))


if __name__ == "__main__":
    run_main(main)
