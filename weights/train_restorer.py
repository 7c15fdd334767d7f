"""Trains a restorer that serves several tasks: SFT with one of them at random for each image.

All flags are those of sft.py; --task names the tasks with + between them. What is kept is halved,
to float16: model.load makes float32 of it.

    python weights/train_restorer.py --task dehaze+lowlight --model weights/sr --data photos
"""

import os
import sys
from functools import partial
from pathlib import Path

from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import sft  # noqa: E402
from data import TASKS, degrade_mixed, get_task  # noqa: E402
from utils import atomic, parse, run_main  # noqa: E402


def halve(file):
    """Writes a file of weights again, in float16."""
    weights = {name: x.half() for name, x in load_file(file).items()}
    with atomic(file) as temporary:
        save_file(weights, temporary, {"format": "pt"})


def main():
    cfg = parse(sft.Config)
    kinds = cfg.task.split("+")
    for kind in kinds:
        get_task(kind)  # one line if it is not known
    if len(kinds) > 1:
        TASKS[cfg.task] = partial(degrade_mixed, kinds=kinds)
    sft.train(cfg)
    folder = Path(cfg.out or f"runs/sft-{cfg.task}-{cfg.seed}", "model")
    if os.environ.get("RANK", "0") == "0":  # the process that has saved it
        for file in folder.rglob("*.safetensors"):
            halve(file)


if __name__ == "__main__":
    run_main(main)
