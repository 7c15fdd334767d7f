"""The losses, and the wiring of the loop, with a toy judge whose scores can be told apart."""

import importlib
import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from accelerate import Accelerator
from tiny import TINY

import rl
from claims import log as rows
from difficulty import iqa_gap, median_spread
from rl import Config, better, policy_loss
from utils import UserError, generator, load_checkpoint, parse

ROOT = Path(rl.__file__).parent


# ---- losses ----

def test_clipped_loss_has_the_right_gradient_sign():
    log_prob = torch.tensor([0.0, 0.0, 0.1, -0.1, 0.1], requires_grad=True)
    advantage = torch.tensor([1.0, -1.0, 1.0, -1.0, -1.0])
    loss, info = policy_loss(log_prob, torch.zeros(5), advantage, 0.01)
    loss.sum().backward()
    assert log_prob.grad[0] < 0 < log_prob.grad[1]  # descent makes good samples likelier
    assert log_prob.grad[2] == log_prob.grad[3] == 0  # gone far enough already
    assert loss[4].item() == pytest.approx(math.exp(0.1))  # the wrong way is never clipped
    assert info["clip_frac"].item() == pytest.approx(0.6)
    assert info["ratio_error"].item() == pytest.approx(math.exp(0.1) - 1)
    assert info["approx_kl"].item() == pytest.approx(0.5 * 0.01 * 3 / 5)


def test_better_has_a_higher_reward_and_lost_little_of_both_psnr():
    def row(reward, psnr_y=28.0, psnr=26.0):
        return {"val_reward": reward, "val_psnr_y": psnr_y, "val_psnr": psnr}
    sft = row(0.5)
    assert better(row(0.6, 27.81), sft, sft, 0.2) and not better(row(0.4), sft, sft, 0.2)
    assert not better(row(0.9, 27.79), sft, sft, 0.2)
    assert not better(row(0.9, 28.0, 25.79), sft, sft, 0.2)
    assert not better(row(0.6), row(0.7), sft, 0.2)


def test_step_loss_is_the_papers(step_args):
    """Against its formula, sample by sample."""
    restorer, reference, cfg, batch = step_args
    path = batch["path"]
    loss, info = rl.step_loss(restorer, reference, cfg, batch, 2)
    step, ref = (rl.replay(r, path, 2, 0.5) for r in (restorer, reference))
    sft = rl.diffusion_loss(restorer, batch["z0"], path.condition, batch["t"], batch["eps"])
    expected = 0.0
    for i, w in enumerate((0.0, 0.3, 1.0)):
        ratio = (step.log_prob[i] - path.log_prob[2, i]).exp()
        a = batch["advantage"][i, 2]
        policy = torch.maximum(-a * ratio, -a * ratio.clamp(1 - rl.CLIP_RANGE, 1 + rl.CLIP_RANGE))
        kl = (step.mean[i] - ref.mean[i]).square().mean() / (2 * step.sigma_t[i] ** 2)
        expected += (w * policy + (1 - w) * 0.3 * sft[i] + 0.2 * kl) / 3
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(sum(info["terms"].values()), loss)
    lengths = {}
    for name, term in info["terms"].items():
        grads = torch.autograd.grad(term, restorer.weights(), retain_graph=True)
        lengths[f"share_{name}"] = sum(g.square().sum() for g in grads).sqrt().item()
    shares = rl.grad_shares(info["terms"], restorer.weights())
    assert shares == pytest.approx({k: x / sum(lengths.values()) for k, x in lengths.items()})
    assert min(lengths.values()) > 0 and restorer.weights()[0].grad is None


# ---- the phases ----

def brightness(images, refs=None):
    return images.mean((1, 2, 3))


