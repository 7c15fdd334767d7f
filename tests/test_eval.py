"""Evaluation: independence of the batch and of tiles, metrics against other packages, tables, pictures."""

import csv
import json
import math

import pytest
import torch

import eval
from data import degrade_sr, get_task, load_pairs, photographs, random_crops
from eval import (aggregate, busiest, evaluate, format_differences, format_table, gap_closed, held_out, mean_se,
                  measure, on_tiles, paired, reference_metrics, said_of_gap, save_curves, save_grid, score, shaved,
                  with_inset)
from utils import UserError, generator, read_image, write_image, write_rows


def test_a_result_does_not_depend_on_the_batch(tiny_restorer):
    lq, hq, names = held_out("sr", photographs("val"), 5, 64, "cpu")
    restorer = tiny_restorer()
    together, images = evaluate(restorer, lq, hq, {}, 3, 1.0, [0, 1], batch=5)
    apart, _ = evaluate(restorer, lq, hq, {}, 3, 1.0, [0, 1], batch=2)
    torch.testing.assert_close(together["psnr_y"], apart["psnr_y"], rtol=1e-4, atol=1e-3)
    assert images.shape == hq.shape and together["ssim"].shape == (5,) and len(names) == 5
    other, _ = evaluate(restorer, lq, hq, {}, 3, 1.0, [2])
    assert not torch.equal(other["psnr_y"], together["psnr_y"])


def test_without_a_restorer_the_input_is_scored():
    lq, hq, _ = held_out("sr", photographs("val"), 3, 64, "cpu")
    scores, images = evaluate(None, lq, hq, {"mean": lambda x, refs: x.mean((1, 2, 3))}, 0, 0.0, [0])
    assert torch.equal(images, lq)
    torch.testing.assert_close(scores["mean"], lq.mean((1, 2, 3)))


