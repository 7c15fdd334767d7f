"""Degradations, splits, pairs on disk, crops."""

import hashlib
import os
import unicodedata

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import data
from data import TASKS, Config, Crops, held_out, open_split, pool, whole
from utils import UserError, generator, read_image, to_uint8, write_image


@pytest.fixture(scope="module")
def smooth():
    """Six smooth color images; lively enough that no channel is like another."""
    coarse = torch.rand(6, 3, 8, 8, generator=generator(0))
    return F.interpolate(coarse, (64, 64), mode="bicubic").clamp(0, 1) * 2 - 1


def make(root, *names, size=(40, 48)):
    for index, name in enumerate(names):
        write_image(root / name, torch.rand(3, *size, generator=generator(index)) * 2 - 1)
    return Config(data=str(root))


def pairs_in(root, match="same", lq="lq", hq="hq"):
    data.match_pairs.cache_clear()
    return open_split(Config(lq=str(root / lq), hq=str(root / hq), match=match), "all")


# ---- degradations ----

@pytest.mark.parametrize("name", ("sr", "mixed", *data.FORMULAS))
def test_a_task_is_seeded_bounded_and_sees_each_image_alone(name, smooth):
    before, state = smooth.clone(), torch.get_rng_state()
    lq, severity = TASKS[name](smooth, generator(7))
    assert torch.equal(state, torch.get_rng_state()) and torch.equal(before, smooth)
    assert lq.abs().max() <= 1 and severity.shape == (6,) and 0 <= severity.min()
    assert torch.equal(lq, TASKS[name](smooth, generator(7))[0])
    others = TASKS[name](torch.cat([smooth[:1], smooth[1:].flip(0)]), generator(7))[0]
    assert (others[0] - lq[0]).abs().max() <= 1.01 / 127.5
    assert TASKS[name](smooth[..., :33, :47], generator(5))[0].shape == (6, 3, 33, 47)
    if name in data.FORMULAS:  # 8 bits, and a larger severity is worse
        torch.testing.assert_close(lq * 127.5 + 127.5, to_uint8(lq).float(), atol=1e-3, rtol=0)
        results = [data.degrade(data.FORMULAS[name], smooth, generator(7), s) for s in (0.1, 0.9)]
        mild, strong = ((lq - smooth).abs().mean() for lq, _ in results)
        assert 0 < mild < strong
    if name in ("denoise", "lowlight", "real"):  # grey images get grey noise
        mixed = torch.cat([smooth, smooth[:, :1].expand(-1, 3, -1, -1)])
        lq = TASKS[name](mixed, generator(1))[0]
        assert (lq[6:] - lq[6:, :1]).abs().max() < 0.02
        assert ((lq[:6] - lq[:6, :1]).diff(dim=3).abs().amax((1, 2, 3)) > 0.05).all()


def test_sr_equals_pil_and_denoise25_has_sigma_25(smooth):
    small = Image.fromarray(to_uint8(smooth[0]).permute(1, 2, 0).numpy()).resize((16, 16), 3)
    large = torch.from_numpy(np.array(small.resize((64, 64), 3))).permute(2, 0, 1) / 127.5 - 1
    assert (TASKS["sr4"](smooth)[0][0] - large).abs().mean() < 1 / 127.5
    noise = TASKS["denoise25"](torch.zeros(1, 3, 64, 64), generator(0))[0]
    assert noise.std().item() * 127.5 == pytest.approx(25, rel=0.05)


# ---- splits and pairs ----

def test_splits_of_the_packages_and_of_folders_by_hash_or_subfolder(tmp_path, photo_folder):
    splits = {split: open_split(Config(), split) for split in ("train", "val", "test", "all")}
    assert [len(set(splits[split].names)) for split in splits] == [11, 7, 5, 23]
    lq, frame = splits["val"][6]
    halved = F.avg_pool2d(to_uint8(read_image(splits["val"].paths[6][1])).float(), 2)
    assert lq is None and frame.dtype == torch.uint8 and (frame - halved).abs().max() <= 0.51
    own = open_split(make(tmp_path / "test", "a.png"), "all")  # not taken for one of pyiqa's
    assert own[0][1].shape == (3, 40, 48)
    names = [f"{i:04d}.png" for i in range(1, 12)]
    names.append("deep/" + unicodedata.normalize("NFD", "é3.png"))
    cfg = make(tmp_path / "own", *names, size=(8, 8))
    names = {split: open_split(cfg, split).names for split in data.SHIPPED}
    assert names["test"] == ["0005"] and names["val"] == ["0011", "deep/é3"]
    assert open_split(Config(data=photo_folder), "test").names == ["test/cat"]


