"""The combined loss, the control of fidelity, and the loop: ratio 1, a toy reward rises, determinism, resume."""

import json
import math
import re

import pytest
import torch
from conftest import ROOT

import rl
from rl import Config, ConstrainedAdamW, better, check, combined_loss, kl_to_reference, policy_loss
from utils import UserError


def test_clipped_loss_has_the_right_gradient_sign():
    old = torch.zeros(4)
    log_prob = torch.tensor([0.0, 0.0, 0.1, -0.1], requires_grad=True)
    advantage = torch.tensor([1.0, -1.0, 1.0, -1.0])
    loss, info = policy_loss(log_prob, old, advantage, 0.01)
    loss.sum().backward()
    assert log_prob.grad[0] < 0 < log_prob.grad[1]  # descent makes good samples likelier, bad ones less
    assert log_prob.grad[2] == log_prob.grad[3] == 0  # already beyond the clip range in the wanted direction
    assert info["clip_frac"] == 0.5 and info["ratio_error"] == pytest.approx(math.exp(0.1) - 1)
    wrong, _ = policy_loss(torch.tensor([0.1], requires_grad=True), torch.zeros(1), torch.tensor([-1.0]), 0.01)
    assert wrong.item() == pytest.approx(math.exp(0.1))  # the wrong direction is never clipped


def test_kl_equals_torch_distributions(gen):
    mean, ref = (torch.randn(3, 2, 4, 4, generator=gen) for _ in range(2))
    sigma = torch.tensor([0.1, 0.5, 1.0])
    wide = sigma.view(-1, 1, 1, 1)
    Normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(Normal(mean, wide), Normal(ref, wide)).mean((1, 2, 3))
    torch.testing.assert_close(kl_to_reference(mean, ref, sigma), expected)
    assert (kl_to_reference(mean, mean, sigma) == 0).all()


def test_combined_loss_equals_a_loop(gen):
    part, sft, kl, weight = (torch.rand(5, generator=gen) for _ in range(4))
    expected = sum(w * a + (1 - w) * 0.3 * b for w, a, b in zip(weight, part, sft)) / 5 + 0.1 * sum(kl) / 5
    torch.testing.assert_close(combined_loss(part, sft, kl, weight, 0.3, 0.1), expected)
    pure = combined_loss(part, sft, kl, torch.ones(5), 0.3, 0.0)
    assert pure == pytest.approx(part.mean().item())


def test_without_a_constraint_the_optimizer_is_torch_adamw(gen):
    start, target = torch.randn(2, 5, 3, generator=gen)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    optimizers = (ConstrainedAdamW([ours], lr=0.03, weight_decay=0.1),
                  torch.optim.AdamW([theirs], lr=0.03, betas=(0.9, 0.98), weight_decay=0.1))
    for step in range(20):
        for p, optimizer in zip((ours, theirs), optimizers):
            optimizer.zero_grad()
            (p - target).square().sum().backward()
            if step % 2 and optimizer is optimizers[0]:  # far within a budget: the same step
                optimizer.set_constraint([torch.ones_like(p)[None]], [-1e6])
            optimizer.step()
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("start", (0.0, 1.0))
def test_the_constraint_is_reached_and_held(start):
    """A toy whose loss falls without end along (3, 1) while drop = x + y^2 must stay at 0.2: the optimum on the limit
    is where y = 1/6, found from within and from beyond it."""
    p = torch.nn.Parameter(torch.tensor([start, 0.0]))
    optimizer = ConstrainedAdamW([p], lr=0.01)
    for _ in range(2000):
        optimizer.zero_grad()
        (-3 * p[0] - p[1]).backward()
        drop = p[0] + p[1] ** 2
        optimizer.set_constraint([torch.autograd.grad(drop, p)[0][None]], [drop.item() - 0.2])
        optimizer.step()
    assert abs(p[0] + p[1] ** 2 - 0.2) < 0.02 and abs(p[1] - 1 / 6) < 0.05 and optimizer.multiplier > 0


