"""Is lesson 5 filled in rightly? KL against torch, the weight against difficulty.py."""

import difficulty
import torch
from lesson5 import kl, sft_coef_for, total_loss, weight
from torch.distributions import Normal, kl_divergence


def test_kl_is_that_of_two_gaussians():
    mean, ref_mean = torch.randn(2, 3, 2, 5, 4, generator=torch.Generator().manual_seed(0))
    sigma_t = torch.tensor([0.1, 0.5, 2.0])
    wide = sigma_t.view(3, 1, 1, 1)
    expected = kl_divergence(Normal(mean, wide), Normal(ref_mean, wide)).mean((1, 2, 3))
    torch.testing.assert_close(kl(mean, ref_mean, sigma_t), expected)
    mean.requires_grad_()
    slope, = torch.autograd.grad(kl(mean, ref_mean, sigma_t).sum(), mean)
    torch.testing.assert_close(slope, (mean - ref_mean).detach() / (40 * wide ** 2))


def test_the_weight_is_half_at_the_median_more_for_the_harder_and_no_outlier_moves_it():
    sft = torch.rand(40, generator=torch.Generator().manual_seed(1))
    distance = torch.tensor([0.0, 0.3, sft.quantile(0.5).item(), 0.7, 1.0])
    w = weight(distance, sft)
    torch.testing.assert_close(w, difficulty.weights("baseline", distance, sft, distance))
    assert w[2] == 0.5 and (w.diff() > 0).all()
    torch.testing.assert_close(weight(0.001 * distance, 0.001 * sft), w)
    sft[sft.argmax()] = 1e6
    torch.testing.assert_close(weight(distance, sft), w)
    assert weight(torch.ones(3), torch.ones(9)).tolist() == [0.5] * 3


def test_each_sample_is_balanced_by_its_own_w():
    w, rl, sft, kl_loss = torch.tensor([[1, 0, 0.5], [4, 2, 5], [10, 20, 30], [1, 1, 4.0]])
    found = total_loss(w, rl, sft, kl_loss, 0.1, 0.5)
    torch.testing.assert_close(found, torch.tensor((4 + 2 + 4) / 3 + 0.5 * 2))


def test_lambda_gives_sft_the_share_that_was_asked_for():
    norm_rl, norm_sft, norm_kl = 0.004, 0.05, 0.0005  # of the gradients; of SFT for lambda 1
    total = norm_rl + 0.03 * norm_sft + norm_kl
    row = {"share_rl": norm_rl / total, "share_sft": 0.03 * norm_sft / total,
           "share_kl": norm_kl / total}
    for share in (0.1, 0.5, 0.75):
        found = sft_coef_for(share, row, 0.03) * norm_sft
        assert abs(found / (found + norm_rl) - share) < 1e-6
