"""The losses, and the wiring of the loop, with a toy judge whose scores can be told apart."""

import csv
import importlib
import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import rl
from difficulty import iqa_gap, median_spread
from rl import Config, better, grad_shares, kl_to_reference, policy_loss
from sample import draw
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


def test_kl_equals_torch_distributions(gen):
    mean, ref = torch.randn(2, 3, 2, 4, 4, generator=gen)
    sigma = torch.tensor([0.1, 0.5, 1.0])
    normal, wide = torch.distributions.Normal, sigma.view(-1, 1, 1, 1)
    expected = torch.distributions.kl_divergence(normal(mean, wide), normal(ref, wide))
    torch.testing.assert_close(kl_to_reference(mean, ref, sigma), expected.mean((1, 2, 3)))


def test_better_has_a_higher_reward_and_lost_little_of_both_psnr():
    def row(reward, psnr_y=28.0, psnr=26.0):
        return {"val_reward": reward, "val_psnr_y": psnr_y, "val_psnr": psnr}
    sft = row(0.5)
    assert better(row(0.6, 27.81), sft, sft, 0.2) and not better(row(0.4), sft, sft, 0.2)
    assert not better(row(0.9, 27.79), sft, sft, 0.2)
    assert not better(row(0.9, 28.0, 25.79), sft, sft, 0.2)
    assert not better(row(0.6), row(0.7), sft, 0.2)


def test_shares_of_the_gradient_add_up():
    p = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    shares = grad_shares({"rl": 3 * p.sum(), "sft": p[0] + 0 * p[1], "kl": 0 * p.sum()}, [p])
    norm = 3 * math.sqrt(2)
    assert shares == pytest.approx({"share_rl": norm / (norm + 1), "share_sft": 1 / (norm + 1),
                                    "share_kl": 0.0})
    assert p.grad is None


def test_step_loss_is_the_papers(tiny_restorer, gen):
    """Against its formula, sample by sample, with every term of a size."""
    restorer, lq = tiny_restorer(), torch.rand(3, 3, 16, 16, generator=gen) * 2 - 1
    reference, hq = restorer.frozen_copy(), lq.flip(3)
    with torch.no_grad():
        path = rl.rollout(restorer, *draw(restorer, lq, 4, gen), 1.0)
        for p in restorer.weights():
            p += 0.02 * torch.randn(p.shape, generator=gen)
    t, eps = rl.draw_noise(restorer, lq, gen)
    batch = {"path": path, "weight": torch.tensor([0.0, 0.3, 1.0]), "z0": restorer.encode(hq, lq),
             "advantage": torch.randn(3, 4, generator=gen), "t": t, "eps": eps}
    cfg = Config(sft_coef=0.3, kl_coef=0.2)
    loss, info = rl.step_loss(restorer, reference, cfg, batch, 2)
    step, ref = (rl.replay(r, path, 2, 1.0) for r in (restorer, reference))
    sft = rl.diffusion_loss(restorer, batch["z0"], lq, t, eps)
    expected = 0.0
    for i, w in enumerate((0.0, 0.3, 1.0)):
        ratio = (step.log_prob[i] - path.log_prob[2, i]).exp()
        a = batch["advantage"][i, 2]
        policy = torch.maximum(-a * ratio, -a * ratio.clamp(1 - rl.CLIP_RANGE, 1 + rl.CLIP_RANGE))
        kl = (step.mean[i] - ref.mean[i]).square().mean() / (2 * step.sigma_t[i] ** 2)
        expected += (w * policy + (1 - w) * 0.3 * sft[i] + 0.2 * kl) / 3
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(sum(info["terms"].values()), loss)
    for name, term in info["terms"].items():
        grads = torch.autograd.grad(term, restorer.weights(), retain_graph=True)
        assert sum(g.abs().sum() for g in grads) > 0, name


# ---- the phases ----

def one_process():
    return SimpleNamespace(num_processes=1, process_index=0, device=torch.device("cpu"),
                           gather=lambda x: x)


def brightness(images, refs=None):
    return images.mean((1, 2, 3))


