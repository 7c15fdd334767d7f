"""Is lesson 3 filled in rightly? The score is the shipped judge's own, and it is fooled."""

import math

import kit
import pytest
import reward
import torch
from lesson3 import fool, level_score

IDS = [4, 2, 9, 0, 7]


def random(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_levels_are_worth_1_to_0_and_other_words_do_not_count():
    logits = torch.full((6, 10), -50.0)
    for level, token in enumerate(IDS):
        logits[level, token] = 50.0
    logits[5, IDS[0]], logits[5, IDS[1]] = math.log(3), 0.0  # three times as likely
    expected = torch.tensor([1, 0.75, 0.5, 0.25, 0, 0.75 * 1 + 0.25 * 0.75])
    torch.testing.assert_close(level_score(logits, IDS), expected)
    logits[:, 1] = 90.0  # "The quality of the image is nice"
    torch.testing.assert_close(level_score(logits, IDS), expected)


def test_a_linear_score_is_fooled_as_far_as_the_radius_and_the_range_allow():
    slope, images = random(0, 3, 8, 8), random(1, 2, 3, 8, 8).clamp(-1, 1)
    before = images.clone()
    fooled = fool(lambda x: (x * slope).sum((1, 2, 3)), images, 0.1, 5)
    torch.testing.assert_close(fooled, (before + 0.1 * slope.sign()).clamp(-1, 1))
    assert images.equal(before) and not (images.requires_grad or fooled.requires_grad)


def test_a_step_is_twice_the_radius_over_the_number_of_steps():
    seen, images = [], torch.zeros(1, 3, 8, 8)

    def score(x):
        seen.append(x.detach())
        return x.sum((1, 2, 3))
    fool(score, images, 0.08, 8)
    torch.testing.assert_close(seen[1], images + 0.02)
    torch.testing.assert_close(seen[7], images + 0.08)  # put back in each step, not at the end


def test_each_step_looks_at_the_gradient_again():
    peak = 0.97
    fooled = fool(lambda x: -(x - peak).square().sum((1, 2, 3)), torch.full((1, 3, 8, 8), 0.96),
                  0.08, 8)
    assert (fooled - peak).abs().max() < 0.025


@pytest.mark.parametrize("name", ("judge", "judge2"))
def test_your_score_is_that_of_the_shipped_judge_and_is_fooled(name):
    judge, (lq, hq) = reward.load(name), kit.crops(2)
    with torch.no_grad():
        inputs = judge.inputs((hq + 1) * 127.5)
        logits = judge.model(**inputs, use_cache=False, logits_to_keep=1).logits[:, -1].float()
    torch.testing.assert_close(level_score(logits, judge.ids), judge(hq), atol=1e-3, rtol=0)
    radius = 2 * 2 / 255
    fooled = fool(judge.scores, lq, radius, 6)
    chance = (lq + radius * random(2, *lq.shape).sign()).clamp(-1, 1)
    assert (fooled - lq).abs().max() <= radius + 1e-6
    assert judge(fooled).mean() > max(judge(lq).mean(), judge(chance).mean()) + 0.02
    assert reward.psnr(fooled, hq).mean() < reward.psnr(lq, hq).mean() + 0.1  # nothing is restored
    assert all(weight.grad is None for weight in judge.model.parameters())
