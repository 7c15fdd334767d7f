"""A restorer of one's own around a plain nn.Module, entered in model.FAMILIES.

It says how an image becomes the latent z and back (encode, decode), what the network sees
(forward), and how its network is saved and read. Everything else, SFT, RL, sampling, evaluation, is
the same. `--trainable` takes words in the names of its parameters ("head": the last layer here).

    python examples/new_restorer.py sft --task denoise --steps 400 --out runs/sft-mine
    python examples/new_restorer.py rl --task denoise --model runs/sft-mine/model \\
        --trainable head --out runs/rl-mine
"""

import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))

import model  # noqa: E402
import rl  # noqa: E402
import sft  # noqa: E402
from utils import UserError, parse, run_main  # noqa: E402


class Network(nn.Module):
    """A few convolutions over the noisy residual, lq and the time as a plane."""

    def __init__(self, width=32):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(7, width, 3, padding=1), nn.SiLU(),
                                  nn.Conv2d(width, width, 3, padding=1), nn.SiLU())
        self.head = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, z_t, t, lq):
        time = (t.float() / 1000).view(-1, 1, 1, 1).expand(-1, 1, *lq.shape[2:])
        return self.head(self.body(torch.cat([z_t, lq, time], 1)))


class Mine(model.Restorer):
    """z = scale (hq - lq), predicted as epsilon."""

    family, settings = "mine", {"scale": 5.0}  # settings are saved in restorer.json

    @classmethod
    def create(cls):
        from diffusers import DDIMScheduler
        scheduler = DDIMScheduler(clip_sample=False, timestep_spacing="trailing")
        return cls(model.seeded(Network), scheduler, defaults={"steps": 5})

    def encode(self, hq, lq):
        return self.settings["scale"] * (hq - lq)

    def decode(self, z, lq):
        return (lq + z / self.settings["scale"]).clamp(-1, 1)

    def forward(self, z_t, t, condition):
        return self.net(z_t, t, condition)

    def save_parts(self, folder, net):
        from safetensors.torch import save_file
        save_file(net.state_dict(), folder / "network.safetensors")
        self.scheduler.save_pretrained(folder / "scheduler")

    @classmethod
    def from_folder(cls, folder, defaults, settings):
        from diffusers import DDIMScheduler
        from safetensors.torch import load_file
        net = Network()
        net.load_state_dict(load_file(folder / "network.safetensors"))
        scheduler = DDIMScheduler.from_pretrained(folder / "scheduler")
        return cls(net, scheduler, settings=settings, defaults=defaults)


def main():
    model.FAMILIES["mine"] = Mine
    stage, *words = sys.argv[1:] or [""]
    if stage not in ("sft", "rl"):
        raise UserError("usage: new_restorer.py sft ... | rl ...")
    if stage == "sft":
        words = ["--model", "mine", *words]  # random weights, unless words name a folder
    script = sft if stage == "sft" else rl
    script.train(parse(script.Config, words))


if __name__ == "__main__":
    run_main(main)
