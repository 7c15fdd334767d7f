"""Evaluation: independence of the batch, standard errors, sums over seeds, pictures."""

import json
import math

import pytest
import torch

from eval import aggregate, evaluate, format_table, gap_closed, held_out, mean_se, save_curves, save_grid
from utils import UserError, read_image


def test_a_result_does_not_depend_on_the_batch(tiny_restorer):
    lq, hq, names = held_out("sr", "", "val", 5, 64, "cpu")
    restorer = tiny_restorer()
    together, images = evaluate(restorer, lq, hq, {}, 3, 1.0, [0, 1], batch=5)
    apart, _ = evaluate(restorer, lq, hq, {}, 3, 1.0, [0, 1], batch=2)
    torch.testing.assert_close(together["psnr_y"], apart["psnr_y"], rtol=1e-4, atol=1e-3)
    assert images.shape == hq.shape and together["ssim"].shape == (5,) and len(names) == 5
    other, _ = evaluate(restorer, lq, hq, {}, 3, 1.0, [2])
    assert not torch.equal(other["psnr_y"], together["psnr_y"])


def test_without_a_restorer_the_input_is_scored():
    lq, hq, _ = held_out("sr", "", "val", 3, 64, "cpu")
    scores, images = evaluate(None, lq, hq, {"mean": lambda x, refs: x.mean((1, 2, 3))}, 0, 0.0, [0])
    assert torch.equal(images, lq)
    torch.testing.assert_close(scores["mean"], lq.mean((1, 2, 3)))


def test_standard_error_and_gap():
    mean, error = mean_se(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert mean == 2.5 and error == pytest.approx(math.sqrt(5 / 3) / 2)
    assert math.isnan(mean_se(torch.ones(1))[1])
    assert gap_closed(0.7, 0.6, 0.8) == pytest.approx(0.5) and math.isnan(gap_closed(1.0, 0.5, 0.5))


def test_table_shows_what_is_there():
    text = format_table({"sft": {"judge": torch.tensor([0.5, 0.7]), "psnr_y": torch.tensor([30.0, 32.0])},
                         "hq": {"judge": torch.tensor([0.9, 0.9])}})
    assert "0.6000 ± 0.1000 | 31.00 ± 1.00" in text and text.splitlines()[-1] == "| hq | 0.9000 ± 0.0000 | - |"


def test_runs_are_summed_up_by_name(tmp_path):
    for seed, judge in ((0, 0.7), (1, 0.8)):
        folder = tmp_path / f"default-{seed}"
        folder.mkdir()
        row = {"judge": 0.6, "judge2": 0.5, "psnr_y": 30.0, "ssim": 0.8}
        (folder / "summary.json").write_text(json.dumps({
            "sft": row, "rl": row | {"judge": judge, "psnr_y": 29.9}, "hq": {"judge": 0.8, "judge2": 0.8}}))
    text = aggregate([tmp_path / "default-0", tmp_path / "default-1"])
    assert "| default | 2 | +75 ± 25 (50, 100) | +0.150 ± 0.050 |" in text and "-0.10 ± 0.00" in text
    with pytest.raises(UserError, match="summary.json"):
        aggregate([tmp_path])


def test_pictures_are_written(tmp_path):
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    save_grid(tmp_path / "grid.png", {"a": images, "b": images}, {"a": ["x", "y"]})
    save_curves(tmp_path / "curves.png", [{"i": 0, "u": 1.0}, {"i": 1, "u": None, "v": 2.0}], "i", ["u", "v"])
    for name in ("grid", "curves"):
        assert read_image(tmp_path / f"{name}.png").std() > 0
    assert {f.name for f in tmp_path.iterdir()} == {"grid.png", "curves.png"}  # no temporary file left