@pytest.mark.parametrize("mode", ("final", "step"))
def test_collect_in_parts_gives_the_samples_of_one_batch(mode, tiny_restorer, gen, monkeypatch):
    restorer, lq = tiny_restorer(), torch.rand(6, 3, 16, 16, generator=gen) * 2 - 1

    def judge(images, refs):
        return (images * refs).mean((1, 2, 3))

    def run(micro_batch, **more):
        cfg = Config(steps=4, eta=1.0, reward_mode=mode, micro_batch=micro_batch)
        fixed = lq, lq.flip(3), generator(7), cfg, Accelerator(cpu=True)
        return rl.collect(restorer, judge, *fixed, **more)
    (batch,), whole = run(6)
    parts, rewards = run(2)
    assert [b["own"].tolist() for b in parts] == [[0, 1], [2, 3], [4, 5]]
    torch.testing.assert_close(rewards, whole, rtol=1e-3, atol=1e-5)
    path = batch["path"]
    clean = [path.z[-1]] if mode == "final" else [*path.x0[1:], path.z[-1]]
    for k, z in enumerate(clean):
        torch.testing.assert_close(whole[:, k], judge(restorer.decode(z, lq), lq.flip(3)))
    assert len(clean) == whole.shape[1]
    torch.testing.assert_close(parts[1]["z0"], restorer.encode(lq.flip(3)[2:4], lq[2:4]))
    torch.testing.assert_close(parts[2]["path"].z[0], path.z[0, 4:])
    nothing, same = run(2, keep=False)
    assert nothing == [] and torch.equal(same, rewards)
    monkeypatch.setattr(rl, "collect", importlib.import_module("judge_elsewhere").collect)
    others, same = run(2)  # judged in a thread
    assert torch.equal(same, rewards) and torch.equal(others[2]["path"].z, parts[2]["path"].z)


def test_update_visits_each_step_once_with_the_noise_of_its_own_samples(tiny_restorer, gen):
    restorer, lq = tiny_restorer(), torch.rand(4, 3, 16, 16, generator=gen) * 2 - 1
    average, calls = restorer.frozen_copy(), []
    cfg, accelerator = Config(steps=5, eta=1.0, micro_batch=2), Accelerator(cpu=True)
    batches, _ = rl.collect(restorer, brightness, lq, lq, gen, cfg, accelerator)
    parameter = restorer.weights()[0]

    def loss_of(batch, k):
        calls.append((k, batch["own"].tolist(), batch["t"], batch["eps"], parameter.clone()))
        terms = {"rl": (len(calls) * parameter).sum()}
        return sum(terms.values()), {"terms": terms, "rl_loss": torch.tensor(float(len(calls)))}
    optimizer = torch.optim.SGD(restorer.weights(), lr=1.0)
    restorer.net, optimizer = accelerator.prepare(restorer.net, optimizer)
    start = parameter.clone()
    row = rl.update(loss_of, restorer, average, optimizer, batches, lq, generator(3), accelerator,
                    True)
    assert sorted(k for k, *_ in calls) == [0, 0, 1, 1, 2, 2, 3, 3]  # the last has no noise
    assert [own for _, own, *_ in calls] == [[0, 1], [2, 3]] * 4
    gen = generator(3)
    torch.randperm(4, generator=gen)
    for i in range(0, 8, 2):  # both micro-batches of a step are cut from one draw
        t, eps = rl.draw_noise(restorer, lq, gen)
        assert torch.equal(torch.cat([calls[i][2], calls[i + 1][2]]), t)
        assert torch.equal(torch.cat([calls[i][3], calls[i + 1][3]]), eps)
    # each optimizer step takes the mean gradient of its four parts, clipped to length 1
    step = -1 / math.sqrt(parameter.numel())
    torch.testing.assert_close(calls[4][4], start + step)
    torch.testing.assert_close(parameter.detach(), start + 2 * step)
    torch.testing.assert_close(average.weights()[0], start + 0.1 * step * (0.9 + 2))
    assert row["rl_loss"] == 4.5 and row["share_rl"] == 1


# ---- the loop ----

SMALL = Config(iterations=4, inputs=4, pool=6, size=32, steps=4, views=1, micro_batch=2, lr=1e-3,
               max_drop=99.0, dtype="float32", reward="toy")


