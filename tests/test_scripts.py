"""Every script and example as its user runs it: in a process of its own, and with bad input."""

import ast
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from utils import read_image, write_image

ROOT = Path(__file__).parent.parent
LEVELS = (("utils", "difficulty", "sample"), ("reward", "model", "data"),
          ("eval",), ("sft",), ("rl",))
HEAVY = {"diffusers", "transformers", "pyiqa", "matplotlib", "accelerate", "scipy"}
FAST = ["--iterations", 1, "--inputs", 2, "--pool", 2, "--size", 32, "--views", 1, "--steps", 2]


def run(*words, folder=ROOT, path=""):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(path)}
    return subprocess.run([sys.executable, *map(str, words)], cwd=folder, env=environment,
                          capture_output=True, text=True)


def imports_of(path, everywhere):
    """Modules that a file imports: at its top, or everywhere in it."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = set()
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.split(".")[0])
    return found


def test_imports_go_downwards_and_stand_at_the_top():
    known, below = {name for level in LEVELS for name in level}, set()
    assert known == {path.stem for path in ROOT.glob("*.py")}
    for level in LEVELS:
        for name in level:
            top = imports_of(ROOT / f"{name}.py", False)
            assert top & known <= below and not top & HEAVY, name
            if name != "sample":  # its script restores files, and imports for that where it starts
                assert imports_of(ROOT / f"{name}.py", True) & known == top & known, name
        below |= set(level)


@pytest.mark.parametrize("name, beside", (("difficulty", []), ("sample", []), ("reward", ["utils"]),
                                          ("model", ["utils"]), ("data", ["utils"])))
def test_a_component_copied_alone_imports(name, beside, tmp_path):
    for file in (name, *beside):
        shutil.copy(ROOT / f"{file}.py", tmp_path)
    done = run("-c", f"import sys, {name}; assert not {HEAVY} & set(sys.modules)", folder=tmp_path)
    assert done.returncode == 0, done.stderr


def test_rl_leaves_what_it_promises_and_sample_and_eval_take_it(tmp_path, photo_folder):
    """A short run with the shipped restorer and judges; then a folder restored by its model."""
    out = tmp_path / "run"
    done = run("rl.py", *FAST, "--data", photo_folder, "--out", out)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert {"config.json", "metrics.csv", "curves.png", "regions.png", "scores.csv", "model",
            "checkpoint.safetensors"} == {f.name for f in out.iterdir()}
    assert "| minus sft, 95 % |" in done.stdout and "judge2" in done.stdout
    from diffusers import UNet2DModel
    assert UNet2DModel.from_pretrained(out / "model", subfolder="unet").config.in_channels == 24
    album = tmp_path / "album"
    write_image(album / "sub/a.png", torch.zeros(3, 20, 24))
    (album / "broken.png").write_bytes(b"no")
    done = run("sample.py", album, "--model", out / "model", "--out", tmp_path / "x")
    assert done.returncode == 2 and "broken.png" in done.stderr
    assert read_image(tmp_path / "x/sub/a.png").shape == (3, 80, 96)


@pytest.mark.parametrize("words", (
    ["new_reward.py", "--reward", "mine", *FAST],
    ["new_task.py", "sft", "--steps", 2, "--batch", 2, "--size", 32],
    ["new_restorer.py", "sft", "--task", "denoise", "--steps", 2, "--batch", 2, "--size", 32],
    ["../weights/train_restorer.py", "--task", "sr+jpeg", "--steps", 2, "--batch", 2, "--size", 32],
    ["../weights/train_restorer.py", "--steps", 1, "--batch", 2, "--size", 32],
    ["ddpo.py", *FAST, "--samples", 2], ["elbo.py", *FAST], ["reward_gradient.py", *FAST],
    ["judge_elsewhere.py", *FAST, "--judge-device", "cpu"]))
def test_an_example_runs(words, tmp_path, photo_folder):
    script, *rest = words
    done = run(ROOT / "examples" / script, *rest, "--data", photo_folder, "--out", tmp_path / "out",
               folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out/model/restorer.json").exists()
    if script == "new_restorer.py":  # the saved one, by the words in its parameters' names
        done = run(ROOT / "examples" / script, "rl", "--task", "denoise", "--model",
                   tmp_path / "out/model", "--trainable", "head", *FAST, "--data", photo_folder,
                   "--out", tmp_path / "rl", folder=tmp_path)
        assert done.returncode == 0, done.stderr


def test_pixelate_has_whole_blocks_on_any_size(gen):
    hq = torch.rand(8, 3, 30, 22, generator=gen)
    lq, severity = runpy.run_path(str(ROOT / "examples/new_task.py"))["pixelate"](hq, gen)
    for x, y, side in zip(hq, lq, (2 + 2 * severity).int().tolist()):
        for i, j in ((0, 0), (12, 8), (28, 20)):
            block = (slice(None), slice(i, i + side), slice(j, j + side))
            means = x[block].mean((1, 2), keepdim=True)
            assert (y[block] - means).abs().max() < 1e-6
    assert severity.unique().tolist() == [0, 1]


def test_speed_times_four_ways(photo_folder):
    done = run("results/speed.py", *FAST, "--data", photo_folder)
    assert done.returncode == 0, done.stderr
    lines = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")]
    assert [line[0] for line in lines] == ["| one iteration", "| networks", "| rl.py",
                                           "| rl.py, DDPO's loss", "| ddpo-pytorch"]
    assert lines[1][3] == "1.00" and all(float(line[1]) > 0 for line in lines[1:])


@pytest.mark.parametrize("words", (
    ["rl.py", "--data", "/nowhere"], ["rl.py", "--model", "/nowhere"], ["rl.py", "--task", "nope"],
    ["rl.py", "--weight", "fixed:7"], ["rl.py", "--resume", "--out", "/nowhere"],
    ["rl.py", "--lr", "x"], ["sft.py", "--task", "nope"], ["eval.py"], ["eval.py", "/nowhere"],
    ["sample.py"], ["sample.py", "/nowhere.png"], ["reward.py"], ["reward.py", "/nowhere.png"],
    ["reward.py", "/nowhere.png", "--metric", "nope"], ["data.py", "--data", "/nowhere"]))
def test_bad_input_is_one_line_and_exit_code_2(words, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / words[0]), run_name="__main__")
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and lines[-1].startswith("error: ")
    assert len([x for x in lines if "error" in x]) == 1 and not list(tmp_path.iterdir())


def test_every_mutant_has_its_place():
    for file, pairs in runpy.run_path(str(ROOT / "tests/mutants.py"))["MUTANTS"].items():
        text = (ROOT / file).read_text(encoding="utf-8")
        assert [old for old, _ in pairs if text.count(old) != 1] == [], file


def test_shipped_weights_are_small_and_nothing_is_unpickled():
    files = [f for f in (ROOT / "weights").rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) < 25e6
    assert not {f.suffix for f in files} & {".bin", ".pt", ".pth", ".pkl", ".ckpt"}
    for file in ROOT.glob("*.py"):
        text = file.read_text(encoding="utf-8")
        assert "torch.load(" not in text and "pickle" not in text and "remote_code=True" not in text
