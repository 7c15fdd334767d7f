"""Lesson 2, filled in."""


def diffusion_loss(predict, z0, t, alphas_cumprod, eps):
    a = alphas_cumprod[t].view(-1, 1, 1, 1)
    z_t = a.sqrt() * z0 + (1 - a).sqrt() * eps
    v = a.sqrt() * eps - (1 - a).sqrt() * z0
    return ((v - predict(z_t, t)) ** 2).flatten(1).mean(1)


def best_v(z_t, alpha_bar_t, std):
    a = alpha_bar_t.view(-1, 1, 1, 1)
    covariance = (a * (1 - a)).sqrt() * (1 - std ** 2)
    return covariance / (a * std ** 2 + 1 - a) * z_t