@pytest.mark.parametrize("mode", ("final", "step"))
def test_collect_in_parts_gives_the_samples_of_one_batch(mode, tiny_restorer, gen):
    restorer, lq = tiny_restorer(), torch.rand(6, 3, 16, 16, generator=gen) * 2 - 1
    seen = []

    def judge(images, refs):
        seen.append((images, refs))
        return brightness(images)

    def run(micro_batch):
        cfg = Config(steps=4, reward_mode=mode, micro_batch=micro_batch)
        return rl.collect(restorer, judge, lq, lq.flip(3), generator(7), cfg, one_process())
    (batch,), whole = run(6)
    parts, rewards = run(2)
    assert [b["own"].tolist() for b in parts] == [[0, 1], [2, 3], [4, 5]]
    torch.testing.assert_close(rewards, whole, rtol=1e-3, atol=1e-5)
    path = batch["path"]
    clean = [path.z[-1]] if mode == "final" else [*path.x0[1:], path.z[-1]]
    for k, z in enumerate(clean):
        torch.testing.assert_close(whole[:, k], brightness(restorer.decode(z, lq)))
    assert torch.equal(seen[0][1], lq.flip(3)) and len(clean) == whole.shape[1]
    torch.testing.assert_close(parts[1]["z0"], restorer.encode(lq.flip(3)[2:4], lq[2:4]))
    torch.testing.assert_close(parts[2]["path"].z[0], path.z[0, 4:])
    assert not torch.allclose(path.z[0, 0], path.z[0, 1])


def test_a_judge_without_any_score_ends_the_run(tiny_restorer, gen):
    def silent(images, refs):
        return torch.full((len(images),), math.nan)
    with pytest.raises(UserError, match="--reward judge"):
        rl.collect(tiny_restorer(), silent, torch.zeros(2, 3, 16, 16), torch.zeros(2, 3, 16, 16),
                   gen, Config(steps=2), one_process())


def test_update_visits_each_step_once_with_the_noise_of_its_own_samples(tiny_restorer, gen):
    from accelerate import Accelerator
    restorer, lq = tiny_restorer(), torch.rand(4, 3, 16, 16, generator=gen) * 2 - 1
    average, calls = restorer.frozen_copy(), []
    cfg = Config(steps=5, micro_batch=2)
    batches, _ = rl.collect(restorer, lambda x, y: brightness(x), lq, lq, gen, cfg, one_process())
    parameter = restorer.weights()[0]

    def loss_of(batch, k):
        calls.append((k, batch["own"].tolist(), batch["t"], batch["eps"], parameter.clone()))
        terms = {"rl": (len(calls) * parameter).sum()}
        return sum(terms.values()), {"terms": terms, "rl_loss": torch.tensor(float(len(calls)))}
    optimizer = torch.optim.SGD(restorer.weights(), lr=1.0)
    accelerator = Accelerator(cpu=True)
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
    moved = [calls[i][4].sum().item() for i in range(8)]
    assert len(set(moved[:4])) == len(set(moved[4:])) == 1 and moved[3] != moved[4]
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
    monkeypatch.setattr(rl, "load_reward", lambda name, device: brightness)
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


def rows(folder):
    with open(folder / "metrics.csv", encoding="utf-8") as file:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]


@pytest.mark.parametrize("changes", ({}, {"samples": 2, "cap": "none"}, {"reward_mode": "step"},
                                     {"weight": "running"}))