def test_two_constraints_are_held_at_once():
    """The loss falls along (1, 1, 1); x may be 0.2 and x + 2 y 0.5, so that the optimum is x = 0.2, y = 0.15, while a
    third limit, z at most 1e6, is never felt."""
    p = torch.nn.Parameter(torch.tensor([0.0, 1.0, 0.0]))
    optimizer = ConstrainedAdamW([p], lr=0.01)
    of_drops = torch.tensor([[1.0, 0.0, 0.0], [1.0, 2.0, 0.0], [0.0, 0.0, 1.0]])
    for _ in range(2000):
        optimizer.zero_grad()
        (-p.sum()).backward()
        optimizer.set_constraint([of_drops], (of_drops @ p.detach() - torch.tensor([0.2, 0.5, 1e6])).tolist())
        optimizer.step()
    assert abs(p[0] - 0.2) < 0.01 and abs(p[1] - 0.15) < 0.01 and p[2] > 10


def test_the_bend_of_a_step_is_bounded():
    p = torch.nn.Parameter(torch.zeros(3))
    optimizer = ConstrainedAdamW([p], lr=0.01, bound=2.0)
    p.grad = torch.tensor([1.0, 1.0, 1.0])
    optimizer.set_constraint([torch.tensor([[1e-6, 0.0, 0.0]])], [100.0])
    optimizer.step()
    assert optimizer.multiplier == pytest.approx(2.0) and p.abs().max() < 0.1


def test_a_weight_without_a_gradient_of_the_loss_is_not_thrown_far_by_the_bend():
    """In the first step sqrt(v) is |g|. The loss would raise the drop, the sum of the weights, by 100 lr; of the bend
    that prevents it each weight takes its part, and the last not all of it."""
    p = torch.nn.Parameter(torch.zeros(100))
    optimizer = ConstrainedAdamW([p], lr=0.01, bound=1e9)
    p.grad = -torch.cat([torch.ones(99), torch.tensor([1e-7])])
    optimizer.set_constraint([torch.ones(1, 100)], [0.0])
    optimizer.step()
    assert abs(p.sum()) < 1e-5 and p.abs().max() < 10 * 0.01


def test_the_gradient_of_lost_fidelity_is_that_of_ssim_and_the_coarse_part_of_that_of_psnr(gen):
    from reward import psnr_y, ssim
    x, y = torch.rand(2, 2, 3, 48, 32, generator=gen) * 1.6 - 0.8
    y[0] -= 0.3  # one image with a wrong brightness
    x.requires_grad_()
    of_psnr, = torch.autograd.grad(-psnr_y(x, y).sum(), x)
    found, = torch.autograd.grad((rl.lost_fidelity(x, y, "policy")[0] + 20 * ssim(x, y)).sum(), x)
    coarse = torch.nn.functional.avg_pool2d(of_psnr, 16).repeat_interleave(16, 2).repeat_interleave(16, 3)
    torch.testing.assert_close(found, coarse, atol=1e-7, rtol=1e-3)
    assert coarse[0].norm() > 2 * coarse[1].norm() > 0
    for height, width in ((12, 12), (40, 24)):  # less than a block, and no multiple of one
        cut = (image[..., :height, :width] for image in (x, y))
        left, = torch.autograd.grad(rl.lost_fidelity(*cut, "policy")[0].sum(), x)
        assert left.isfinite().all() and (left[0, :, :height, :width] != 0).all()


@pytest.mark.parametrize("checkpointing", (False, True))
def test_chain_gradient_is_that_of_a_finite_difference(checkpointing, tiny_restorer, gen):
    """Through all steps of a chain: a step along it changes minus 20 SSIM and the coarse error as predicted."""
    from reward import luma
    from sample import rollout
    restorer, hq = tiny_restorer(seed=3), torch.rand(4, 3, 32, 32, generator=gen) * 2 - 1
    lq, cfg = hq.roll(1, 3), Config(steps=4, eta=1.0, micro_batch=8, gradient_checkpointing=checkpointing)
    restorer.train_only("modulation")

    def noise():
        return [torch.Generator().manual_seed(i) for i in range(4)]

    def restored():
        return restorer.decode(rollout(restorer, lq, 4, 1.0, noise(), keep=False).z[-1], lq)
    squared = (luma(restored()) - luma(hq)).square().mean((1, 2, 3))  # the error that PSNR starts from

    def loss():
        image = restored()
        means = (luma(image) - luma(hq)).unfold(2, 16, 16).unfold(3, 16, 16).mean((4, 5)).square().mean((1, 2, 3))
        return (10 / math.log(10) * means / squared - rl.fidelity(image, hq)[:, 1]).mean().item()
    grads = [g[0] for g in rl.chain_gradient(
        restorer, lq, lambda x, part: rl.lost_fidelity(x, hq[part], "policy"), cfg, noise())]
    norm, before = sum((g ** 2).sum() for g in grads).sqrt(), loss()
    with torch.no_grad():
        for p, g in zip(restorer.weights(), grads):
            p -= 1e-2 * g / norm
    assert norm > 0 and before - loss() == pytest.approx(1e-2 * norm.item(), rel=0.1)


