"""Image files of every kind, run folders, checkpoints, command lines."""

import os
from dataclasses import dataclass
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from safetensors.torch import save_file

import utils
from utils import UserError, option, parse, read_image

BLUE = np.zeros((20, 30, 3), np.uint8) + np.array([0, 51, 255], np.uint8)
GREY = np.array([[0.0, 0.25, 1.0]], np.float32)
EXIF = Image.Exif()
EXIF[0x0112] = 6  # a quarter turn
RUN = {"config": {"lr": 1.0, "mode": "a"}, "photographs": ["x"]}
LAB = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()


@dataclass
class Config:
    """What it does."""
    mode: str = option("a", "which", ["a", "b"])
    lr: float = option(0.1, "rate, 100 %", least=0)
    names: list = option([], "several")
    fast_one: bool = option(False, "switch")


@pytest.mark.parametrize("name, pixels, options, pixel, color", (
    ("a.JPG", BLUE, {"quality": 100, "exif": EXIF}, (29, 0), (-1, -0.6, 1)),
    ("deep.png", (GREY * 65535).astype(np.uint16), {}, (0, 1), (-0.5, -0.5, -0.5)),
    ("float.tif", GREY, {}, (0, 1), (-0.5, -0.5, -0.5)),
    ("float.tif", GREY * 255, {}, (0, 1), (-0.5, -0.5, -0.5)),
    ("clear.png", np.zeros((2, 2, 4), np.uint8), {}, (0, 1), (1, 1, 1)),  # white behind
    ("profile.png", BLUE, {"icc_profile": LAB}, (0, 29), (-1, -0.6, 1))))
def test_images_of_every_kind(name, pixels, options, pixel, color, tmp_path, capsys):
    Image.fromarray(pixels).save(tmp_path / name, **options)
    for _ in range(2):  # a note comes once
        found = read_image(tmp_path / name)[:, *pixel]
    assert found.tolist() == pytest.approx(color, abs=0.02)
    assert capsys.readouterr().err.count("color profile") == (name == "profile.png")


