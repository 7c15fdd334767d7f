"""Lesson 3, filled in."""

import torch


def level_score(logits, ids):
    values = torch.linspace(1, 0, len(ids))
    return logits[:, ids].softmax(-1) @ values


def fool(score, images, radius, steps):
    fooled = images.clone()
    for _ in range(steps):
        fooled.requires_grad_()
        slope, = torch.autograd.grad(score(fooled).sum(), fooled)
        fooled = fooled.detach() + 2 * radius / steps * slope.sign()
        fooled = fooled.clamp(images - radius, images + radius).clamp(-1, 1)
    return fooled
