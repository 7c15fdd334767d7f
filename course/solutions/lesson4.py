"""Lesson 4, filled in."""

import torch


def advantages(rewards, history, clip=5.0, delta=1e-4):
    usual = history.nanmean(1)
    usual = torch.where(usual.isnan(), rewards.mean(), usual)
    gain = rewards - usual
    gain = gain - gain.mean()
    return (gain / (gain.square().mean().sqrt() + delta)).clamp(-clip, clip)


def clipped_loss(log_prob, old_log_prob, advantage, clip_range):
    rho = (log_prob - old_log_prob).exp()
    clipped = rho.clamp(1 - clip_range, 1 + clip_range)
    return torch.maximum(-advantage * rho, -advantage * clipped)


def clipped_gradient(log_prob, old_log_prob, advantage, clip_range):
    rho = (log_prob - old_log_prob).exp()
    too_good = (advantage > 0) & (rho > 1 + clip_range)
    too_bad = (advantage < 0) & (rho < 1 - clip_range)
    return torch.where(too_good | too_bad, 0.0, -advantage * rho)
