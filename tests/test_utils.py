"""Image files of every kind, run folders, checkpoints, command lines."""

import os
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

import utils
from utils import UserError, list_images, option, parse, read_image

BLUE = np.zeros((20, 30, 3), np.uint8) + np.array([0, 51, 255], np.uint8)


@dataclass
class Config:
    """What it does."""
    mode: str = option("a", "which", ["a", "b"])
    lr: float = option(0.1, "rate, 100 %", least=0)
    names: list = option([], "several")
    fast_one: bool = option(False, "switch")


def test_images_of_every_kind(tmp_path, capsys):
    for name in ("a.png", "a.webp", "a.bmp", "a.tif", "a.JPG"):
        Image.fromarray(BLUE).save(tmp_path / name, quality=100)
        found = read_image(tmp_path / name)
        assert found.shape == (3, 20, 30)
        assert (found.mean((1, 2)) - torch.tensor([-1, -0.6, 1])).abs().max() < 0.05
    Image.fromarray(np.full((9, 9), 65535 // 4, np.uint16)).save(tmp_path / "deep.png")
    assert (read_image(tmp_path / "deep.png") + 0.5).abs().max() < 1e-3
    for full, level in ((1, 0.25), (255, 0.25 * 255)):
        pixels = np.full((9, 9), level, np.float32)
        pixels[0] = full
        Image.fromarray(pixels).save(tmp_path / "float.tif")
        assert (read_image(tmp_path / "float.tif")[:, 1:] + 0.5).abs().max() < 1e-3
    Image.new("RGBA", (9, 9), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert (read_image(tmp_path / "clear.png") == 1).all()  # white behind
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(BLUE).save(tmp_path / "turned.jpg", exif=exif)
    assert read_image(tmp_path / "turned.jpg").shape == (3, 30, 20)
    assert capsys.readouterr().err == ""
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    Image.fromarray(BLUE).save(tmp_path / "icc.png", icc_profile=lab)
    read_image(tmp_path / "icc.png")
    assert "icc.png: color profile" in capsys.readouterr().err


def test_unreadable_files_are_named_in_one_line(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:4000])
    (tmp_path / "text.jpg").write_text("no image")
    for name in ("cut.png", "text.jpg", "none.png"):
        with pytest.raises(UserError, match=f"{name}: no readable image.*remove") as error:
            read_image(tmp_path / name)
        assert "\n" not in str(error.value)


def test_folders_as_people_have_them(tmp_path):
    for name in ("b.png", "a.JPG", "._a.JPG", ".ipynb_checkpoints/b.png", "@eaDir/b.png", "n.txt"):
        (tmp_path / "own" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "own" / name).touch()
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked/c.png").touch()
    os.symlink(tmp_path / "linked", tmp_path / "own/link")
    os.symlink(tmp_path / "own", tmp_path / "own/link/loop")
    found = [str(path.relative_to(tmp_path / "own")) for path in list_images(tmp_path / "own")]
    assert found == ["a.JPG", "b.png", "link/c.png"]


def test_atomic_writes_follow_the_umask_and_leave_nothing_on_failure(tmp_path):
    image = torch.linspace(-1.2, 1.2, 300).view(3, 10, 10)
    utils.write_image(tmp_path / "deep/x.png", image)
    assert (read_image(tmp_path / "deep/x.png") - image.clamp(-1, 1)).abs().max() <= 0.51 / 127.5
    old = os.umask(0o027)
    try:
        utils.save_checkpoint(tmp_path / "c.safetensors", {"a": torch.ones(1)}, {})
    finally:
        os.umask(old)
    assert (tmp_path / "c.safetensors").stat().st_mode & 0o777 == 0o640
    for content in ("first", "second"):
        with utils.atomic(tmp_path / "folder") as temporary:
            temporary.mkdir()
            (temporary / f"{content}.txt").write_text(content)
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["second.txt"]
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError), utils.atomic(tmp_path / "folder") as temporary:
        temporary.mkdir()
        raise ValueError
    assert sorted(tmp_path.rglob("*")) == before


def test_checkpoints_and_runs(tmp_path):
    state = {"a": {"b": torch.arange(3), 0: {"x": torch.ones(2, 2)}}, "c": torch.tensor(1.5)}
    run = utils.new_run(tmp_path / "run")
    utils.save_checkpoint(run / "checkpoint.safetensors", state, {"step": 3})
    found, info = utils.load_checkpoint(run / "checkpoint.safetensors")
    assert info == {"step": 3} and set(found["a"]) == {"b", 0} and found["c"] == 1.5
    assert torch.equal(found["a"]["b"], state["a"]["b"]) and found["a"][0]["x"].shape == (2, 2)
    assert utils.new_run(run, resume=True) == run
    (tmp_path / "bad.safetensors").write_text("x")
    for call, message in ((lambda: utils.new_run(run), "--out .*run: is not empty"),
                          (lambda: utils.new_run(tmp_path / "new", True), "--resume: no check"),
                          (lambda: utils.load_checkpoint(tmp_path / "bad.safetensors"), "bad.saf"),
                          (lambda: utils.check_resume(Config(), {"lr": 1.0, "mode": "b"}, ["lr"]),
                           "started with --mode b")):
        with pytest.raises(UserError, match=message):
            call()
    utils.check_resume(Config(), {"lr": 1.0, "mode": "a"}, ["lr"])
    utils.write_rows(tmp_path / "rows.csv", [{"a": 1}, {"a": 2, "é": 3}])
    assert (tmp_path / "rows.csv").read_bytes().decode("utf-8").split() == ["a,é", "1,", "2,3"]


def test_generators_of_two_streams_differ():
    streams = ((0,), (1,), (0, 1), (0, 0), (0, 1, 2), (0, 2, 1), (2, 0, 1), (-1,), (0,))
    draws = [torch.rand(1, generator=utils.generator(*stream)).item() for stream in streams]
    assert len(set(draws)) == 8 and draws[0] == draws[-1]


def test_command_lines(capsys):
    filled = parse(Config, ["--lr", "0", "--names", "x", "y", "--fast-one"])
    assert filled == Config(lr=0.0, names=["x", "y"], fast_one=True)
    assert parse(Config, ["p", "q"], positional="files") == (Config(), ["p", "q"])
    for argv in (["--mode", "c"], ["--lr", "-1"], ["--lr", "nan"], ["--lr", "x"], ["--mod", "a"]):
        with pytest.raises(UserError, match=argv[0]) as error:
            parse(Config, argv)
        assert "\n" not in str(error.value)
    with pytest.raises(SystemExit):
        parse(Config, ["--help"])
    assert "rate, 100 % (default: 0.1)" in capsys.readouterr().out


@pytest.mark.parametrize("error, code, line", (
    (UserError("--x 1: too few"), 2, "error: --x 1: too few\n"),
    (UserError("Caught in worker 0\nutils.UserError: a.png: bad"), 2, "error: a.png: bad\n"),
    (OSError(28, "No space left"), 2, "error: [Errno 28] No space left\n"),
    (KeyboardInterrupt(), 130, "stopped; what was written stays\n"),
    (RuntimeError("out of memory\nmore"), 2, None), (RuntimeError("bug"), None, None)))
def test_run_main(error, code, line, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit if code else RuntimeError) as ended:
        utils.run_main(main)
    printed = capsys.readouterr().err
    assert code is None or ended.value.code == code and printed.count("\n") == 1
    assert line is None or printed == line
