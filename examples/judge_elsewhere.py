"""The judge on a card of its own: it scores a micro-batch while the next one is restored.

Without it the cards that restore wait for the judge. Each process takes the first card that no
process restores on, or --judge-device. The rewards are those of rl.collect, and so are the weights.
No gain was measured: no machine with two cards was at hand.

    python examples/judge_elsewhere.py --task sr                 # two cards: 0 restores, 1 judges
    accelerate launch --num_processes 4 examples/judge_elsewhere.py --model ldm-sr \\
        --reward qrealign-mini --data DIR --size 256 --micro-batch 8     # eight cards: 4 and 4
"""

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import reward  # noqa: E402
import rl  # noqa: E402
from utils import one_line, option, parse, run_main  # noqa: E402

plain_collect = rl.collect


def collect(restorer, judge, lq, hq, gen, cfg, accelerator, keep=True):
    """rl.collect, whose judge takes an image, answers nothing yet, and works in a thread."""
    with ThreadPoolExecutor(1) as thread:
        jobs = []

        def later(images, refs):
            jobs.append(thread.submit(judge, images, refs))
            return torch.zeros(len(images), device=images.device)
        batches, rewards = plain_collect(restorer, later, lq, hq, gen, cfg, accelerator, keep)
        scores = [job.result() for job in jobs]  # of each micro-batch, one for each judged step
    steps = rewards.shape[1]
    parts = [torch.stack(scores[i:i + steps], 1) for i in range(0, len(scores), steps)]
    return batches, accelerator.gather(torch.cat(parts).to(accelerator.device)).cpu()


@dataclass
class Config(rl.Config):
    """rl.py with a judge on another device."""
    judge_device: str = option("", "of the judge; empty: the first card on which none restores")


def main():
    cfg = parse(Config)
    count, own = (int(os.environ.get(f"LOCAL_{x}", y)) for x, y in (("WORLD_SIZE", 1), ("RANK", 0)))
    device = cfg.judge_device or f"cuda:{count + own}"
    with one_line(f"--judge-device {device}", "give one that is there, as cpu"):
        torch.empty(1, device=device)
    rl.load_reward, rl.collect = lambda name, _: reward.load(name, device), collect
    rl.train(cfg)


if __name__ == "__main__":
    run_main(main)
