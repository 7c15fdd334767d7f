"""Is lesson 1 filled in rightly? The step against diffusers, the density against torch."""

import pytest
import torch
from diffusers import DDIMScheduler
from lesson1 import ddim_step, log_prob
from torch.distributions import Normal

SCHEDULER = DDIMScheduler(beta_schedule="squaredcos_cap_v2", timestep_spacing="trailing",
                          prediction_type="v_prediction", clip_sample=False)
ALPHA_BAR = SCHEDULER.alphas_cumprod


def random(seed):
    return torch.randn(3, 2, 5, 4, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("eta", (0.0, 0.5, 1.0))
def test_a_step_is_that_of_diffusers_for_three_samples_at_three_times(eta):
    SCHEDULER.set_timesteps(4)  # 999, 749, 499, 249
    times, v, z_t, noise = [749, 499, 249], random(0), random(1), random(2)
    alpha_bar_prev = torch.stack([ALPHA_BAR[499], ALPHA_BAR[249], torch.tensor(1.0)])
    z_prev, mean, sigma_t = ddim_step(v, z_t, ALPHA_BAR[times], alpha_bar_prev, eta, noise)
    expected = [SCHEDULER.step(v[i:i + 1], t, z_t[i:i + 1], eta=eta, variance_noise=noise[i:i + 1])
                for i, t in enumerate(times)]
    torch.testing.assert_close(z_prev, torch.cat([step.prev_sample for step in expected]))
    assert sigma_t.shape == (3,) and sigma_t[2] == 0
    torch.testing.assert_close(mean + sigma_t.view(3, 1, 1, 1) * noise, z_prev)


def test_a_first_step_to_any_time_is_finite_for_eta_1():
    a, b, ones = ALPHA_BAR[999].expand(998), ALPHA_BAR[1:999], torch.ones(998, 1, 1, 1)
    assert ddim_step(ones, ones, a, b, 1.0, ones)[0].isfinite().all()


def test_log_prob_is_the_mean_of_the_gaussian_log_density():
    mean, sigma_t = random(3), torch.tensor([0.003, 0.5, 2.0])
    z_prev = mean + sigma_t.view(3, 1, 1, 1) * random(4)
    density = Normal(mean, sigma_t.view(3, 1, 1, 1)).log_prob(z_prev)
    torch.testing.assert_close(log_prob(z_prev, mean, sigma_t), density.mean((1, 2, 3)))


def test_a_step_without_noise_has_log_prob_0_and_gradient_0():
    mean = random(5).requires_grad_()
    result = log_prob(random(6), mean, torch.tensor([0.0, 0.5, 0.0]))
    result.sum().backward()
    assert result[0] == result[2] == 0 != result[1]
    assert mean.grad.isfinite().all() and not mean.grad[0].any() and mean.grad[1].any()