def test_chain_gradient_of_several_losses_is_that_of_each(tiny_restorer, gen):
    restorer, hq = tiny_restorer(seed=3), torch.rand(4, 3, 32, 32, generator=gen) * 2 - 1
    cfg = Config(steps=2, eta=1.0, micro_batch=4)  # inputs in two parts

    def gradients(*names):
        def loss(x, part):
            return [-rl.fidelity(x, hq[part])[:, ("psnr_y", "ssim", "psnr").index(name)] for name in names]
        noise = [torch.Generator().manual_seed(i) for i in range(4)]
        return rl.chain_gradient(restorer, hq.roll(1, 3), loss, cfg, noise)
    names = ("psnr_y", "ssim", "psnr")
    together = gradients(*names)
    for of_all, *of_each in zip(together, *(gradients(name) for name in names)):
        torch.testing.assert_close(of_all, torch.cat(of_each))
    noise = [torch.Generator().manual_seed(i) for i in range(4)]
    of_reward = rl.chain_gradient(restorer, hq.roll(1, 3), lambda x, part: rl.lost_fidelity(x, hq[part], "reward"), cfg,
                                  noise)
    torch.testing.assert_close(of_reward, together)  # with --estimator reward, each limit has its own gradient


def test_better_is_a_higher_reward_within_the_limits():
    def row(reward, psnr, ssim=0.7):
        return {"val_reward": reward, "val_psnr_y": psnr, "val_ssim": ssim}
    sft, limits = row(0.5, 28.0), {"val_psnr_y": 0.2, "val_ssim": 0.01}
    assert better(row(0.6, 27.81), sft, sft, limits) and not better(row(0.4, 28.0), sft, sft, limits)
    assert not better(row(0.9, 27.79), sft, sft, limits) and not better(row(0.6, 28.0, 0.689), sft, sft, limits)
    assert not better(row(0.6, 28.0), row(0.7, 28.0), sft, limits) and better(row(0.1, 20.0), sft, sft, {})


def test_the_estimator_has_its_own_defaults_and_flags_override_them(monkeypatch):
    seen = []
    monkeypatch.setattr(rl, "train", seen.append)
    for words in ("", "--estimator reward", "--estimator reward --lr 1e-3 --train modulation"):
        monkeypatch.setattr("sys.argv", ["rl.py", *words.split()])
        rl.main()
    policy, reward, changed = seen
    assert policy == Config() and reward == Config(estimator="reward", **rl.OF_REWARD)
    assert changed == Config(**{**rl.OF_REWARD, "estimator": "reward", "lr": 1e-3, "train": "modulation"})
    line = (ROOT / "README.md").read_text().split("`reward` starts from ")[1].split(" |")[0]
    stated = dict(re.findall(r"`--([a-z-]+) ([^ `]+)`", line))
    assert stated == {key.replace("_", "-"): str(value) for key, value in rl.OF_REWARD.items()}


