"""The judge's own gradient through the whole chain, instead of the policy gradient. A warning.

  L_RL,i = -M(restored_i),  differentiated through judge, decoder and all steps
as DRaFT does (Clark et al. 2024, arXiv 2309.17400). It has no noise of the policy gradient,
and finds what fools the judge as well. --kl-coef does nothing; the loss sees one view.
First edition, with a judge that had not seen such output: 84 % of the judge's gap to the ground
truth and 56 % of judge2's, LPIPS 0.018 worse, BRISQUE 5.2. Now, with the present sr and weights/
broad before hardening: all of its gap, LPIPS 0.036 better, at -0.56 dB and with 44 % more color
step (results/README.md).

    python examples/reward_gradient.py --task sr --iterations 12 --lr 1e-4 --views 1 \\
        --out runs/fooled
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import reward  # noqa: E402
import rl  # noqa: E402
from sample import rollout  # noqa: E402
from sft import diffusion_loss  # noqa: E402
from utils import UserError, parse, pick_device, run_main  # noqa: E402


def make_step_loss(cfg):
    """step_loss for rl.train; the judge's scores must let gradients through (level words do)."""
    judge = reward.load(cfg.reward, pick_device())
    if not hasattr(judge, "scores") or isinstance(judge, reward.RatingJudge):
        raise UserError(f"--reward {cfg.reward}: has no gradient; take a judge by level words")
    judge.model.requires_grad_(False)

    def step_loss(restorer, reference, cfg, batch, k):
        path, w = batch["path"], batch["weight"]
        # the same chain by the present weights; every step keeps its activations
        z = rollout(restorer, path.condition, batch["noise"], cfg.eta).z[-1]
        score = judge.scores(restorer.decode(z, batch["lq"]))
        sft = diffusion_loss(restorer, batch["z0"], path.condition, batch["t"], batch["eps"])
        terms = {"rl": -(w * score).mean(), "sft": ((1 - w) * cfg.sft_coef * sft).mean()}
        return sum(terms.values()), {"terms": terms, "rl_loss": -score.mean(),
                                     "sft_loss": sft.mean()}
    return step_loss


def main():
    cfg = parse(rl.Config)
    rl.train(cfg, make_step_loss(cfg))


if __name__ == "__main__":
    run_main(main)
