"""A reward of one's own: any function (images, refs) -> (B,), entered in reward.REWARDS.

images, refs: (B, 3, H, W) in [-1, 1]; higher is better; an image's score must not depend on the
batch beside it; NaN means "no score". It may be a sum of others: a composite reward, as here. Its
score can exceed that of the ground truth, so `--cap none` is the setting to think about.

    python examples/new_reward.py --task sr --reward mine --iterations 8 --out runs/mine
"""

import sys
from functools import cache, partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import reward  # noqa: E402
import rl  # noqa: E402
from utils import parse, run_main  # noqa: E402


judge = cache(partial(reward.load, "judge"))  # of a device, loaded at the first call


def composite(images, refs):
    """0.8 judge + 0.2 SSIM, both in [0, 1]."""
    return 0.8 * judge(images.device)(images) + 0.2 * reward.ssim(images, refs)


def main():
    reward.REWARDS["mine"] = composite
    rl.train(parse(rl.Config))


if __name__ == "__main__":
    run_main(main)