@pytest.mark.parametrize("changes, words", (
    ({"weight": "fixed:3"}, "--weight"), ({"eta": 0.0}, "--eta"), ({"reward": "judge2"}, "--reward"),
    ({"reward": "pyiqa:piqe"}, "--reward"), ({"reward": "judge+0.5*judge2"}, "--reward"),
    ({"reward_mode": "step:0"}, "--reward-mode"), ({"inputs": 999}, "--pool"), ({"memory": 2}, "--memory"),
    ({"average": 1.0}, "--average"), ({"fidelity_on": "test"}, "--fidelity-on"), ({"iterations": 0}, "--iterations"),
    ({"distance": "lpips"}, "--distance"), ({"views": 9}, "--views"),
    ({"estimator": "x"}, "--estimator"), ({"estimator": "reward", "reward_mode": "step"}, "--reward-mode"),
    ({"train": "head"}, "--train"), ({"dtype": "float16"}, "--dtype"), ({"size": 0}, "--size"), ({"lr": 0.0}, "--lr"),
    ({"kl_coef": math.nan}, "--kl-coef"), ({"clip_range": -1.0}, "--clip-range"), ({"workers": -1}, "--workers")))
def test_bad_flags_are_named(changes, words):
    with pytest.raises(UserError, match=words):
        check(Config(**changes))


SMALL = dict(iterations=4, inputs=2, samples_per_input=2, pool=4, size=64, steps=4, micro_batch=4, views=2,
             save_every=2, dtype="float32", device="cpu")


@pytest.fixture
def run(tmp_path, tiny_restorer, photo_folder, monkeypatch):
    """Trains a tiny restorer for a few iterations with a toy reward (brightness), without the final report."""
    tiny_restorer(seed=5).save(tmp_path / "start")
    import reward
    real = reward.load

    def toy(images, refs=None):
        return images.mean((1, 2, 3))
    monkeypatch.setattr(reward, "load", lambda name, device="cpu", **options: (
        toy if name in ("toy", "judge", "judge2") else real(name, device, **options)))
    monkeypatch.setattr(rl, "report", lambda *args: None)

    def train(out, **changes):
        rl.train(Config(**{**SMALL, "model": str(tmp_path / "start"), "data": str(photo_folder), "reward": "toy",
                           "out": str(tmp_path / out), **changes}))
        return tmp_path / out
    return train


def weights(folder):
    return (folder / "model/unet/diffusion_pytorch_model.safetensors").read_bytes()


def rows(folder):
    import csv
    with open(folder / "metrics.csv") as file:
        return [{k: float(v) if v else None for k, v in row.items()} for row in csv.DictReader(file)]


@pytest.mark.parametrize("mode", ("final", "step", "step:2"))
@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_ratio_is_one_at_the_first_micro_batch(mode, dtype, run):
    log = rows(run("ratio", reward_mode=mode, dtype=dtype))
    assert all(row["ratio_error"] <= 1e-5 for row in log[1:])
    assert all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in log[1:])
    assert any(row["approx_kl"] > 0 for row in log[1:])  # later optimizer steps of an iteration do move


def test_a_toy_reward_rises(run):
    log = rows(run("toy", iterations=25, lr=2e-3, weight="fixed:1.0", train="all", kl_coef=0.0, fidelity_budget=-1.0,
                   inputs=4, samples_per_input=4, micro_batch=16, clip_range=0.05, average=0.0, save_every=25))
    first, last = (sum(row["reward"] for row in part) / 5 for part in (log[1:6], log[-5:]))
    assert last > first + 0.005


def test_same_seed_same_weights_and_another_seed_others(run):
    assert weights(run("a")) == weights(run("b")) != weights(run("c", seed=1))


@pytest.mark.parametrize("changes", ({}, {"fidelity_on": "both"}))
def test_resumed_run_equals_an_unstopped_one(changes, run, monkeypatch):
    whole, calls, original = run("whole", **changes), [], rl.update

    def crash_at_fourth(*args):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(*args)
    monkeypatch.setattr(rl, "update", crash_at_fourth)
    with pytest.raises(KeyboardInterrupt):
        run("stopped", **changes)
    monkeypatch.setattr(rl, "update", original)
    stopped = run("stopped", resume=True, **changes)
    assert weights(stopped) == weights(whole)
    keys = [k for k in rows(whole)[-1] if not k.startswith("seconds")]
    assert [[r[k] for k in keys] for r in rows(stopped)] == [[r[k] for k in keys] for r in rows(whole)]
    assert json.loads((stopped / "config.json").read_text())["iterations"] == 4