@pytest.fixture
def run(tmp_path, tiny_restorer, photo_folder, monkeypatch):
    """Trains a tiny restorer by a toy judge, brightness; without the final report."""
    tiny_restorer().save(tmp_path / "start")
    judges = {"toy": brightness, "mute": lambda images, refs: brightness(images) * math.nan}
    monkeypatch.setattr(rl, "load_reward", lambda name, device: judges[name])
    monkeypatch.setattr(rl, "report", lambda *args: None)
    monkeypatch.setattr(rl, "LOOK_EVERY", 2)

    def train(out, **changes):
        cfg = replace(SMALL, model=str(tmp_path / "start"), data=str(photo_folder))
        rl.train(replace(cfg, out=str(tmp_path / out), **changes))
        return tmp_path / out
    return train


def spy(monkeypatch, name):
    """Records (arguments, result) of every call of a function of rl.py."""
    calls, original = [], getattr(rl, name)

    def recorded(*args, **more):
        result = original(*args, **more)
        calls.append((args, result))
        return result
    monkeypatch.setattr(rl, name, recorded)
    return calls


def weights(folder):
    """The last weights, not the kept average: as bytes, to be compared exactly."""
    state, _ = load_checkpoint(folder / "checkpoint.safetensors")
    return b"".join(x.numpy().tobytes() for x in state["weights"].values())


def ratios_are_one(log):
    """At the first micro-batch of each iteration, of which something was learned."""
    return all(row["ratio_error"] <= 1e-6 and row["grad_norm"] > 0 for row in log[1:])


@pytest.mark.parametrize("changes", ({}, {"samples": 2, "cap": "none"}, {"reward_mode": "step"},
                                     {"weight": "running"}))
def test_memory_advantage_difficulty_and_weight_are_of_the_right_samples(changes, run, monkeypatch):
    """The loop again in plain Python, from the rewards that it saw."""
    collected, updated, pools = (spy(monkeypatch, x) for x in ("collect", "update", "pool"))
    log = rows(run("plain", **changes))
    assert ratios_are_one(log) and any(row["approx_kl"] > 0 for row in log[1:])
    lq, hq = pools[0][1]
    reward_hq = brightness(hq)
    limits = reward_hq if changes.get("cap") != "none" else [math.inf] * 6
    history = [[] for _ in range(6)]  # of each input, of what counts

    def remember(ids, rewards):
        gains = [reward.clamp(max=limits[i]) for i, reward in zip(ids, rewards)]
        for i, gain in zip(ids, gains):
            history[i].append(gain)
        return torch.stack(gains)

    def means():
        return torch.stack([sum(x[-rl.MEMORY:]) / min(len(x), rl.MEMORY) for x in history])
    for _, (_, rewards) in collected[:2]:
        remember(range(6), rewards)
    distance_sft = iqa_gap(means()[:, -1], reward_hq)
    for n, (args, (batches, rewards)) in enumerate(collected[2:]):
        # which inputs were restored: found by their pixels
        ids = [next(i for i in range(6) if torch.equal(x, lq[i])) for x in args[2]]
        known = means()
        now = iqa_gap(known[:, -1], reward_hq)
        assert all(torch.equal(y, hq[i]) for y, i in zip(args[3], ids))
        assert len(set(ids)) == 4
        a = remember(ids, rewards) - known[ids]
        a = ((a - a.mean(0)) / (a.std(0, correction=0) + 1e-4)).clamp(-5, 5)
        m, s = median_spread(now if changes.get("weight") == "running" else distance_sft)
        w = torch.sigmoid(2 * (now[ids] - m) / s)
        for batch in updated[n][0][4]:
            torch.testing.assert_close(batch["weight"], w[batch["own"]])
            torch.testing.assert_close(batch["advantage"], a.expand(-1, 4)[batch["own"]],
                                       rtol=1e-3, atol=1e-4)
        assert torch.equal(updated[n][0][5], lq[ids])
        assert log[n + 1]["weight"] == pytest.approx(w.mean().item())
        assert log[n + 1]["reward"] == pytest.approx(rewards[:, -1].mean().item(), abs=1e-6)
    starts = [args[4].initial_seed() for args, _ in collected]
    assert len(set(starts)) == len(starts)  # other noise in every iteration


