"""The RL term as the signed SFT loss on own samples, instead of the policy gradient of each step.

  L_RL,i = A_i || network(z_t, t, lq_i) - target(z0_hat_i) ||^2,   z0_hat_i the sampled latent
at random times t: good restorations are learned from as if they were ground truth, bad ones are
unlearned. A step's own noise is a small part of what makes a sample good, the sample's whole
displacement is all of it, so this needs fewer samples. (Advantage-weighted matching and other
estimators by the evidence lower bound, ELBO; the weights, SFT and KL are those of rl.py.)

    python examples/elbo.py --task sr --inputs 16 --samples 4 --lr 1e-4 --sft-coef 0.1 \\
        --iterations 12 --out runs/elbo
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import rl  # noqa: E402
from sample import replay  # noqa: E402
from sft import diffusion_loss  # noqa: E402
from utils import parse, run_main  # noqa: E402


def step_loss(restorer, reference, cfg, batch, k):
    """rl.step_loss with another first term -> (loss, info); k is the step that KL looks at."""
    path, w, t, eps = batch["path"], batch["weight"], batch["t"], batch["eps"]
    own = diffusion_loss(restorer, path.z[-1], path.condition, t, eps)
    pull = batch["advantage"][:, -1] * own
    sft = diffusion_loss(restorer, batch["z0"], path.condition, t, eps)
    step = replay(restorer, path, k, cfg.eta)
    with torch.no_grad():
        ref_mean = replay(reference, path, k, cfg.eta).mean
    kl = rl.kl_to_reference(step.mean, ref_mean, step.sigma_t)
    terms = {"rl": (w * pull).mean(), "sft": ((1 - w) * cfg.sft_coef * sft).mean(),
             "kl": (cfg.kl_coef * kl).mean()}
    return sum(terms.values()), {"terms": terms, "rl_loss": pull.mean(), "sft_loss": sft.mean(),
                                 "kl": kl.mean()}


def main():
    rl.train(parse(rl.Config), step_loss)


if __name__ == "__main__":
    run_main(main)