@pytest.mark.parametrize("judged", ((3,), (3, 1), (3, 2, 1, 0)))
def test_a_step_that_is_not_judged_takes_the_next_advantage(judged, gen):
    from difficulty import RewardMemory, advantages
    rewards, keys = {k: torch.rand(6, generator=gen) for k in judged}, ["0", "0", "1", "1", "2", "2"]
    cap = torch.full((6,), 0.8)
    result = rl.step_advantages(rewards, keys, cap, RewardMemory())
    for k in range(4):
        judge = min(j for j in judged if j >= k)
        torch.testing.assert_close(result[k], advantages(rewards[judge].clamp(max=0.8), keys, RewardMemory()))


def test_the_micro_batch_does_not_change_a_run(run):
    from safetensors.torch import load_file
    file = "model/unet/diffusion_pytorch_model.safetensors"
    one, other = (load_file(run(name, micro_batch=size, iterations=2, views=1) / file)
                  for name, size in (("whole", 4), ("parts", 2)))
    assert max((one[key] - other[key]).abs().max().item() for key in one) < 1e-5


@pytest.mark.parametrize("words", ("--reward=psnr --kl-coef=0.1 --sft-coef=0.1", "--reward=judge --estimator=reward "
                                   "--samples-per-input=1 --fidelity-on=both --fidelity-budget=0 --updates=1 --train=all"))