def test_standard_error_and_gap():
    mean, error = mean_se(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert mean == 2.5 and error == pytest.approx(math.sqrt(5 / 3) / 2)
    assert math.isnan(mean_se(torch.ones(1))[1])
    assert gap_closed(0.7, 0.6, 0.8) == pytest.approx(0.5) and math.isnan(gap_closed(1.0, 0.5, 0.5))
    assert math.isnan(gap_closed(0.9, 0.8, 0.7)) and said_of_gap(0.7, 0.6, 0.8) == "gap closed 50%"
    assert said_of_gap(0.9, 0.8, 0.7) == "no gap" and said_of_gap(math.nan, 0.8, 0.9) == "gap closed nan%"


def test_table_shows_what_is_there():
    text = format_table({"sft": {"judge": torch.tensor([0.5, 0.7]), "psnr_y": torch.tensor([30.0, 32.0])},
                         "hq": {"judge": torch.tensor([0.9, 0.9])}})
    assert "0.6000 ± 0.1000 | 31.00 ± 1.00" in text and text.splitlines()[-1] == "| hq | 0.9000 ± 0.0000 | - |"
    text = format_table({"a": {"judge": torch.tensor([0.5, math.nan, 0.7]), "p": torch.tensor([1.0, math.inf])}})
    assert "| a | 0.6000 ± 0.1000 (1 NaN) | inf" in text  # an answer that could not be read hides no other


def test_runs_are_summed_up_by_name(tmp_path):
    row = {"judge": 0.6, "judge2": 0.5, "psnr_y": 30.0, "ssim": 0.8}
    for name, judge, hq in (("default-0", 0.7, 0.8), ("default-1", 0.8, 0.8), ("alone-0", 0.7, 0.8),
                            ("good-0", 0.7, 0.6)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "summary.json").write_text(json.dumps({
            "lq": row | {"judge": 0.1}, "sft": row, "rl": row | {"judge": judge, "psnr_y": 29.9},
            "hq": {"judge": hq, "judge2": 0.8, "psnr_y": None, "ssim": None}}))
    write_rows(tmp_path / "alone-0" / "scores.csv", [
        {"model": model, "crop": i, **row, "judge": judge} for model, scores in (("sft", (0.5, 0.7)), ("rl", (0.6, 0.9)))
        for i, judge in enumerate(scores)])
    text = aggregate([tmp_path / name for name in ("default-0", "default-1", "alone-0", "good-0")])
    assert "| good | 1 | no gap | +0.100 |" in text  # SFT is already as good as the ground truth
    assert "| default | 2 | +75 ± 25 (50, 100) | +0.150 ± 0.050 |" in text and "-0.10 ± 0.00" in text
    assert "| alone | 1 | +50 ± 25 | +0.100 ± 0.050 | +0.000 ± 0.000 |" in text  # over crops: 0.1 and 0.2
    assert "| default | 0.100, 0.600, 0.750, 0.800 | 0.500, 0.500, 0.500, 0.800 | 30.00, 30.00, 29.90 |" in text
    (tmp_path / "other").mkdir(), (tmp_path / "other/summary.json").write_text('{"x": 1}')
    for folder in (tmp_path, tmp_path / "other"):
        with pytest.raises(UserError, match="summary.json"):
            aggregate([folder])


def test_pictures_are_written(tmp_path):
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    save_grid(tmp_path / "grid.png", {"a": images, "b": images}, {"a": ["x", "y"]})
    save_curves(tmp_path / "curves.png", [{"i": 0, "u": 1.0}, {"i": 1, "u": None, "v": 2.0}], "i", ["u", "v"])
    for name in ("grid", "curves"):
        assert read_image(tmp_path / f"{name}.png").std() > 0
    assert {f.name for f in tmp_path.iterdir()} == {"grid.png", "curves.png"}  # no temporary file left


def test_evaluate_equals_its_plain_loop(tiny_restorer):
    from reward import psnr, psnr_y, ssim
    from sample import rollout
    lq, hq, _ = held_out("sr", photographs("val"), 3, 64, "cpu")
    restorer = tiny_restorer()
    scores, images = evaluate(restorer, lq, hq, {"mean": lambda x, refs: x.mean((1, 2, 3))}, 3, 1.0, [0, 4], batch=2)
    totals = {name: torch.zeros(3) for name in scores}
    for seed in (0, 4):
        for part in (range(2), range(2, 3)):
            own = [generator(seed, 5, i) for i in part]
            x = restorer.decode(rollout(restorer, lq[part.start:part.stop], 3, 1.0, own, keep=False).z[-1],
                                lq[part.start:part.stop])
            refs = hq[part.start:part.stop]
            for name, value in (("mean", x.mean((1, 2, 3))), ("psnr_y", psnr_y(x, refs)), ("psnr", psnr(x, refs)),
                                ("ssim", ssim(x, refs))):
                totals[name][part.start:part.stop] += value / 2
            if seed == 0:
                assert torch.equal(images[part.start:part.stop], x)
    assert list(scores) == ["mean", "psnr_y", "psnr", "ssim"]
    assert all(torch.equal(scores[name], totals[name]) for name in scores)


@pytest.fixture(scope="module")
def noisy():
    hq = random_crops(photographs("train"), 3, 96, generator(0))
    return get_task("denoise")(hq, generator(1))[0], hq


@pytest.mark.parametrize("color, border", (("rgb", 0), ("rgb", 3), ("y", 0), ("y", 4)))
def test_psnr_and_ssim_agree_with_skimage(color, border, noisy):
    from skimage.color import rgb2ycbcr
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity
    metrics, (lq, hq) = reference_metrics(color, border), noisy
    for i in range(len(hq)):
        x, y = (((v[i] + 1) / 2).permute(1, 2, 0).double().numpy() for v in (lq, hq))
        if border:
            x, y = x[border:-border, border:-border], y[border:-border, border:-border]
        if color == "y":
            x, y = rgb2ycbcr(x)[..., :1] / 255, rgb2ycbcr(y)[..., :1] / 255
        theirs = structural_similarity(y, x, data_range=1, channel_axis=2, gaussian_weights=True, sigma=1.5,
                                       use_sample_covariance=False)
        part = slice(i, i + 1)
        assert metrics["psnr"](lq[part], hq[part]).item() == pytest.approx(
            peak_signal_noise_ratio(y, x, data_range=1), abs=1e-3)
        assert metrics["ssim"](lq[part], hq[part]).item() == pytest.approx(theirs, abs=1e-3)


@pytest.mark.parametrize("color, border", (("rgb", 0), ("y", 0), ("y", 4)))
def test_psnr_and_ssim_agree_with_pyiqa(color, border, noisy):
    import pyiqa
    metrics, (lq, hq) = reference_metrics(color, border), noisy
    x, y = (lq + 1) / 2, (hq + 1) / 2
    options = {"test_y_channel": color == "y", "color_space": "ycbcr"}
    theirs = pyiqa.create_metric("psnr", crop_border=border, **options)(x, y)
    torch.testing.assert_close(metrics["psnr"](lq, hq), theirs.flatten(), atol=1e-3, rtol=0)
    theirs = pyiqa.create_metric("ssim", crop_border=border, **options)(x, y)
    torch.testing.assert_close(metrics["ssim"](lq, hq), theirs.flatten().float(), atol=1e-3, rtol=0)


def test_metrics_look_at_8_bit_without_border():
    x = torch.rand(1, 3, 20, 24, generator=generator(0)) * 2 - 1
    seen = shaved(x, "rgb", 2)
    assert seen.shape == (1, 3, 16, 20) and (seen - x[..., 2:-2, 2:-2]).abs().max() <= 0.51 / 127.5
    changed = x.clone()
    changed[..., :2, :] = -changed[..., :2, :]
    assert reference_metrics("rgb", 2)["psnr"](changed, x).item() == 100


def test_a_judge_on_tiles_is_the_mean_of_its_tiles():
    brightness = lambda images, refs=None: images.mean((1, 2, 3)) ** 2  # noqa: E731
    image = torch.rand(2, 3, 21, 35, generator=generator(0))
    expected = sum(brightness(image[..., 2 + 8 * r:10 + 8 * r, 1 + 8 * c:9 + 8 * c])
                   for r in range(2) for c in range(4)) / 8
    torch.testing.assert_close(on_tiles(brightness, 8)(image), expected)
    assert torch.equal(on_tiles(brightness, 30)(image), brightness(image))


def test_paired_interval_is_that_of_scipy():
    from scipy.stats import ttest_rel
    a, b = torch.randn(2, 20, generator=generator(0), dtype=torch.float64)
    mean, low, high = paired(a, b)
    theirs = ttest_rel(a, b).confidence_interval(0.95)
    assert mean == pytest.approx((a - b).mean().item()) and (low, high) == pytest.approx((theirs.low, theirs.high))
    assert math.isnan(paired(a[:1], b[:1])[1])
    text = format_differences({"a": {"psnr": a + 1}, "b": {"psnr": a, "more": a}}, ["a", "b"])
    assert "| b | -1.00 [-1.00, -1.00] |" in text and "n = 20" in text and "more" not in text
    assert format_differences({"a": {"psnr": a}}, ["a"]) == ""


def test_rows_hold_baselines_and_diversity(tiny_restorer):
    lq, hq, _ = held_out("sr", photographs("val"), 3, 64, "cpu")
    restorer, metrics = tiny_restorer(), reference_metrics("rgb", 0) | {"mean": lambda x, r: x.mean((1, 2, 3))}
    models = {"lq": (None, 0, 0.0, False), "m": (restorer, 3, 1.0, True)}
    rows = measure(models, [(lq[:2], hq[:2]), (lq[2:], hq[2:])], metrics, range(3), on_hq=["mean"])
    assert list(rows) == ["lq", "m", "m, mean of 3", "hq"]
    _, samples = score(restorer, lq, hq, {}, 3, 1.0, range(3))
    torch.testing.assert_close(rows["m"]["diversity"], samples.std(0).mean((1, 2, 3)) * 127.5, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(rows["m, mean of 3"]["psnr"], metrics["psnr"](samples.mean(0), hq), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(rows["m"]["mean spread"], samples.mean((2, 3, 4)).std(0), rtol=1e-3, atol=1e-5)
    assert (rows["m, mean of 3"]["psnr"] > rows["m"]["psnr"]).all() and "diversity" not in rows["lq"]
    assert list(rows["hq"]) == ["mean"] and torch.equal(rows["hq"]["mean"], hq.mean((1, 2, 3)))
    single = measure({"m": models["m"]}, [(lq, hq)], metrics, [0])
    assert list(single) == ["m"] and not {"diversity", "mean spread"} & set(single["m"])


def test_results_do_not_depend_on_the_tile():
    """The shipped restorer, a photograph of 384 x 512 in one piece and in tiles: within 0.05 dB of each other."""
    from model import load
    hq = photographs("test")[1][None].float() / 127.5 - 1
    lq, metrics = degrade_sr(hq)[0], reference_metrics("y", 4)
    values = [score(load(""), lq, hq, metrics, 5, 1.0, [0], tile=tile)[0]["psnr"].item() for tile in (0, 256, 192)]
    assert max(values) - min(values) < 0.05, values
    assert min(values) > metrics["psnr"](lq, hq).item()


def test_insets_show_the_place_of_the_largest_change():
    a = torch.rand(3, 60, 80, generator=generator(0)) * 2 - 1
    b = a.clone()
    b[:, 40:50, 10:20] += 0.5
    assert busiest(a, b, 10) == (40, 10)
    shown = with_inset(a, 40, 10, 10)
    assert shown.shape == a.shape and not torch.equal(shown, a)
    expected = a[:, 40:50, 10:20].repeat_interleave(3, 1).repeat_interleave(3, 2)
    assert torch.equal(shown[:, 1:29, 51:79], expected[:, 1:-1, 1:-1])  # top right: the change is at the bottom left
    assert torch.equal(shown[:, 30:38], a[:, 30:38])


@pytest.fixture(scope="module")
def model_folder(tiny_restorer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for seed in (0, 1):
        tiny_restorer(seed=seed).save(folder / str(seed))
    return folder


def run(monkeypatch, capsys, *words):
    monkeypatch.setattr("sys.argv", ["eval.py", *map(str, words)])
    eval.main()
    return capsys.readouterr().out


def test_pairs_of_two_folders_are_evaluated_whole(tmp_path, model_folder, monkeypatch, capsys):
    for index, hq in enumerate(random_crops(photographs("train"), 3, 100, generator(7))):
        write_image(tmp_path / "hq" / f"{index}.png", hq[:, :, :90 + index])
        write_image(tmp_path / "lq" / f"{index}x2.png", degrade_sr(hq[None, :, :, :90 + index])[0][0, :, 1::2, 1::2])
    words = [model_folder / "0", "--model", model_folder / "1", "--lq", tmp_path / "lq", "--hq", tmp_path / "hq",
             "--match", "suffix:x2,", "--steps", 2, "--seeds", 2, "--tile", 64, "--judge2", "none", "--metrics",
             "pyiqa:gmsd"]
    printed = run(monkeypatch, capsys, *words, "--workers", 1, "--out", tmp_path / "a")
    assert "3 whole images, 2 sampler seeds; psnr and ssim on Y, border 4" in printed
    assert "| judge | psnr | ssim | pyiqa:gmsd ↓ | judge spread | diversity |" in printed and "judge2" not in printed
    for row in ("| lq (bicubic) |", f"| {model_folder}/0, eta 0 |", f"| {model_folder}/0, mean of 2 |", "| hq |",
                f"| minus {model_folder}/0, 95 % interval, n = 3 |", f"{model_folder}/1: judge gap closed"):
        assert row in printed, row
    assert f"| {model_folder}/0, eta 1 |" not in printed  # eta 1 is its own
    assert (tmp_path / "a/table.md").read_text().strip() in printed
    assert read_image(tmp_path / "a/comparison.png").std() > 0
    scores = list(csv.DictReader(open(tmp_path / "a/scores.csv")))
    assert len(scores) == 3 * 6 and scores[0]["image"].endswith("0x2.png") and float(scores[0]["pyiqa:gmsd ↓"]) > 0
    table = list(csv.DictReader(open(tmp_path / "a/table.csv")))
    difference = next(r for r in table if r["minus"] and r["metric"] == "psnr")
    assert float(difference["low"]) < float(difference["mean"]) < float(difference["high"])
    own = [float(r["psnr"]) for r in scores if r["model"].endswith("/0")]
    mean = next(r for r in table if r["model"].endswith("/0") and r["metric"] == "psnr" and not r["minus"])
    assert float(mean["mean"]) == pytest.approx(sum(own) / 3, rel=1e-5)
    again = run(monkeypatch, capsys, *words, "--count", 2, "--workers", 0, "--out", tmp_path / "b")
    other = [float(r["psnr"]) for r in csv.DictReader(open(tmp_path / "b/scores.csv")) if r["model"].endswith("/0")]
    assert "2 whole images" in again and other == own[:2]


def test_clean_folders_and_presets(tmp_path, model_folder, photo_folder, monkeypatch, capsys):
    words = [model_folder / "0", "--steps", 2, "--seeds", 1, "--judge", "none", "--judge2", "none", "--no-baselines",
             "--out", tmp_path / "x"]
    printed = run(monkeypatch, capsys, *words, "--dataset", "cbsd68", "--root", photo_folder)
    assert "cbsd68: 5 whole images" in printed and "on RGB, border 0" in printed and "| | psnr | ssim |" in printed
    noisier = run(monkeypatch, capsys, *words, "--dataset", "cbsd68", "--root", photo_folder, "--task", "denoise75")
    psnr = [float(text.split("| lq | ")[1].split()[0]) for text in (printed, noisier)]
    assert psnr[0] - psnr[1] > 6  # the task that is asked for, not the preset's: 20 lg 3 = 9.5 dB less clipping
    noise = 20 * math.log10(255 / 25)
    lq = float(next(line for line in printed.splitlines() if line.startswith("| lq |")).split()[3])
    assert noise - 0.3 < lq < noise + 1.5  # clipping at black and white removes a part of the noise
    printed = run(monkeypatch, capsys, *words, "--hq", photo_folder, "--task", "sr2", "--count", 2)
    assert "2 whole images" in printed and "on Y, border 2" in printed
    printed = run(monkeypatch, capsys, *words, "--task", "derain", "--count", 4, "--color", "rgb", "--border", 1)
    assert "derain: 4 crops" in printed and "on RGB, border 1" in printed
    for path, shape in ((tmp_path / "small/tiny.png", (3, 10, 40)), (tmp_path / "file.png", (3, 9, 9))):
        write_image(path, torch.zeros(shape))
    small = run(monkeypatch, capsys, *words, "--task", "denoise25", "--size", 11, "--count", 2)
    assert "2 crops" in small and read_image(tmp_path / "x/comparison.png").std() > 0
    for bad in (["--color", "lab"], ["--lq", photo_folder], ["--dataset", "sots", "--root", tmp_path],
                ["--split", "all"], ["--workers", -1], ["--size", -3], ["--task", "sr", "--size", 18],
                ["--border", 30], ["--hq", tmp_path / "small"], ["--out", tmp_path / "file.png"],
                ["--dataset", "cbsd68", "--root", photo_folder, "--lq", photo_folder]):
        with pytest.raises(UserError, match="--"):
            run(monkeypatch, capsys, *words, *bad)


def test_pairs_of_equal_size_are_not_called_bicubic(tmp_path, model_folder, photo_folder, monkeypatch, capsys):
    for path in photo_folder.iterdir():
        write_image(tmp_path / "lq" / path.name, read_image(path))
    printed = run(monkeypatch, capsys, model_folder / "0", "--task", "sr", "--lq", tmp_path / "lq", "--hq",
                  photo_folder, "--steps", 2, "--seeds", 1, "--count", 1, "--judge2", "none", "--metrics", "judge", "--no-baselines",
                  "--out", tmp_path / "x")
    assert "| lq |" in printed and "bicubic" not in printed and "border 4" in printed
    scores = next(csv.DictReader(open(tmp_path / "x/scores.csv")))
    assert scores["judge"] == scores["judge ↑"]  # on whole images both are means over tiles


def test_without_folders_the_shipped_restorer_of_the_task_is_taken(tmp_path, monkeypatch, capsys):
    printed = run(monkeypatch, capsys, "--task", "sr4", "--count", 2, "--steps", 2, "--seeds", 1, "--out", tmp_path)
    assert "| weights/sr |" in printed and "| weights/sr, eta 0 |" in printed
    for words in ([], ["--task", "nope"]):
        with pytest.raises(UserError):
            run(monkeypatch, capsys, *words)


def test_held_out_crops_of_pairs_are_fixed(tmp_path):
    for index, hq in enumerate(random_crops(photographs("train"), 3, 80, generator(7))):
        write_image(tmp_path / "hq" / f"{index}.png", hq)
        write_image(tmp_path / "lq" / f"{index}.png", hq / 2)
    pairs = load_pairs("all", tmp_path / "lq", tmp_path / "hq")
    lq, hq, names = held_out("", pairs, 5, 32, "cpu")
    assert torch.equal(lq, held_out("", pairs, 5, 32, "cpu")[0]) and len(set(names)) == 5
    assert (lq - hq / 2).abs().max() < 0.02
