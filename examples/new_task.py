"""A task of one's own: a function (hq, generator) -> (lq, severity), entered in data.TASKS.

hq, lq: (B, 3, H, W) in [-1, 1], of one size; severity (B,) in [0, 1] says how bad each lq is. All
randomness comes from the generator. No restorer in weights/ knows the task: train one, then use it.

    python examples/new_task.py sft --steps 400 --out runs/sft-pixelate
    python examples/new_task.py rl --model runs/sft-pixelate/model --out runs/pixelate
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))

import data  # noqa: E402
import rl  # noqa: E402
import sft  # noqa: E402
from utils import UserError, parse, run_main  # noqa: E402


def pixelate(hq, generator):
    """Mosaic of 2 x 2 or 4 x 4 pixels, as faces are hidden: every block is its mean."""
    severity = torch.randint(2, (len(hq),), generator=generator).float()
    height, width = hq.shape[2:]

    def mosaic(side):
        means = F.avg_pool2d(hq, side, ceil_mode=True)
        blocks = means.repeat_interleave(side, 2).repeat_interleave(side, 3)
        return blocks[..., :height, :width]
    chosen = severity.view(-1, 1, 1, 1).to(hq.device)
    return torch.lerp(mosaic(2), mosaic(4), chosen), severity


def main():
    data.TASKS["pixelate"] = pixelate
    stage, *words = sys.argv[1:] or [""]
    if stage not in ("sft", "rl"):
        raise UserError("usage: new_task.py sft ... | rl ...")
    script = sft if stage == "sft" else rl
    script.train(parse(script.Config, ["--task", "pixelate", *words]))


if __name__ == "__main__":
    run_main(main)
