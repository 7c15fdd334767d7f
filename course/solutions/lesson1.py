"""Lesson 1, filled in."""

import math

import torch


def ddim_step(v, z_t, alpha_bar_t, alpha_bar_prev, eta, noise):
    a, b = (x.view(-1, 1, 1, 1) for x in (alpha_bar_t, alpha_bar_prev))
    x0 = a.sqrt() * z_t - (1 - a).sqrt() * v
    eps = a.sqrt() * v + (1 - a).sqrt() * z_t
    sigma = eta * ((1 - b) / (1 - a)).sqrt() * (1 - a / b).sqrt()
    mean = b.sqrt() * x0 + (1 - b - sigma ** 2).clamp(min=0).sqrt() * eps
    return mean + sigma * noise, mean, sigma.flatten()


def log_prob(z_prev, mean, sigma_t):
    stochastic = sigma_t > 0
    s = torch.where(stochastic, sigma_t, 1.0).view(-1, 1, 1, 1)
    density = -(z_prev - mean) ** 2 / (2 * s ** 2) - s.log() - math.log(2 * math.pi) / 2
    return torch.where(stochastic, density.flatten(1).mean(1), 0.0)