def test_splits_and_settings_arrive_and_the_best_average_is_kept(run, monkeypatch, capsys):
    pools, held, seen, rates, updated = (spy(monkeypatch, name) for name in (
        "pool", "held_out", "views", "learning_rate", "update"))
    looks, reports = [], []
    scores = iter([0.1, 0.3, 0.9, 0.5])  # at the start, and after iterations 2, 4, 6

    def validate(average, val, judge, cfg):
        looks.append([p.clone() for p in average.weights()])
        return {"val_reward": next(scores), "val_psnr_y": 1.0, "val_psnr": 1.0}
    monkeypatch.setattr(rl, "validate", validate)
    monkeypatch.setattr(rl, "report", lambda *args: reports.append(args))
    folder = run("best", iterations=6, views=4, steps=3, eta=1.0, dtype="bfloat16")
    (train, *_), loss_of, (val, *_) = pools[0][0], updated[0][0][0], held[0][0]
    assert len(train) == 3 and all("train/" in name for name in train.names)
    assert val.names == ["val/flag"] and seen[0][0][1] == 4
    assert [args for args, _ in rates] == [(i, 6, 1e-3, rl.WARMUP, rl.FLOOR) for i in range(6)]
    _, restorer, average, optimizer, *_ = updated[0][0]
    assert optimizer.param_groups[0]["lr"] == rates[-1][1]
    reference = loss_of.args[1]
    assert reports[0][1:4] == (reference, average, brightness)
    assert reports[0][4].names == ["test/cat"] and average is not restorer
    saved = rl.load(str(folder / "model"))
    saved.train_only("modulation")
    for start, now, ref in zip(looks[0], restorer.weights(), reference.weights()):
        assert torch.equal(start, ref) and not torch.equal(start, now)
    assert all(torch.equal(a, b) for a, b in zip(saved.weights(), looks[2]))
    assert len(looks) == 4 and "average of iteration 4" in capsys.readouterr().out
    assert saved.defaults == {"task": "sr", "steps": 3, "eta": 1.0, "size": 32}
    assert ratios_are_one(rows(folder))


def test_a_toy_reward_rises(run):
    log = rows(run("toy", iterations=20, lr=2e-3, weight="fixed:1.0", trainable="all", kl_coef=0.0,
                   cap="none", inputs=6, samples=4, micro_batch=24))
    first, last = (sum(row["reward"] for row in part) / 5 for part in (log[1:6], log[-5:]))
    assert last > first + 0.005


def test_resumed_equals_unstopped_or_is_refused(run, monkeypatch, capsys, photo_folder, tmp_path):
    whole, more = run("whole"), tmp_path / "more"
    shutil.copytree(photo_folder, more)
    rates = [rl.learning_rate(i, 4, 1e-3, rl.WARMUP, rl.FLOOR) for i in range(3)]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(rl, "learning_rate", Mock(side_effect=[*rates, KeyboardInterrupt]))
        run("stopped")
    assert weights(run("stopped", resume=True)) == weights(whole)
    assert rows(whole)[-1]["val_reward"] == rows(tmp_path / "stopped")[-1]["val_reward"]
    assert json.loads((whole / "config.json").read_text())["iterations"] == 4
    capsys.readouterr()
    other = run("other", seed=1, data=str(more), max_drop=-99.0)
    assert weights(other) != weights(whole)
    assert "nothing beat the SFT restorer" in capsys.readouterr().out
    before = (other / "config.json").read_text()
    shutil.copy(more / "val/flag.png", more / "val/flag2.png")
    again = {"seed": 1, "data": str(more), "max_drop": -99.0, "resume": True, "iterations": 6}
    for out, changes, words in (("stopped", {}, "or go on with --resume"),
                                ("other", again, "photographs"),
                                ("stopped", {"resume": True, "inputs": 2}, "--inputs 4"),
                                ("stopped", {"resume": True, "data": ""}, "--data")):
        with pytest.raises(UserError, match=words):
            run(out, **changes)
    assert (other / "config.json").read_text() == before