def test_memory_advantage_difficulty_and_weight_are_of_the_right_samples(changes, run, monkeypatch):
    """The loop again in plain Python, from the rewards that it saw."""
    collected, advantage = spy(monkeypatch, "collect"), spy(monkeypatch, "advantages")
    weighed, updated = spy(monkeypatch, "weights"), spy(monkeypatch, "update")
    pools = spy(monkeypatch, "pool")
    log = rows(run("plain", **changes))
    lq, hq = pools[0][1]
    reward_hq = brightness(hq)
    capped = changes.get("cap") != "none"
    history = {}

    def counts(i, reward):
        return min(reward, reward_hq[i].item()) if capped else reward

    def mean(i, k):
        latest = history[i, k][-rl.MEMORY:]
        return sum(latest) / len(latest)

    def ids_of(args):  # which inputs were restored: found by their pixels
        return [next(i for i in range(6) if torch.equal(x, lq[i])) for x in args[2]]
    for (args, (_, rewards)) in collected[:2]:
        for i, row in enumerate(rewards.tolist()):
            for k, reward in enumerate(row):
                history.setdefault((i, k), []).append(counts(i, reward))
    last = rewards.shape[1] - 1
    distance_sft = iqa_gap(torch.tensor([mean(i, last) for i in range(6)]), reward_hq)
    weighed = [call for call in weighed if len(call[0][1]) > 2]  # without that of `check`
    for n, (args, (batches, rewards)) in enumerate(collected[2:]):
        ids = ids_of(args)
        now = iqa_gap(torch.tensor([mean(i, last) for i in range(6)]), reward_hq)
        assert all(torch.equal(y, hq[i]) for y, i in zip(args[3], ids))
        assert len(set(ids)) == 4
        gains = torch.tensor([[counts(i, r) for r in row] for i, row in zip(ids, rewards.tolist())])
        baseline = torch.tensor([[mean(i, k) for k in range(last + 1)] for i in ids])
        a = gains - baseline
        a = ((a - a.mean(0)) / (a.std(0, correction=0) + 1e-4)).clamp(-5, 5)
        torch.testing.assert_close(advantage[n][1], a, rtol=1e-3, atol=1e-4)
        for i, row in zip(ids, gains.tolist()):
            for k, reward in enumerate(row):
                history[i, k].append(reward)
        distance = now[ids]
        m, s = median_spread(now if changes.get("weight") == "running" else distance_sft)
        w = torch.sigmoid(2 * (distance - m) / s)
        torch.testing.assert_close(weighed[n][1], w)
        for batch in updated[n][0][4]:
            torch.testing.assert_close(batch["weight"], w[batch["own"]])
            torch.testing.assert_close(batch["advantage"], a.expand(-1, 4)[batch["own"]],
                                       rtol=1e-3, atol=1e-4)
        assert torch.equal(updated[n][0][5], lq[ids])
        assert log[n + 1]["weight"] == pytest.approx(w.mean().item())
        assert log[n + 1]["reward"] == pytest.approx(rewards[:, -1].mean().item(), abs=1e-6)
    starts = [args[4].initial_seed() for args, _ in collected]
    assert len(set(starts)) == len(starts)  # other noise in every iteration


def test_each_split_is_used_for_what_it_is_and_settings_arrive(run, monkeypatch):
    pools, held, seen = spy(monkeypatch, "pool"), spy(monkeypatch, "held_out"), spy(monkeypatch, "views")
    reports, rates, update = [], [], rl.update

    def watched(*args):
        rates.append(args[3].param_groups[0]["lr"])
        return update(*args)
    monkeypatch.setattr(rl, "update", watched)
    monkeypatch.setattr(rl, "report", lambda *args: reports.append(args))
    folder = run("splits", views=4, steps=3)
    assert len(pools[0][0][0]) == 3 and all("train/" in name for name in pools[0][0][0].names)
    assert held[0][0][0].names == ["val/flag"] and seen[0][0][1] == 4
    cfg, reference, average, judge, source, *_ = reports[0]
    assert source.names == ["test/cat"] and judge is brightness
    assert rates == [rl.learning_rate(i, 4, 1e-3, rl.WARMUP, rl.FLOOR) for i in range(4)]
    saved, start = rl.load(str(folder / "model")), rl.load(str(folder.parent / "start"))
    assert saved.defaults == {"task": "sr", "steps": 3, "eta": 1.0}
    for other, kept in ((start, reference), (saved, average)):
        other.train_only("modulation")
        assert all(torch.equal(a, b) for a, b in zip(other.weights(), kept.weights()))


def test_reference_stays_and_average_is_judged_and_the_best_is_kept(run, monkeypatch, capsys):
    updated, looks, reports = spy(monkeypatch, "update"), [], []
    scores = iter([0.1, 0.3, 0.9, 0.5])  # at the start, and after iterations 2, 4, 6

    def validate(average, val, judge, cfg):
        looks.append([p.clone() for p in average.weights()])
        return {"val_reward": next(scores), "val_psnr_y": 1.0, "val_psnr": 1.0}
    monkeypatch.setattr(rl, "validate", validate)
    monkeypatch.setattr(rl, "report", lambda *args: reports.append(args))
    folder = run("best", iterations=6)
    loss_of, restorer, average = updated[0][0][:3]
    reference = loss_of.args[1]
    saved = rl.load(str(folder / "model"))
    saved.train_only("modulation")
    for start, now, ref in zip(looks[0], restorer.weights(), reference.weights()):
        assert torch.equal(start, ref) and not torch.equal(start, now)
    assert all(torch.equal(a, b) for a, b in zip(saved.weights(), looks[2]))
    assert average is not restorer and reports[0][1:3] == (reference, average)
    assert any(not torch.equal(a, b) for a, b in zip(looks[1], restorer.weights()))
    assert len(looks) == 4 and "average of iteration 4" in capsys.readouterr().out