def test_folders_as_people_have_them(tmp_path):
    for name in ("own/b.png", "own/a.JPG", "own/._a.JPG", "own/.ipynb_checkpoints/b.png",
                 "own/@eaDir/b.png", "own/n.txt", "linked/c.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    os.symlink(tmp_path / "linked", tmp_path / "own/link")
    os.symlink(tmp_path / "own", tmp_path / "own/link/loop")
    found = [str(path.relative_to(tmp_path)) for path in utils.list_images(tmp_path / "own")]
    assert found == ["own/a.JPG", "own/b.png", "own/link/c.png"]


def test_atomic_writes_follow_the_umask_and_leave_nothing_on_failure(tmp_path):
    old, folder = os.umask(0o027), tmp_path / "folder/v1.0"
    for name in ("first", "second"):
        with utils.atomic(tmp_path / "folder") as temporary:
            (temporary / "v1.0").mkdir(parents=True)
            save_file({}, temporary / "v1.0" / name)
    os.umask(old)
    assert [path.name for path in folder.iterdir()] == ["second"]
    modes = [path.stat().st_mode & 0o777 for path in (folder, folder / "second")]
    assert modes == [0o750, 0o640]
    before = sorted(tmp_path.rglob("*"))
    full = pytest.raises(OSError, match="folder: no space")
    with full, utils.atomic(tmp_path / "folder") as temporary:
        temporary.mkdir()
        raise utils.SafetensorError("no space left")  # a full disk
    assert sorted(tmp_path.rglob("*")) == before


def test_checkpoints_runs_and_rows(tmp_path):
    state = {"a": {"b": torch.arange(3), 0: {"x": torch.ones(2, 2)}}, "c": torch.tensor(1.5)}
    utils.new_run(tmp_path / "run")  # a run that was killed as it wrote its first checkpoint
    (tmp_path / "run/.checkpoint.1.safetensors").touch()
    run = utils.new_run(tmp_path / "run")
    utils.save_checkpoint(run / "checkpoint.safetensors", state, {"step": 3})
    found, info = utils.load_checkpoint(run / "checkpoint.safetensors")
    assert info == {"step": 3} and set(found["a"]) == {"b", 0} and found["c"] == 1.5
    assert torch.equal(found["a"]["b"], state["a"]["b"]) and found["a"][0]["x"].shape == (2, 2)
    assert utils.new_run(run, resume=True) == run
    utils.check_resume(Config(), RUN, ["lr"], ["x"])
    utils.write_rows(tmp_path / "rows.csv", [{"a": 1}, {"a": 2, "é": "\udce9"}])  # no UTF-8
    found = (tmp_path / "rows.csv").read_bytes()
    assert found.split() == ["a,é".encode(), b"1,", b"2,\xe9"]


@pytest.mark.parametrize("function, words, message", (
    (read_image, ["full/cut.png"], "cut.png: cannot be used.*remove"),
    (utils.new_run, ["full"], "--out full: is not empty"),
    (utils.new_run, ["full", True], "--resume: no checkpoint in full"),
    (utils.load_checkpoint, ["full/cut.png"], "cut.png: cannot be used"),
    (utils.check_resume, [Config(mode="b"), RUN, ["lr"], ["x"]], "started with --mode a; give"),
    (utils.check_resume, [Config(), {"config": {"mode": ""}}, [], []], "without --mode; give"),
    (utils.check_resume, [Config(), RUN, ["lr"], ["y"]], "--resume: .* photographs are other"),
    (parse, [Config, ["--mode", "c"]], "--mode"), (parse, [Config, ["--lr", "nan"]], "--lr nan"),
    (parse, [Config, ["--mod", "a"]], "--mod")))
def test_bad_input_is_named_in_one_line(function, words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    utils.write_image("full/cut.png", torch.rand(3, 64, 64))
    os.truncate("full/cut.png", 4000)
    with pytest.raises(UserError, match=message) as error:
        function(*words)
    assert "\n" not in str(error.value)


def test_generators_and_command_lines(capsys):
    streams = ((0,), (1,), (0, 1), (0, 0), (0, 1, 2), (0, 2, 1), (2, 0, 1), (-1,), (0,))
    draws = [torch.rand(1, generator=utils.generator(*stream)).item() for stream in streams]
    assert len(set(draws)) == 8 and draws[0] == draws[-1]
    filled = parse(Config, ["--lr", "0", "--names", "x", "y", "--fast-one"])
    assert filled == Config(lr=0.0, names=["x", "y"], fast_one=True)
    assert parse(Config, ["p", "q"], positional="files") == (Config(), ["p", "q"])
    with pytest.raises(SystemExit):
        parse(Config, ["--help"])
    assert "rate, 100 % (default: 0.1)" in capsys.readouterr().out


@pytest.mark.parametrize("error, code, line", (
    (UserError("Caught in worker 0\nutils.UserError: a.png:\nbad"), 2, "error: a.png: bad\n"),
    (IsADirectoryError(21, "Is a directory", "out"), 2, "error: [Errno 21] Is a directory: 'out'"),
    (KeyboardInterrupt(), 130, "stopped; what was written stays\n"),
    (RuntimeError("out of memory\nmore"), 2, "error: not enough memory (out of memory more);")))
def test_errors_end_in_one_line_and_bugs_in_a_traceback(error, code, line, capsys):
    with pytest.raises(SystemExit) as ended:
        utils.run_main(Mock(side_effect=error))
    printed = capsys.readouterr().err
    assert ended.value.code == code and printed.startswith(line) and printed.count("\n") == 1
    with pytest.raises(RuntimeError, match="bug"):
        utils.run_main(Mock(side_effect=RuntimeError("bug")))
