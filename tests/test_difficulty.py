"""Memory, advantage, distance and weight: against plain loops and by their properties."""

import json
import shutil
import statistics
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from difficulty import Difficulty, RewardMemory, advantages, iqa_gap, median_spread, mse, relative_weight


def test_advantage_equals_a_plain_loop():
    memory, seen, gen = RewardMemory(size=6), {}, torch.Generator().manual_seed(0)
    for _ in range(5):
        rewards, keys = torch.rand(6, generator=gen), ["a", "a", "b", "b", "b", "c"]
        got = advantages(rewards, keys, memory, min_count=4, clip=5.0, delta=1e-4)
        for key, reward in zip(keys, rewards.tolist()):
            seen[key] = (seen.get(key, []) + [reward])[-6:]
        histories = [seen[key] if len(seen[key]) >= 4 else rewards.tolist() for key in keys]
        floor = statistics.fmean(statistics.pvariance(h) for h in histories) ** 0.5
        expected = [(reward - statistics.fmean(h)) / (max(statistics.pstdev(h), floor) + 1e-4)
                    for reward, h in zip(rewards.tolist(), histories)]
        mean = {key: statistics.fmean(a for a, k in zip(expected, keys) if k == key) for key in "ab"}
        centred = [a - mean.get(key, 0.0) for a, key in zip(expected, keys)]  # a single sample keeps its own
        assert got.tolist() == pytest.approx(centred, abs=1e-4)


def test_advantage_is_clipped_and_finite_for_equal_rewards():
    memory = RewardMemory()
    assert (advantages(torch.full((8,), 0.3), ["a"] * 8, memory).abs() < 1e-2).all()
    spike = advantages(torch.tensor([9.0] + [0.3] * 7), ["a"] * 8, memory, clip=2.0)
    assert spike[0].item() == pytest.approx(2.0) and spike[1:].max() < 0


def test_small_differences_are_not_blown_up():
    """Input a differs by a thousandth between samples, b by a tenth: a's advantages stay small."""
    rewards = torch.tensor([0.500, 0.501, 0.500, 0.501, 0.4, 0.5, 0.4, 0.5])
    advantage = advantages(rewards, ["a"] * 4 + ["b"] * 4, RewardMemory()).abs()
    assert advantage[:4].max() < 0.02 and advantage[4:].min() > 0.5


def test_lone_samples_have_a_signal_thanks_to_their_history():
    """Two inputs, one sample each, the same reward: good news for one of them, bad news for the other."""
    memory = RewardMemory()
    advantages(torch.tensor([0.1, 0.2, 0.3, 0.2, 0.7, 0.8, 0.9, 0.8]), ["a"] * 4 + ["b"] * 4, memory)
    a, b = advantages(torch.tensor([0.5, 0.5]), ["a", "b"], memory).tolist()
    assert a > 1 > -1 > b


def test_memory_is_bounded_and_survives_json():
    memory = RewardMemory(size=3)
    for i in range(10):
        memory.push("x", i)
    assert memory.stats("x") == (8.0, pytest.approx(statistics.pstdev([7, 8, 9])), 3)
    assert memory.stats("unknown") == (0.0, 0.0, 0)
    other = RewardMemory()
    other.load_state_dict(json.loads(json.dumps(memory.state_dict())))
    other.push("x", 10.0), memory.push("x", 10.0)
    assert other.state_dict() == memory.state_dict()


def test_distances():
    assert torch.equal(iqa_gap(torch.tensor([0.2, 0.9]), torch.tensor([0.5, 0.5])), torch.tensor([0.5 - 0.2, 0.0]))
    x, y = torch.zeros(2, 3, 4, 4), torch.stack([torch.zeros(3, 4, 4), torch.full((3, 4, 4), 0.5)])
    assert mse(x, y).tolist() == [0.0, 0.25]


