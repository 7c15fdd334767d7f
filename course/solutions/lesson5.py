"""Lesson 5, filled in."""

import torch


def kl(mean, ref_mean, sigma_t):
    return (mean - ref_mean).square().flatten(1).mean(1) / (2 * sigma_t ** 2)


def weight(distance, distance_sft):
    low, m, high = torch.quantile(distance_sft, torch.tensor([0.25, 0.5, 0.75]))
    s = ((high - low) / 1.349).clamp(min=1e-6)
    return torch.sigmoid(2 * (distance - m) / s)


def total_loss(w, rl_loss, sft_loss, kl_loss, sft_coef, kl_coef):
    balanced = w * rl_loss + (1 - w) * sft_coef * sft_loss
    return balanced.mean() + kl_coef * kl_loss.mean()


def sft_coef_for(share, row, sft_coef):
    return sft_coef * share / (1 - share) * row["share_rl"] / row["share_sft"]
