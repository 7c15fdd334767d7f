"""Plain DDPO, to compare with: group statistics, no memory, no difficulty, no SFT, no KL.

Black et al. 2024, arXiv 2305.13301: A = (r - mean) / std over the restorations of the same input
in this iteration; the loss is PPO's alone. What is left of rl.py is its sampler and its loop:
--weight, --sft-coef and --kl-coef do nothing.

    python examples/ddpo.py --task sr --inputs 32 --samples 4 --cap none --out runs/ddpo
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import rl  # noqa: E402
from sample import replay  # noqa: E402
from utils import UserError, parse, run_main  # noqa: E402


def group_advantages(samples):
    """Replaces difficulty.advantages: rewards (S, K) of S / samples inputs, one after the other.

    A NaN among an input's rewards leaves all of them without an advantage."""
    def advantages(rewards, baseline):
        groups = rewards.view(-1, samples, rewards.shape[1])
        gain = groups - groups.mean(1, keepdim=True)
        return (gain / (groups.std(1, keepdim=True) + 1e-4)).view_as(rewards).nan_to_num(0.0)
    return advantages


def step_loss(restorer, reference, cfg, batch, k):
    """PPO's clipped loss of denoising step k -> (loss, info)."""
    path = batch["path"]
    step = replay(restorer, path, k, cfg.eta)
    advantage = batch["advantage"][:, k]
    loss, info = rl.policy_loss(step.log_prob, path.log_prob[k], advantage, rl.CLIP_RANGE)
    info |= {"terms": {"rl": loss.mean()}, "rl_loss": loss.mean()}
    return loss.mean(), info


def main():
    cfg = parse(rl.Config)
    if cfg.samples < 2:
        raise UserError("--samples: DDPO compares the restorations of one input; give 2 or more")
    rl.advantages = group_advantages(cfg.samples)
    rl.train(cfg, step_loss)


if __name__ == "__main__":
    run_main(main)
