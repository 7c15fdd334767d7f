"""Memory, advantage, distance and weight: against plain loops and by their properties."""

import statistics

import pytest
import torch

from difficulty import RewardMemory, advantages, iqa_gap, median_spread, weights


def test_memory_keeps_the_latest_of_each_input_and_step(gen):
    memory, seen = RewardMemory(3, steps=2, size=4), {}
    for _ in range(9):
        ids = torch.tensor([2, 0, 2])
        rewards = torch.rand(3, 2, generator=gen)
        memory.push(ids, rewards)
        for i, row in zip(ids.tolist(), rewards.tolist()):
            for k in range(2):
                seen[i, k] = (seen.get((i, k), []) + [row[k]])[-4:]
        mean = memory.mean()
        assert mean[1].isnan().all()  # never seen
        for (i, k), history in seen.items():
            assert mean[i, k].item() == pytest.approx(statistics.fmean(history), abs=1e-6)


def test_memory_ignores_nan_and_survives_a_checkpoint():
    memory = RewardMemory(2, size=3)
    memory.push(torch.tensor([0] * 4), torch.tensor([[0.3], [0.2], [float("nan")], [0.4]]))
    assert memory.mean()[0].item() == pytest.approx(0.3) and memory.count[0].item() == 3
    memory.push(torch.tensor([0]), torch.tensor([[0.5]]))  # in the place of the first
    other = RewardMemory(2, size=3)
    other.load_state_dict({key: x.clone() for key, x in memory.state_dict().items()})
    for each in (memory, other):
        each.push(torch.tensor([0]), torch.tensor([[1.0]]))
    assert other.mean()[0].item() == memory.mean()[0].item() == pytest.approx(1.9 / 3)


def test_advantage_equals_a_plain_loop(gen):
    rewards, baseline = torch.rand(2, 6, 2, generator=gen)
    got = advantages(rewards, baseline)
    for k in range(2):
        gain = [r - b for r, b in zip(rewards[:, k].tolist(), baseline[:, k].tolist())]
        mean, std = statistics.fmean(gain), statistics.pstdev(gain)
        expected = [(g - mean) / (std + 1e-4) for g in gain]
        assert got[:, k].tolist() == pytest.approx(expected, abs=1e-4)


def test_the_memory_does_not_cancel():
    a = advantages(torch.full((4, 1), 0.5), torch.tensor([[0.2], [0.2], [0.8], [0.8]]))[:, 0]
    assert (a[:2] > 0.9).all() and (a[2:] < -0.9).all()


def test_advantage_is_clipped_and_finite(gen):
    rewards, baseline = torch.rand(2, 40, 1, generator=gen)
    assert (advantages(torch.full((4, 1), 0.3), torch.full((4, 1), 0.3)) == 0).all()
    spike = advantages(torch.tensor([[9.0]] + [[0.3]] * 39), torch.full((40, 1), 0.3))
    assert spike.max().item() == 5.0
    rewards[3] = float("nan")
    baseline[5] = float("nan")
    a = advantages(rewards, baseline)
    assert a[3] == 0 and a.isfinite().all() and a[5] != 0
    with pytest.raises(ValueError, match="not both"):  # (40,) would be spread over (40, 40)
        advantages(rewards[:, 0], baseline)


def test_distance_is_zero_beyond_the_ground_truth():
    distance = iqa_gap(torch.tensor([0.2, 0.9]), torch.tensor([0.5, 0.5]))
    assert distance.tolist() == pytest.approx([0.3, 0.0])


def test_median_and_spread_are_those_of_a_gaussian(gen):
    x = torch.randn(100000, generator=gen) * 3 + 2
    x[0] = float("nan")
    assert median_spread(x) == (pytest.approx(2, abs=0.05), pytest.approx(3, abs=0.05))
    assert median_spread(torch.ones(4))[1] > 0


def test_weight_rises_with_distance_and_is_half_at_the_median():
    distance = torch.linspace(0, 1, 9)
    m, s = median_spread(distance)
    w = weights("baseline", distance, distance, None)
    assert (w.diff() > 0).all() and w[4].item() == pytest.approx(0.5)
    one, unknown = weights("baseline", torch.tensor([m + s, float("nan")]), distance, None)
    assert one.item() == pytest.approx(0.8808, abs=1e-4) and unknown.item() == 0


def test_baseline_lets_sft_take_over_and_running_does_not():
    hard = torch.linspace(0.2, 1.0, 8)
    easy = hard / 4  # training brought every sample closer
    before = weights("baseline", hard, hard, hard).mean()
    assert weights("baseline", easy, hard, easy).mean() < 0.5 * before
    assert weights("running", easy, hard, easy).mean() == pytest.approx(before.item(), abs=1e-4)


def test_fixed_weight_and_bad_specs():
    x = torch.rand(3)
    assert weights("fixed:0.25", x, x, x).tolist() == [0.25] * 3
    for spec in ("fixed:2", "fixed:-0.5", "fixed:x", "fixed:nan", "hard", ""):
        with pytest.raises(ValueError):
            weights(spec, x, x, x)