@pytest.mark.parametrize("match, folders, expected, alone", (
    ("same", ("lq", "hq"), ["1.png 1.jpg"], 5),
    ("start:rain-,norain-", ("lq", "hq"), ["rain-7.png norain-7.png"], 5),
    ("prefix", ("lq", "hq"), ["1.png 1.jpg", "14_0.8_2.png 14.png", "14_1.png 14.png"], 2),
    ("suffix:_LR4,_HR", ("one", "one"), ["é_LR4.png é_HR.png"], 1),
    ("suffix:_LR4,", ("one", "hq/../two"), ["é_LR4.png é.png"], 2)))
def test_every_rule_of_names(match, folders, expected, alone, tmp_path, capsys):
    make(tmp_path, "lq/a/1.png", "hq/a/1.jpg", "lq/rain-7.png", "hq/norain-7.png", "two/é.png",
         "lq/b_x/14_1.png", "lq/b_x/14_0.8_2.png", "hq/b_x/14.png", "one/é_LR4.png",
         "one/b_LR4.png", "one/" + unicodedata.normalize("NFD", "é_HR.png"))
    source = pairs_in(tmp_path, match, *folders)
    found = [f"{lq.name} {hq.name}" for lq, hq in source.paths]
    assert [unicodedata.normalize("NFC", names) for names in found] == expected
    assert len(set(source.names)) == len({hq for _, hq in source.paths})  # so in one split
    note = f"{len(expected)} pairs by --match {match}, {alone} files without a partner, {tmp_path}"
    assert note in capsys.readouterr().err


def test_bad_folders_are_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make(tmp_path, "half/train/0005.png", "half/val/1.png", size=(8, 8))
    assert open_split(Config(data="half"), "train").names == ["train/0005"]  # by hash: test
    with pytest.raises(UserError, match="half/val/1.png: has a side under 16 pixels"):
        data.whole(open_split(Config(data="half"), "all"), None, 1)
    make(tmp_path, "one/0001.png", "two/0005.png", "two/0005.jpg", size=(8, 8))
    for settings, message in (
            ({"data": "half"}, "half: no image falls to test.*subfolders train, val and test"),
            ({"data": "no"}, "--data no: no such folder"), ({"lq": "one"}, "give both folders"),
            ({"data": "one"}, "one: no image falls to test.*subfolders train, val and test"),
            ({"data": "two"}, "two/0005.jpg, two/0005.png: one name"),
            ({"lq": "one", "hq": "two/../one"}, "0 pairs by --match same")):
        with pytest.raises(UserError, match=message):
            open_split(Config(**settings), "test")


@pytest.mark.parametrize("size", ((17, 16), (12, 12), (32, 48)))
def test_sizes_are_read_from_headers(size, tmp_path, monkeypatch):
    make(tmp_path, "lq/a.png", "lq/b.png", size=(16, 16))
    make(tmp_path, "hq/a.png", "hq/b.png", size=size)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
    with pytest.raises(UserError, match="2 of 2 pairs: .*lq/a.*hq/a.*: sizes do not fit.*hq/b"):
        pairs_in(tmp_path)


def test_pairs_fit_as_exif_turns_them(tmp_path):
    tags = Image.Exif()
    tags[0x0112] = 6  # a quarter turn
    for folder in ("hq", "raw", "lq"):
        (tmp_path / folder).mkdir()
    Image.new("RGB", (48, 32)).save(tmp_path / "hq/a.jpg", exif=tags)
    Image.new("RGB", (24, 16)).save(tmp_path / "raw/a.png")
    Image.new("RGB", (16, 24)).save(tmp_path / "lq/a.png")
    assert [x.shape for x in pairs_in(tmp_path)[0]] == [(3, 48, 32)] * 2
    with pytest.raises(UserError, match="sizes do not fit"):
        pairs_in(tmp_path, lq="raw")


# ---- crops ----