def test_two_processes_give_the_weights_of_one(words, run, tmp_path):
    """accelerate launch with two gloo processes: the same global batch, the same weights. A budget of 0 dB is felt
    from the first loss on, so that the three limits enter. All run on one thread: the launcher gives each process one,
    and another number of threads sums in another order."""
    import os
    import subprocess
    import sys

    from conftest import ROOT
    from safetensors.torch import load_file
    flags = [f"--{key.replace('_', '-')}={value}" for key, value in SMALL.items()]
    flags += [f"--model={tmp_path / 'start'}", "--iterations=3", "--pool=8", "--inputs=4", "--lr=1e-4", *words.split()]
    launcher = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes=2", "--num_machines=1",
                "--main_process_port=0",
                "--mixed_precision=no", "--dynamo_backend=no"]
    for name, launch in (("one", [sys.executable]), ("two", [sys.executable, *launcher])):
        subprocess.run([*launch, str(ROOT / "rl.py"), *flags, f"--out={tmp_path / name}"], check=True,
                       capture_output=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"})
    one, two, start = (load_file(tmp_path / name / "unet/diffusion_pytorch_model.safetensors")
                       for name in ("one/model", "two/model", "start"))
    assert any(not torch.equal(one[key], start[key]) for key in one)
    assert max((one[key] - two[key]).abs().max().item() for key in one) < 1e-5
    assert len(rows(tmp_path / "two")) == 4
    assert rows(tmp_path / "two")[-1]["constraint"] > 0 or "psnr" in words


@pytest.mark.parametrize("part, moves", (("modulation", ("norm", "time_emb", "bias")), ("all", ("",))))
def test_only_the_chosen_part_trains(part, moves, run):
    from safetensors.torch import load_file
    start = run("part", train=part, fidelity_budget=-1.0).parent / "start"
    before, after = (load_file(folder / "unet/diffusion_pytorch_model.safetensors")
                     for folder in (start, start.parent / "part/model"))
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed and all(any(word in name for word in moves) for name in changed)
    assert part == "modulation" or any(name.endswith("conv1.weight") for name in changed)


@pytest.mark.parametrize("reward, distance", (("psnr", "iqa_gap"), ("ssim", "mse")))
def test_reference_rewards_train(reward, distance, run):
    log = rows(run("ref", reward=reward, distance=distance, iterations=1))
    assert math.isfinite(log[1]["loss"]) and 0 <= log[1]["weight"] <= 1


def test_the_judges_own_gradient_trains_and_is_refused_where_there_is_none(run):
    log = rows(run("own", reward=f"mllm:{ROOT}/weights/judge", estimator="reward", iterations=2, sft_coef=0.0,
                   kl_coef=0.0))
    assert log[1]["rl_loss"] == 0 and log[1]["grad_norm"] > 0  # advantages of 0: all of the gradient is the judge's
    with pytest.raises(UserError, match="--estimator reward: psnr has no gradient"):
        run("none", reward="psnr", estimator="reward")


class Brightness:
    """A toy reward with a gradient, or one whose gradient is lost on the way."""

    def __init__(self, sign=1.0, broken=False):
        self.model, self.sign, self.broken = torch.nn.Linear(1, 1), sign, broken

    def __call__(self, images, refs=None):
        return self.sign * images.mean((1, 2, 3))

    def differentiable(self, images, refs=None):
        return self(images.detach() if self.broken else images)


def test_a_toy_reward_rises_by_its_own_gradient_up_to_the_cap(run, monkeypatch):
    import reward
    common = dict(estimator="reward", iterations=6, lr=2e-3, weight="fixed:1.0", train="all", kl_coef=0.0, sft_coef=0.0,
                  fidelity_budget=-1.0, inputs=4, micro_batch=16, average=0.0, save_every=6)

    def trained(name, scorer, hq=None, **changes):
        monkeypatch.setattr(reward, "load", lambda *args, **options: scorer)
        if hq is not None:  # the rewards of the ground truths
            measured = rl.measure_pool

            def told(*args):
                reward_hq, fidelity = measured(*args)
                return torch.full_like(reward_hq, hq), fidelity
            monkeypatch.setattr(rl, "measure_pool", told)
        return run(name, **common | changes)
    gained = []
    for sign in (1.0, -1.0):
        log = rows(trained(f"sign{sign}", Brightness(sign), hq=9.0))
        gained.append(log[-1]["val_reward"] - log[0]["val_reward"])
    assert min(gained) > 0.01, gained
    log = rows(trained("capped", Brightness(), hq=-9.0))  # all are better than the ground truth: nothing to gain
    assert log[-1]["grad_norm"] == 0 and log[-1]["val_reward"] == log[0]["val_reward"]
    whole, parts = (trained(f"micro{size}", Brightness(), hq=9.0, micro_batch=size, iterations=2) for size in (16, 8))
    one, two = (torch.tensor([row["grad_norm"] for row in rows(out)[1:]]) for out in (whole, parts))
    torch.testing.assert_close(one, two, rtol=1e-3, atol=0)
    with pytest.raises(UserError, match="lets no gradient through"):
        trained("broken", Brightness(broken=True))


@pytest.mark.parametrize("family", ("ldm-sr", "sd-controlnet", "sd-x4-upscaler", "dit"))
def test_every_backbone_trains(family, run, tmp_path):
    """The same loop, from a saved folder of small random weights; what does not train is the same afterwards."""
    from model import load
    from safetensors.torch import load_file
    from test_model import TINY
    TINY[family]().save(tmp_path / family)
    out = run(family, model=str(tmp_path / family), iterations=2, reward="psnr", dtype="bfloat16", views=1,
              gradient_checkpointing=True, fidelity_budget=1e9, kl_coef=0.1, sft_coef=0.1)
    log, before = rows(out), load(str(tmp_path / family))
    assert log[1]["ratio_error"] <= 1e-5 and all(math.isfinite(row["loss"]) for row in log[1:])
    before.train_only("modulation")
    now = {key[4:]: value for key, value in load_file(out / "checkpoint.safetensors").items() if key.startswith("net.")}
    assert set(now) == set(before.names)
    assert any(not torch.equal(now[name], p) for name, p in before.state_dict().items())
    assert load(str(out / "model")).family == family


def test_pairs_on_disk_train(run, photo_folder, tmp_path):
    from data import resize
    from utils import read_image, write_image
    for file in photo_folder.iterdir():
        write_image(tmp_path / "lq" / file.name, resize(read_image(file)[None], (48, 48))[0])
    log = rows(run("pairs", lq=str(tmp_path / "lq"), hq=str(photo_folder), iterations=1))
    assert math.isfinite(log[1]["loss"]) and log[0]["val_psnr_y"] > 0
    with pytest.raises(UserError, match="--hq"):
        run("half", lq=str(tmp_path / "lq"))


def test_a_sum_of_rewards_trains_and_resumes_on_its_scale(run):
    run("sum", reward="ssim+0.5*psnr_y", iterations=2)
    log = rows(run("sum", reward="ssim+0.5*psnr_y", iterations=3, resume=True))
    assert len(log) == 4 and all(math.isfinite(row["reward"]) for row in log[1:])
    assert max(abs(row["reward"]) for row in log[1:]) < 10  # in standard deviations of the terms


@pytest.mark.parametrize("updates", (1, 3, 5))
def test_every_optimizer_step_is_taken(updates, run, monkeypatch):
    steps, original = [], ConstrainedAdamW.step
    monkeypatch.setattr(ConstrainedAdamW, "step", lambda self, *a: (steps.append(1), original(self, *a))[1])
    run("count", updates=updates, iterations=1)
    assert len(steps) == min(updates, 3)  # 4 denoising steps, the last of them without noise


def test_resume_does_not_take_an_earlier_runs_checkpoint_for_its_own(run, monkeypatch):
    """A run in the folder of another one that stopped before its first checkpoint, and the summary of the first."""
    first = run("same", iterations=2)
    (first / "summary.json").write_text("{}")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(rl, "update", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        run("same", seed=1)
    assert not (first / "summary.json").exists()
    with pytest.raises(UserError, match="started with --seed 0"):
        run("same", seed=1, resume=True)


def test_a_drop_without_a_finite_gradient_ends_the_run_and_keeps_the_checkpoint(run, monkeypatch):
    from safetensors.torch import load_file
    folder, original = run("nan", iterations=2), rl.chain_gradient
    before = (folder / "checkpoint.safetensors").read_bytes()
    monkeypatch.setattr(rl, "chain_gradient", lambda *args: [g * math.nan for g in original(*args)])
    with pytest.raises(UserError, match="not finite"):
        run("nan", iterations=4, resume=True)
    assert (folder / "checkpoint.safetensors").read_bytes() == before
    assert all(value.isfinite().all() for value in load_file(folder / "checkpoint.safetensors").values())


def test_resume_without_a_checkpoint_or_with_another_model_is_an_error(run, tiny_restorer, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="--resume"):
        run("nothing", resume=True)
    run("done")
    run("done", resume=True, lr=1e-5, micro_batch=2, dtype="bfloat16", iterations=5)  # what an error may advise
    with pytest.raises(UserError, match="--seed 0"):
        run("done", resume=True, seed=4)
    with monkeypatch.context() as patch:
        import utils
        load = utils.load_checkpoint
        patch.setattr(utils, "load_checkpoint", lambda *args: {
            key: value for key, value in load(*args).items() if key != "lost"})
        with pytest.raises(UserError, match="older version"):
            run("done", resume=True, iterations=6)
    with pytest.raises(UserError, match="--steps"):
        run("odd", steps=3)
    tiny_restorer(layers_per_block=2).save(tmp_path / "start")
    with pytest.raises(UserError, match="does not fit"):
        run("done", resume=True)


def test_the_budget_is_measured_on_training_inputs_too(run, monkeypatch):
    """Told that the SFT restorer had 5 dB more on them, a run with --fidelity-on both sees a drop of 5 dB, each input
    paired with itself, of which a fifth enters the average in each iteration; one with val does not."""
    measured = rl.measure_pool

    def better_sft(*args):
        reward_hq, fidelity = measured(*args)
        assert fidelity.shape == (4, 3)
        return reward_hq, fidelity + torch.tensor([5.0, 0.0, 0.0])
    monkeypatch.setattr(rl, "measure_pool", better_sft)
    both, val = (rows(run(name, fidelity_on=name, iterations=2)) for name in ("both", "val"))
    assert [row["psnr_drop"] for row in both[1:]] == pytest.approx([1, 1.8], abs=0.3)
    assert all(abs(row["psnr_drop"]) < 0.5 for row in val[1:]) and both[1]["constraint"] > val[1]["constraint"]


def test_every_logged_column_is_in_the_readme(run):
    from conftest import ROOT
    readme = (ROOT / "README.md").read_text()
    columns = [key for key in rows(run("columns", iterations=1))[-1] if key != "iteration"]
    assert len(columns) > 20 and not [key for key in columns if f"`{key}`" not in readme]
