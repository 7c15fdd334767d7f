"""Metrics, paired differences, the sampler's front, pictures: against plain loops."""

import csv
import math
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch

import eval as evaluation
from eval import (color_step, evaluate, format_differences, format_table, gain_on_front,
                  hardest_region, in_batches, interval, mean_error, measure, save_regions)
from sample import restore
from utils import UserError, generator


def test_color_step_sees_color_noise_and_nothing_else(gen):
    x = torch.rand(1, 3, 6, 5, generator=gen) * 2 - 1
    color = x[0] - x[0].mean(0)
    steps = torch.cat([(color[:, 1:] - color[:, :-1]).flatten(),
                       (color[:, :, 1:] - color[:, :, :-1]).flatten()])
    assert color_step(x).item() == pytest.approx(127.5 * steps.abs().mean().item(), rel=1e-4)


def test_measure_rounds_to_8_bits_cuts_the_border_and_lays_sets_out(gen):
    hq = torch.rand(5, 3, 32, 32, generator=gen) * 1.8 - 0.9
    images = hq.clone()
    images[..., 0] += 0.1  # wrong at the border only
    brisque = Mock(side_effect=lambda x, refs: x.mean((1, 2, 3)))
    metrics = {"pyiqa:brisque ↓": brisque}
    whole = measure(metrics, [images[:2], images[2:]], [hq[:2], hq[2:]])
    laid, _ = brisque.call_args.args  # the fifth finds no place
    assert laid.shape == (1, 3, 64, 64) and whole["pyiqa:brisque ↓"].shape == (1,)
    torch.testing.assert_close(laid[0, :, :32, 32:], images[1], rtol=0, atol=1 / 255)
    inner = measure({}, [images], [hq], border=1)
    assert whole["psnr"].shape == (5,) and (inner["psnr"] > whole["psnr"] + 10).all()
    assert inner["psnr"].max() < 60  # half a level of 255: rounding is seen
    large = torch.zeros(2, 3, 192, 200)
    assert measure(metrics, [large], [large])["pyiqa:brisque ↓"].shape == (2,)
    sizes = [images[:1], images[:1, :, 4:]]  # small ones of different sizes
    assert measure(metrics, sizes, sizes)["pyiqa:brisque ↓"].shape == (2,)


def test_metrics_keep_their_own_direction_and_missing_ones_are_said(monkeypatch, capsys):
    negated = Mock(sign=-1, side_effect=lambda x, refs: -torch.ones(len(x)))
    monkeypatch.setattr(evaluation, "load_reward", lambda name, device: negated)
    monkeypatch.setattr(evaluation, "ready", lambda name: name != "lpips")
    metrics = evaluation.load_metrics(["pyiqa:niqe", "pyiqa:lpips"], "cpu")
    assert list(metrics) == ["pyiqa:niqe ↓"] and "pyiqa:lpips: left out" in capsys.readouterr().out
    assert metrics["pyiqa:niqe ↓"](torch.zeros(2, 3, 8, 8), None).tolist() == [1, 1]


def test_evaluate_is_paired_and_averages_its_seeds(tiny_restorer, gen):
    hq = torch.rand(5, 3, 32, 32, generator=gen) * 2 - 1
    batches = in_batches(hq.roll(1, 3), hq, "cpu")
    restorer = tiny_restorer()

    def alone(seed):
        images = restore(restorer, hq.roll(1, 3), 0, -1, generator(seed, 8, 0))
        return measure({}, [images], [hq])["psnr_y"]
    one, images = evaluate(restorer, batches, {})
    three, _ = evaluate(restorer, batches, {}, seeds=3)
    assert torch.equal(one["psnr_y"], alone(0)) and images[0].shape == (5, 3, 32, 32)
    torch.testing.assert_close(three["psnr_y"], (alone(0) + alone(1) + alone(2)) / 3)
    other, _ = evaluate(restorer, batches, {}, steps=2)
    assert not torch.equal(one["psnr_y"], other["psnr_y"])
    large = in_batches(torch.zeros(5, 3, 512, 1024), torch.zeros(5, 3, 512, 1024), "cpu")
    assert [len(lq) for lq, _ in large] == [2, 2, 1]  # few pixels at once
    lq, _ = evaluate(None, batches, {})
    assert (lq["psnr_y"] != one["psnr_y"]).all()
    twice, _ = evaluate(restorer, batches * 2, {})  # the same images, but other noise
    assert not torch.allclose(twice["psnr_y"][:5], twice["psnr_y"][5:])


def test_errors_and_intervals_leave_nan_out():
    values = torch.tensor([1.0, 2.0, 3.0, math.nan])
    assert mean_error(values) == (2.0, pytest.approx(1 / math.sqrt(3)))
    mean, half = interval(values, torch.tensor([0.0, 2.0, 2.0, 0.0]))
    assert mean == pytest.approx(2 / 3) and half == pytest.approx(4.303 / 3, rel=1e-3)
    assert math.isnan(interval(values[:1], values[:1])[1])


def test_tables_say_mean_error_and_difference():
    rows = {"sft": {"judge": torch.tensor([0.5, 0.7]), "set": torch.tensor([30.0])},
            "rl": {"judge": torch.tensor([0.6, 0.9]), "set": torch.tensor([28.0])}}
    rows["rl2"] = {"judge": torch.tensor([0.7, 0.9]), "set": torch.tensor([27.0])}
    table = format_table(rows | {"hq": {"judge": torch.tensor([0.9, 0.9])}})
    assert "| sft | 0.6000 ± 0.1000 | 30.00 |" in table and "| hq | 0.9000 ± 0.0000 | - |" in table
    difference = format_differences(rows, "sft", ["rl", "rl2"])
    assert "| rl | +0.15 ± 0.64 | -2.00 |" in difference
    assert "| mean of 2, 95 % over them | +0.17 ± 0.32 | -2.50 ± 6.35 |" in difference