def test_ratio_is_one_at_the_first_micro_batch(run):
    for dtype in ("float32", "bfloat16"):
        log = rows(run(dtype, dtype=dtype))
        assert all(row["ratio_error"] <= 1e-6 and row["grad_norm"] > 0 for row in log[1:])
        assert any(row["approx_kl"] > 0 for row in log[1:]) and log[-1]["kl"] > 0
        assert log[-1]["share_rl"] + log[-1]["share_sft"] + log[-1]["share_kl"] == pytest.approx(1)


def test_a_toy_reward_rises(run):
    log = rows(run("toy", iterations=20, lr=2e-3, weight="fixed:1.0", trainable="all", kl_coef=0.0,
                   cap="none", inputs=6, samples=4, micro_batch=24))
    first, last = (sum(row["reward"] for row in part) / 5 for part in (log[1:6], log[-5:]))
    assert last > first + 0.005


def test_same_seed_same_weights_and_resumed_the_same(run, monkeypatch):
    whole = run("whole")
    assert weights(run("again")) == weights(whole) != weights(run("other", seed=1))
    original, calls = rl.update, []

    def crash_at_fourth(*args):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(*args)
    monkeypatch.setattr(rl, "update", crash_at_fourth)
    with pytest.raises(KeyboardInterrupt):
        run("stopped")
    monkeypatch.setattr(rl, "update", original)
    assert weights(run("stopped", resume=True)) == weights(whole)
    assert rows(whole)[-1]["val_reward"] == rows(whole.parent / "stopped")[-1]["val_reward"]
    assert json.loads((whole / "config.json").read_text())["iterations"] == 4
    for changes, words in (({}, "--out"), ({"resume": True, "inputs": 2}, "--inputs 4"),
                           ({"resume": True, "data": ""}, "--data")):
        with pytest.raises(UserError, match=words):
            run("stopped", **changes)


def test_other_photographs_are_refused_on_resume_and_nothing_is_lost(run, photo_folder, tmp_path):
    more = tmp_path / "more"
    shutil.copytree(photo_folder, more)
    folder = run("pool", data=str(more))
    before = (folder / "config.json").read_text()
    shutil.copy(more / "val/flag.png", more / "val/flag2.png")
    with pytest.raises(UserError, match="photographs"):
        run("pool", data=str(more), resume=True, iterations=6)
    assert (folder / "config.json").read_text() == before


def test_a_run_that_kept_nothing_says_so(run, capsys):
    run("nothing", max_drop=-99.0)
    assert "nothing beat the SFT restorer" in capsys.readouterr().out


@pytest.mark.parametrize("changes, words", (
    ({"weight": "fixed:3"}, "--weight"), ({"reward": "judge2"}, "--reward"), ({"weight": "x"}, "--weight"),
    ({"inputs": 7}, "--inputs"), ({"size": 36}, "--size"), ({"micro_batch": 3}, "--micro-batch"),
    ({"steps": 1}, "--steps"), ({"trainable": "nothing"}, "--trainable"), ({"lr": 1e30}, "--lr")))
def test_bad_settings_are_named(changes, words, run):
    with pytest.raises(UserError, match=words):
        run("bad", **changes)


def test_uneven_shares_of_processes_are_named(tiny_restorer):
    for changes in ({"inputs": 5}, {"pool": 7}):
        with pytest.raises(UserError, match="2 processes"):
            rl.check(replace(SMALL, **changes), tiny_restorer(), 2)


@pytest.mark.parametrize("script, words", (
    ("rl", ["--iterations", 2, "--inputs", 4, "--pool", 4, "--micro-batch", 2, "--views", 1]),
    ("sft", ["--steps", 3, "--batch", 4])))
def test_two_processes_give_the_weights_of_one(script, words, tmp_path, tiny_restorer, photo_folder,
                                               monkeypatch):
    """Started by torchrun, with gloo, as a user does without a GPU."""
    tiny_restorer().save(tmp_path / "start")
    words += ["--data", photo_folder, "--model", tmp_path / "start", "--size", 32,
              "--dtype", "float32", "--out"]
    module = importlib.import_module(script)
    monkeypatch.setattr(module, "report", lambda *args: None)
    module.train(parse(module.Config, [*map(str, words), str(tmp_path / "one")]))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node",
         "2", f"{ROOT}/{script}.py", *map(str, words), str(tmp_path / "two")],
        env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "2 process(es)" in done.stdout and "1 process(es)" not in done.stdout
    one, two = (load_checkpoint(tmp_path / name / "checkpoint.safetensors")[0]["weights"]
                for name in ("one", "two"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=2e-5)