def test_weight_rises_with_distance_and_is_half_at_the_median():
    distance = torch.linspace(0, 1, 9)
    weight = relative_weight(distance, *median_spread(distance))
    assert (weight.diff() > 0).all() and weight[4].item() == pytest.approx(0.5) and 0 < weight.min() < weight.max() < 1
    gaussian = torch.randn(100000, generator=torch.Generator().manual_seed(0)) * 3 + 2
    assert median_spread(gaussian) == (pytest.approx(2, abs=0.05), pytest.approx(3, abs=0.05))


def test_baseline_anchor_lets_sft_take_over_and_running_does_not():
    keys, hard = [str(i) for i in range(8)], torch.linspace(0.2, 1.0, 8)
    mean_weight = {}
    for spec in ("baseline", "running"):
        difficulty = Difficulty(spec)
        difficulty.observe(keys, hard), difficulty.set_anchor()
        before = difficulty.weight(hard).mean().item()
        difficulty.observe(keys, hard / 4)  # training brought every sample closer
        mean_weight[spec] = (before, difficulty.weight(hard / 4).mean().item())
    assert mean_weight["baseline"][1] < 0.5 * mean_weight["baseline"][0]
    assert mean_weight["running"][1] == pytest.approx(mean_weight["running"][0], abs=1e-4)


def test_repeated_keys_count_as_their_mean_and_state_survives_json():
    difficulty = Difficulty("baseline")
    difficulty.observe(["a", "b", "a"], torch.tensor([0.0, 3.0, 1.0]))
    difficulty.set_anchor()
    assert difficulty.latest == {"a": 0.5, "b": 3.0}
    other = Difficulty("baseline")
    other.load_state_dict(json.loads(json.dumps(difficulty.state_dict())))
    assert other.weight(torch.tensor([0.7])).item() == difficulty.weight(torch.tensor([0.7])).item()


def test_fixed_weight_and_bad_specs():
    assert Difficulty("fixed:0.25").weight(torch.rand(3)).tolist() == [0.25] * 3
    for spec in ("fixed:2", "fixed:-0.5", "hard", "fixed:x"):
        with pytest.raises(ValueError):
            Difficulty(spec)


@pytest.mark.parametrize("name, use", (
    ("difficulty", "difficulty.Difficulty('fixed:1').weight(torch.ones(2))"),
    ("sample", "sample.ddim_step(x, x, torch.full((1,), .5), torch.full((1,), .6), 1.0, 'epsilon', noise=x)"),
    ("sft", "sft.diffusion_loss(x, x, x, torch.full((1,), .5), 'v_prediction')"),
    ("reward", "reward.ssim(torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 16, 16))")))
def test_a_component_copied_alone_works(name, use, tmp_path):
    shutil.copy(ROOT / f"{name}.py", tmp_path)
    code = f"import torch, {name}, sys; x = torch.zeros(1, 3, 4, 4); {use}; " \
           "assert not {'diffusers', 'transformers', 'pyiqa', 'matplotlib'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_reward_that_is_nan_counts_nowhere():
    memory, nan = RewardMemory(), float("nan")
    rewards = torch.tensor([0.1, nan, 0.4, 0.2, 0.3, 0.5])
    result = advantages(rewards, ["a", "a", "a", "b", "b", "b"], memory)
    assert result[1] == 0 and result.isfinite().all() and memory.stats("a")[2] == 2
    same = advantages(rewards[[0, 2, 3, 4, 5]], ["a", "a", "b", "b", "b"], RewardMemory())
    torch.testing.assert_close(result[[0, 2, 3, 4, 5]], same)
    difficulty = Difficulty("baseline")
    difficulty.observe(["a", "a", "b", "c"], torch.tensor([0.2, nan, 0.4, nan]))
    assert difficulty.latest == pytest.approx({"a": 0.2, "b": 0.4})
    difficulty.set_anchor()
    assert difficulty.weight(torch.tensor([nan, 0.4])).tolist()[0] == 0