def test_the_front_is_the_best_of_its_points_at_the_same_loss():
    points = [(0.1, 0.010), (0.2, 0.014), (0.15, 0.004), (-0.1, 0.02), (0.3, 0.013)]
    assert [gain_on_front(points, drop) for drop in (-0.1, 0.05, 0.3)] == [0.02] * 3  # free
    assert math.isnan(gain_on_front(points, -0.11)) and math.isnan(gain_on_front(points, 0.31))
    points[3] = (-0.1, -0.02)
    assert gain_on_front(points, -0.05) == pytest.approx(-0.01)
    assert gain_on_front(points, 0.05) == pytest.approx(0.005)
    assert gain_on_front(points, 0.15) == pytest.approx(0.012)
    assert gain_on_front(points, 0.3) == pytest.approx(0.014)
    assert gain_on_front([(0.2, 0.014), (0.1, 0.004)], 0.1) == pytest.approx(0.007)  # a mixture
    rows = {name: {"psnr_y": torch.tensor([30 - drop]), "pyiqa:lpips ↓": torch.tensor([1 - gain])}
            for name, drop, gain in (("sft", 0, 0), ("more", 0.2, 0.02), ("near", 0.1, 0.02),
                                     ("far", 0.3, 0.02))}
    near, far = evaluation.format_front(rows, "sft", ["more"], ["near", "far"]).splitlines()
    assert near.endswith("front 0.0100, 2.0 times") and far.endswith("front ends before")


def test_a_front_of_too_many_steps_is_refused_before_any_work(tiny_restorer):
    with pytest.raises(UserError, match="--steps 1200"):
        evaluation.compare({"sft": tiny_restorer()}, [], {}, 600, 1.0, front=evaluation.FRONT)


def test_the_hardest_region_is_shown_and_fooled_judges_are_named(tmp_path, gen, monkeypatch):
    hq = torch.rand(1, 3, 240, 320, generator=gen) - 0.5
    lq = hq.clone()
    lq[..., 40:200, 120:280] = -0.5
    assert hardest_region(lq, hq) == (40, 120)
    assert hardest_region(*(x[..., :139, 120:220] for x in (lq, hq)), 100) == (39, 0)
    across = [x[..., :139, 120:220].transpose(2, 3) for x in (lq, hq)]
    assert hardest_region(*across, 100) == (0, 39)
    shown = {}
    monkeypatch.setattr(evaluation, "save_grid", lambda path, columns, captions: shown.update(
        columns=columns, captions=captions))
    monkeypatch.setattr(evaluation, "restore", lambda restorer, lq, *args: lq + 1.0)
    monkeypatch.setattr(evaluation, "whole", lambda *args: (lq, hq))
    restorer = SimpleNamespace(device="cpu", defaults={"size": 64})
    save_regions(tmp_path / "x.png", [0], None, {"rl": restorer}, lambda x, y: x.mean((1, 2, 3)))
    assert list(shown["columns"]) == ["lq", "rl", "hq"]
    assert torch.equal(shown["columns"]["hq"][0], hq[0, :, 40:200, 120:280])
    assert "prefers" in shown["captions"]["rl"][0] and "prefers" not in shown["captions"]["lq"][0]


def test_the_script_compares_two_and_prints_the_front(tmp_path, tiny_restorer, capsys, command,
                                                      photo_folder, monkeypatch):
    first, other = tiny_restorer(), tiny_restorer()
    first.defaults["size"] = 16
    first.save(tmp_path / "a")
    with torch.no_grad():
        other.weights()[0].mul_(1.5)
    other.save(tmp_path / "b")
    monkeypatch.setattr(evaluation, "load_metrics", lambda names, device: dict.fromkeys(
        ("pyiqa:lpips ↓", "pyiqa:brisque ↓"), lambda x, y: x.abs().mean((1, 2, 3))))
    words = tmp_path / "a", tmp_path / "b", "--data", photo_folder, "--seeds", 1
    command(evaluation, *words, "--front", "--out", tmp_path / "out")
    text = capsys.readouterr().out
    assert int(text.split(" images, 1 sampler seeds")[0]) > 4 and "own front" in text
    assert "6 steps, eta 0.5" in text and f"minus {tmp_path / 'a'}" in text
    assert (tmp_path / "out/table.md").read_text(encoding="utf-8").strip() in text
    assert (tmp_path / "out/regions.png").exists()
    with open(tmp_path / "out/scores.csv", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    scored = [line["image"] for line in lines if line["pyiqa:brisque ↓"]]
    assert lines[0]["image"].startswith("test/cat") and set(scored) == {"all together"}
    assert lines[1]["pyiqa:lpips ↓"] and not lines[1]["pyiqa:brisque ↓"]
    shown, whole = [], evaluation.whole
    monkeypatch.setattr(evaluation, "whole", lambda *x: shown.append(x[2]) or whole(*x))
    command(evaluation, *words, "--size", 0, "--split", "all", "--count", 3)
    assert shown == [0, 1, 3]  # of five
