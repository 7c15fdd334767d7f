"""Every script as its user runs it: in a process of its own, with clean output, and with bad input."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT

from data import degrade_sr, grid_crops, photographs
from utils import generator, read_image, write_image


def script(*words, folder=ROOT):
    return subprocess.run([sys.executable, *map(str, words)], cwd=folder, capture_output=True, text=True)


def stray(text):
    return [line for line in text.splitlines() if any(
        sign in line.lower() for sign in ("warn", "gemm_4bit", "traceback", "[transformers]", "unexpected"))]


@pytest.fixture(scope="module")
def small_photo(tmp_path_factory):
    path = tmp_path_factory.mktemp("in") / "photo.png"
    write_image(path, degrade_sr(grid_crops(photographs("val"), 1, 64, generator(0))[0])[0][0])
    return path


def test_rl_leaves_everything_it_promises(tmp_path, photo_folder):
    """A short run with the shipped restorer and judges, then read by eval.py."""
    words = ["rl.py", "--task", "sr", "--iterations", 1, "--inputs", 2, "--samples-per-input", 2, "--pool", 2, "--steps",
             2, "--micro-batch", 4, "--out", tmp_path, "--data", photo_folder]
    done = script(*words)
    assert done.returncode == 0, done.stderr
    assert not stray(done.stdout + done.stderr)
    assert {"config.json", "metrics.csv", "curves.png", "before_after.png", "scores.csv", "summary.json", "model"} <= {
        f.name for f in tmp_path.iterdir()}
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert list(summary) == ["lq", "sft", "rl", "hq"]
    assert all(list(row) == ["judge", "judge2", "psnr_y", "ssim"] for row in summary.values())
    assert summary["hq"]["psnr_y"] is None and 0 < summary["rl"]["judge"] < 1 and summary["sft"]["psnr_y"] > 15
    from diffusers import UNet2DModel
    assert UNet2DModel.from_pretrained(tmp_path / "model", subfolder="unet").config.in_channels == 24
    seen = script("eval.py", "weights/sr", tmp_path / "model", "--count", 4, "--seeds", 1, "--steps", 2, "--out",
                  tmp_path / "eval")
    assert seen.returncode == 0 and "gap closed" in seen.stdout, seen.stderr
    assert (tmp_path / "eval/comparison.png").exists() and "±" in (tmp_path / "eval/table.md").read_text()


def test_sample_restores_a_folder_and_names_bad_files(tmp_path, small_photo):
    (small_photo.parent / "broken.png").write_bytes(b"no")
    done = script("sample.py", small_photo.parent, "--steps", 2, "--scale", 2, "--out", tmp_path)
    (small_photo.parent / "broken.png").unlink()
    assert done.returncode == 2 and "broken.png" in done.stderr and "Traceback" not in done.stderr
    assert read_image(tmp_path / "photo.png").shape == (3, 128, 128)


def test_score_prints_a_line_per_file(small_photo):
    done = script("reward.py", "score", small_photo, small_photo)
    assert done.returncode == 0 and not stray(done.stdout + done.stderr), done.stderr
    lines = done.stdout.strip().splitlines()[1:]
    assert len(lines) == 2 and all(0 <= float(line.split()[0]) <= 1 for line in lines)
    done = script("reward.py", "score", small_photo, "--ref", small_photo, "--metric", "ssim")
    assert float(done.stdout.splitlines()[1].split()[0]) == pytest.approx(1, abs=1e-4)


def test_data_and_model_scripts(tmp_path):
    assert script("data.py", "--out", tmp_path / "x.png").returncode == 0
    assert read_image(tmp_path / "x.png").shape == (3, 128, 512)
    done = script("model.py")
    assert done.returncode == 0 and "trains 1.88" in done.stdout


@pytest.mark.parametrize("words", (
    ("rl.py", "--data", "/nowhere"), ("rl.py", "--model", "/nowhere"), ("rl.py", "--task", "nope"),
    ("rl.py", "--weight", "fixed:7"), ("rl.py", "--device", "cuda:99"), ("rl.py", "--resume", "--out", "/nowhere"),
    ("rl.py", "--size", "512"), ("eval.py", "--task", "sr", "--steps", "-1"),
    ("sft.py", "--task", "nope"), ("eval.py",), ("eval.py", "/nowhere"), ("sample.py",), ("sample.py", "/nowhere.png"),
    ("reward.py",), ("reward.py", "score"), ("reward.py", "score", "/nowhere.png", "--metric", "nope"),
    ("reward.py", "score", "/nowhere.png"), ("data.py", "--data", "/nowhere"), ("model.py", "--model", "/nowhere")))
def test_bad_input_is_one_line_and_exit_code_2(words):
    done = script(*words)
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2 and len(lines) == 1 and lines[0].startswith("error: "), done.stderr


def test_importing_a_component_loads_nothing_heavy():
    heavy = {"diffusers", "transformers", "pyiqa", "matplotlib", "skimage", "accelerate"}
    for name in ("data", "model", "sample", "sft", "reward", "difficulty", "rl", "eval", "utils"):
        done = script("-c", f"import sys, {name}; print({heavy!r} & set(sys.modules))")
        assert done.stdout.strip() == "set()", (name, done.stdout, done.stderr)


def test_shipped_weights_are_small_and_not_pickled():
    files = [f for f in (ROOT / "weights").rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) < 25e6
    assert not {f.suffix for f in files} & {".bin", ".pt", ".pth", ".pkl", ".ckpt"}
    assert not any(word in f.read_text() for f in ROOT.glob("*.py") for word in ("torch.load(", "import pickle"))