def test_a_crop_depends_on_seed_and_item_alone():
    source = open_split(Config(), "val")
    plain = pool(source, TASKS["mixed"], 32, 3, 10)
    assert plain[0].shape == plain[1].shape == (10, 3, 32, 32) and plain[1].abs().max() <= 1
    alone = [Crops(source, TASKS["mixed"], 32, 3, 5, start=i)[0] for i in range(10)]
    assert all(torch.equal(a, torch.stack(b)) for a, b in zip(plain, zip(*alone)))
    assert len(list(Crops(source, TASKS["sr"], 32, 3, 2))) == 2  # a loop ends
    assert not torch.equal(plain[1], pool(source, TASKS["mixed"], 32, 4, 10)[1])
    lq, hq = pool(source, TASKS["denoise50"], 32, 0, 2)
    assert abs(torch.corrcoef((lq - hq).flatten(1))[0, 1]) < 0.2


def test_crops_have_every_place_scale_turn_and_flip_but_are_not_flat(tmp_path):
    x = torch.arange(96) * 2.6 / 127.5 - 1
    red, green = x.expand(96, 96), x[:, None].expand(96, 96)
    write_image(tmp_path / "ramp/a.png", torch.stack([red, green, (red + green) / 2]))
    source = open_split(Config(data=tmp_path / "ramp"), "all")
    crops = pool(source, TASKS["sr"], 32, 0, 60)[1]
    slopes = [crops[:, :2].diff(dim=dim).mean((2, 3)) * 127.5 / 2.6 for dim in (2, 3)]
    slopes = torch.cat(slopes, 1).round()  # (60, 4): of red and green along y, then along x
    assert len(slopes.sign().unique(dim=0)) == 8
    scales = slopes.abs().amax(1)
    assert scales.unique().tolist() == [1, 2, 3] and 20 < (scales == 1).sum() < 40
    assert len(crops[scales == 1, 0].amin((1, 2)).unique()) > 10
    with pytest.raises(UserError, match="a.png: 96 x 96 is less than a crop of 128"):
        pool(source, TASKS["sr"], 128, 0, 1)
    image = torch.zeros(3, 96, 96)
    image[:, :, 64:] = torch.rand(96, 32, generator=generator(0)).round() * 2 - 1
    write_image(tmp_path / "flat/a.png", image)
    crops = pool(open_split(Config(data=tmp_path / "flat"), "all"), TASKS["sr"], 24, 0, 30)[1]
    assert (crops.mean(1).flatten(1).std(1) > 0.02).all()


def test_crops_of_pairs_are_aligned_and_unscaled(tmp_path):
    hq = whole(open_split(Config(), "test"), TASKS["sr"], 0)[1]
    write_image(tmp_path / "hq/0.png", hq[0, :, :301])  # a row for which lq has no pixel
    write_image(tmp_path / "lq/0.png", F.avg_pool2d(hq[..., :301, :], 2)[0])
    pairs = pairs_in(tmp_path)
    low, high = whole(pairs, None, 0)
    assert torch.equal(high, hq[..., :300, :]) and (low - high).abs().mean() < 0.1
    lq, hq = pool(pairs, None, 48, 0, 12)
    assert F.avg_pool2d(lq - hq, 4).abs().mean() < 0.02 < (lq - hq.flip(3)).abs().mean() / 4
    assert lq.diff(dim=3).abs().mean() < hq.diff(dim=3).abs().mean()
    assert torch.equal(held_out(pairs, None, 48, 12)[0], lq)


def test_test_crops_are_those_of_the_first_edition():
    source = open_split(Config(), "test")
    lq, hq, names = held_out(source, TASKS["denoise"], 64, 128)
    assert hashlib.sha1(to_uint8(hq).numpy().tobytes()).hexdigest().startswith("f81854e2fddf")
    assert torch.equal(lq, TASKS["denoise"](hq, generator(0, 4))[0]) and len(set(names)) == 128
    lq, hq = whole(source, TASKS["denoise"], 2)
    assert torch.equal(lq, TASKS["denoise"](hq, generator(0, 4, 2))[0])


def test_script(tmp_path, monkeypatch, command, capsys):
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "mine", "a.png", "b.png")
    command(data, "--data", "mine", "--size", 32)
    assert read_image("runs/data/sr.png").shape == (3, 64, 256)
    os.truncate("mine/a.png", 4000)
    with pytest.raises(UserError, match="1 of 2 images cannot be used"):
        command(data, "--data", "mine", "--size", 32)
    assert "mine/a.png" in capsys.readouterr().out