@pytest.mark.parametrize("changes, words", (
    ({"reward": "judge2"}, "never a reward"), ({"reward": "mute"}, "--reward mute"),
    ({"weight": "x"}, "--weight"), ({"inputs": 7}, "--inputs"), ({"size": 36}, "--size"),
    ({"micro_batch": 3}, "--micro-batch"), ({"steps": 1}, "--steps"), ({"lr": 1e30}, "--lr"),
    ({"eta": 1e-9}, "--eta"), ({"inputs": 1}, "--samples 2"),
    ({"trainable": "nothing"}, "--trainable")))
def test_bad_settings_are_named(changes, words, run):
    with pytest.raises(UserError, match=words):
        run("bad", **changes)


def test_uneven_shares_of_processes_and_another_task_are_named(tiny_restorer, capsys):
    noise = tiny_restorer()
    noise.defaults["task"] = "denoise+derain"
    rl.check(replace(SMALL, task="denoise25", eta=1.0), noise, 1)
    rl.check(replace(SMALL, task="sr4", eta=1.0), tiny_restorer(), 1)
    assert capsys.readouterr().err == ""
    for task in ("derain", "sr2"):
        rl.check(replace(SMALL, task=task, eta=1.0), tiny_restorer(), 1)
        assert f"has learned sr, --task is {task}" in capsys.readouterr().err
    for changes in ({"inputs": 5}, {"pool": 7}):
        with pytest.raises(UserError, match="2 processes"):
            rl.check(replace(SMALL, **changes), tiny_restorer(), 2)


RL = ["--inputs", 4, "--pool", 4, "--micro-batch", 2, "--views", 1, "--steps", 4]
SFT = ["--batch", 4]
LENGTH = {"rl": "--iterations", "sft": "--steps"}


@pytest.mark.parametrize("script, words, family, start", (
    ("rl", RL, "pixel", "rl.py"), ("rl", RL, "sd-controlnet", "tests/fsdp.py rl"),
    ("sft", SFT, "sd-controlnet", "sft.py"), ("sft", SFT, "pixel", "tests/fsdp.py sft")))
def test_two_processes_give_the_weights_of_one(script, words, family, start, tmp_path,
                                               photo_folder, monkeypatch):
    """Started by torchrun, with gloo, as a user does without a GPU, and resumed; with FSDP."""
    TINY[family]().save(tmp_path / "start")
    words = [*words, "--data", photo_folder, "--model", tmp_path / "start", "--size", 32,
             "--trainable", "modulation", "--dtype", "float32"]
    first, then = [LENGTH[script], "1"], [LENGTH[script], "2", "--resume"]
    module = importlib.import_module(script)
    monkeypatch.setattr(module, "report", lambda *args: None)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    for more in (first, then):
        more = [*map(str, words), *more, "--out"]
        module.train(parse(module.Config, [*more, str(tmp_path / "one")]))
        done = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node",
             "2", *start.split(), *more, str(tmp_path / "two")],
            env=environment, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "2 process(es)" in done.stdout and "1 process(es)" not in done.stdout
    one, two = (load_checkpoint(tmp_path / name / "checkpoint.safetensors")[0]
                for name in ("one", "two"))
    for part in ("weights", "average"):
        for name, value in one[part].items():
            torch.testing.assert_close(two[part][name], value, rtol=1e-3, atol=2e-5)
    last, same = (rows(tmp_path / name)[-1] for name in ("one", "two"))  # of all processes
    for name in {"rl": ("rl_loss", "sft_loss", "kl", "approx_kl"), "sft": ("loss",)}[script]:
        assert same[name] == pytest.approx(last[name], rel=1e-2, abs=1e-9)
