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
from data import TASKS, Config, Crops, get_task, held_out, open_split, pool, whole
from utils import UserError, generator, read_image, to_uint8, write_image


@pytest.fixture(scope="module")
def smooth():
    """Six smooth color images; lively enough that no channel is like another."""
    coarse = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return F.interpolate(coarse, (64, 64), mode="bicubic").clamp(0, 1) * 2 - 1


def make(root, *names, size=(40, 48)):
    for index, name in enumerate(names):
        write_image(root / name, torch.rand(3, *size, generator=generator(index)) * 2 - 1)
    return Config(data=str(root))


def pairs_in(root, match="same", lq="lq", hq="hq"):
    data.match_pairs.cache_clear()
    return open_split(Config(lq=str(root / lq), hq=str(root / hq), match=match), "all")


# ---- degradations ----

# mean of lq, mean |lq - hq|, mean severity on `smooth`, as in the first edition, whose data made
# weights/; the severity of jpeg was then that of the rounded quality
FORMER = {
    "sr4": (-0.0102, 0.0257, 1.0000), "sr2": (-0.0103, 0.0039, 0.3333),
    "sr3": (-0.0104, 0.0106, 0.6667), "denoise": (-0.0119, 0.2118, 0.4513),
    "denoise25": (-0.0110, 0.1494, 0.2857), "denoise50": (-0.0114, 0.2841, 0.6429),
    "deblur": (-0.0110, 0.0705, 0.4513), "jpeg": (-0.0109, 0.0569, 0.4513),
    "jpeg10": (-0.0099, 0.1126, 1.0000), "derain": (0.1072, 0.1184, 0.4513),
    "dehaze": (0.3970, 0.4228, 0.4513), "lowlight": (-0.5807, 0.5705, 0.4513),
    "real": (-0.0110, 0.0909, 0.4513), "mixed": (-0.0724, 0.1322, 0.4077),
}


@pytest.mark.parametrize("name", FORMER)
def test_a_task_is_that_of_the_first_edition_seeded_and_bounded(name, smooth):
    before, state = smooth.clone(), torch.get_rng_state()
    lq, severity = get_task(name)(smooth, torch.Generator().manual_seed(7))
    found = torch.stack([lq.mean(), (lq - smooth).abs().mean(), severity.mean()])
    assert found.tolist() == pytest.approx(FORMER[name], abs=1.01e-4)
    assert torch.equal(state, torch.get_rng_state()) and torch.equal(before, smooth)
    assert lq.abs().max() <= 1 and severity.shape == (6,) and 0 <= severity.min()
    assert torch.equal(lq, TASKS[name](smooth, torch.Generator().manual_seed(7))[0])
    others = torch.cat([smooth[:1], smooth[1:].flip(0)])  # do not touch the first
    others = TASKS[name](others, torch.Generator().manual_seed(7))[0]
    assert (others[0] - lq[0]).abs().max() <= 1.01 / 127.5
    odd = smooth[:2, :, :33, :47]
    assert TASKS[name](odd, generator(5))[0].shape == odd.shape
    if name[:2] != "sr" and name != "mixed":  # 8 bits
        torch.testing.assert_close(lq * 127.5 + 127.5, to_uint8(lq).float(), atol=1e-3, rtol=0)
    if name[:2] != "sr" and "jpeg" not in name:
        assert not torch.equal(lq, TASKS[name](smooth, generator(6))[0])


def test_sr_equals_pil_and_a_ramp_keeps_its_place(smooth):
    for image, lq in zip(smooth, TASKS["sr"](smooth)[0]):
        small = Image.fromarray(to_uint8(image).permute(1, 2, 0).numpy()).resize((16, 16), 3)
        big = torch.from_numpy(np.array(small.resize((64, 64), 3))).permute(2, 0, 1) / 127.5 - 1
        assert (lq - big).abs().mean() < 1 / 127.5
    ramp = torch.linspace(-1, 1, 50).expand(1, 3, 50, 50)
    assert (TASKS["sr3"](ramp)[0] - ramp)[..., 6:-6].abs().max() < 2 / 127.5


@pytest.mark.parametrize("name", ("denoise", "lowlight", "real"))
def test_grey_images_get_grey_noise_and_color_images_color_noise(name, smooth):
    grey = smooth[:, :1].expand(-1, 3, -1, -1)
    lq = TASKS[name](torch.cat([grey, smooth]), generator(1))[0]
    assert (lq[:6] - lq[:6, :1]).abs().max() < 0.02
    assert ((lq[6:] - lq[6:, :1]).diff(dim=3).abs().amax((1, 2, 3)) > 0.05).all()


def test_filter2d_equals_a_plain_loop():
    images = torch.rand(2, 3, 20, 24, generator=generator(0))
    kernels = torch.rand(2, 1, 5, 5, generator=generator(1))
    padded = F.pad(images, (2, 2, 2, 2), mode="reflect")
    expected = torch.zeros_like(images)
    for y in range(5):
        for x in range(5):
            expected += kernels[:, :, y:y + 1, x:x + 1] * padded[:, :, y:y + 20, x:x + 24]
    torch.testing.assert_close(data.filter2d(images, kernels), expected)


# ---- splits and pairs ----

def test_shipped_photographs():
    splits = {split: open_split(Config(), split) for split in ("train", "val", "test", "all")}
    assert [len(splits[split]) for split in splits] == [11, 7, 5, 23]
    assert len(set(splits["all"].names)) == 23 and splits["test"].names[0] == "I03"
    assert {"motorcycle_left", "motorcycle_right"} <= set(splits["train"].names)
    lq, frame = splits["val"][6]
    halved = F.avg_pool2d(to_uint8(read_image(splits["val"].paths[6][1])).float(), 2)
    assert lq is None and frame.dtype == torch.uint8 and (frame - halved).abs().max() <= 0.51


def test_folders_are_split_by_the_hash_of_each_name_or_by_subfolders(tmp_path, photo_folder):
    parts = [data.split_of(f"deep/{i}") for i in range(5000)]
    assert 430 < parts.count("test") < 570 and 430 < parts.count("val") < 570
    names = [f"{i:04d}.png" for i in range(1, 12)]
    cfg = make(tmp_path, *names, "deep/" + unicodedata.normalize("NFD", "é3.png"), size=(8, 8))
    names = {split: open_split(cfg, split).names for split in data.SHIPPED}
    assert names["test"] == ["0005"] and names["val"] == ["0011", "deep/é3"]
    assert len(names["train"]) == 9
    assert open_split(Config(data=photo_folder), "test").names == ["test/cat"]
    assert len(open_split(Config(data=photo_folder), "train")) == 3


@pytest.mark.parametrize("match, folders, expected, alone", (
    ("same", ("lq", "hq"), [("a/1.png", "a/1.jpg")], 5),
    ("start:rain-,norain-", ("lq", "hq"), [("rain-7.png", "norain-7.png")], 5),
    ("prefix", ("lq", "hq"), [("a/1.png", "a/1.jpg"), ("b_x/14_0.8_2.png", "b_x/14.png"),
                              ("b_x/14_1.png", "b_x/14.png")], 2),
    ("suffix:_LR4,_HR", ("one", "one"), [("é_LR4.png", "é_HR.png")], 1),
    ("suffix:_LR4,", ("one", "hq/../two"), [("é_LR4.png", "é.png")], 2)))
def test_every_rule_of_names(match, folders, expected, alone, tmp_path, capsys):
    make(tmp_path, "lq/a/1.png", "hq/a/1.jpg", "lq/rain-7.png", "hq/norain-7.png", "two/é.png",
         "lq/b_x/14_1.png", "lq/b_x/14_0.8_2.png", "hq/b_x/14.png", "one/é_LR4.png",
         "one/b_LR4.png", "one/" + unicodedata.normalize("NFD", "é_HR.png"))
    source = pairs_in(tmp_path, match, *folders)
    found = [tuple(unicodedata.normalize("NFC", path.relative_to(tmp_path / folder).as_posix())
                   for path, folder in zip(pair, folders)) for pair in source.paths]
    assert found == expected
    note = f"{len(expected)} pairs by --match {match}, {alone} files without a partner, {tmp_path}"
    assert note in capsys.readouterr().err


@pytest.mark.parametrize("settings, message", (
    ({"data": "nowhere"}, "--data nowhere: no such folder"), ({"lq": "lq"}, "give both folders"),
    ({"data": "one", "lq": "lq", "hq": "hq"}, "no --data"), ({"lq": "lq", "hq": "no"}, "--hq no:"),
    ({"data": "one"}, "one: no image falls to test.*subfolders train, val and test"),
    ({"data": "two"}, "two/0005.jpg, two/0005.png: one name"),
    ({"lq": "lq", "hq": "hq", "match": "sufix:a,b"}, "--match sufix:a,b: use same, prefix"),
    ({"lq": "lq", "hq": "hq", "match": "suffix:A,B"}, "0 pairs by --match suffix:A,B"),
    ({"lq": "one", "hq": "hq/../one"}, "0 pairs by --match same"),
    ({"lq": "lq", "hq": "hq"}, r"lq/0005.png \(16 x 20\), hq/0005.png \(32 x 31\): sizes do not")))
def test_bad_folders_are_named(settings, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make(tmp_path, "one/0001.png", "two/0005.png", "two/0005.jpg", size=(8, 8))
    make(tmp_path, "lq/0005.png", size=(20, 16))
    make(tmp_path, "hq/0005.png", size=(31, 32))
    data.match_pairs.cache_clear()
    with pytest.raises(UserError, match=message):
        open_split(Config(**settings), "test")


def test_pairs_of_one_hq_stay_in_one_split(tmp_path):
    make(tmp_path, *(f"lq/{i}_{k}.png" for i in range(20) for k in (1, 2)), size=(8, 8))
    make(tmp_path, *(f"hq/{i}.png" for i in range(20)), size=(8, 8))
    cfg, seen = Config(lq=str(tmp_path / "lq"), hq=str(tmp_path / "hq"), match="prefix"), []
    for split in data.SHIPPED:
        paths = open_split(cfg, split).paths
        assert {data.split_of(high.stem) for _, high in paths} == {split}
        seen += paths
    assert len(set(seen)) == 40


@pytest.mark.parametrize("lq, hq, fits", (
    ((16, 16), (66, 67), True), ((16, 16), (17, 16), False), ((20, 20), (16, 16), False),
    ((10, 16), (32, 32), False), ((16, 16), (32, 48), False), ((16, 16), (32, 31), False)))
def test_sizes_are_read_from_headers(lq, hq, fits, tmp_path, monkeypatch):
    make(tmp_path, "lq/a.png", size=lq)
    make(tmp_path, "hq/a.png", size=hq)
    with monkeypatch.context() as patch:
        patch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
        if not fits:
            with pytest.raises(UserError, match="sizes do not fit"):
                pairs_in(tmp_path)
            return
        source = pairs_in(tmp_path)
    low, high = source[0]  # hq lost the rows that lq has no pixel for
    assert torch.equal(high, to_uint8(read_image(tmp_path / "hq/a.png"))[:, :64, :64])
    small = read_image(tmp_path / "lq/a.png")[None]
    assert torch.equal(low, to_uint8(data.resize(small, (64, 64))[0]))


def test_images_keep_their_size_in_a_folder_of_any_name(tmp_path):
    """A folder called test or img was taken for one of pyiqa's, whose photographs are halved."""
    for name in ("test", "img"):
        write_image(tmp_path / name / "a.png", torch.zeros(3, 40, 48))
        source = open_split(Config(data=str(tmp_path / name)), "all")
        assert source[0][1].shape == (3, 40, 48)


# ---- crops ----

def test_a_crop_depends_on_seed_and_item_alone():
    source, state = open_split(Config(), "val"), torch.get_rng_state()
    plain = pool(source, TASKS["mixed"], 32, 3, 10)
    assert plain[0].shape == plain[1].shape == (10, 3, 32, 32) and plain[1].abs().max() <= 1
    alone = [Crops(source, TASKS["mixed"], 32, 3, 5, start=i)[0] for i in range(10)]
    assert all(torch.equal(a, torch.stack(b)) for a, b in zip(plain, zip(*alone)))
    assert not torch.equal(plain[1], pool(source, TASKS["mixed"], 32, 4, 10)[1])
    noise = [lq - hq for lq, hq in (Crops(source, TASKS["denoise50"], 32, 0, 9)[i] for i in (0, 1))]
    assert abs(torch.corrcoef(torch.stack([x.flatten() for x in noise]))[0, 1]) < 0.2
    assert torch.equal(state, torch.get_rng_state())


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
    for channel in (0, 1):
        assert len(crops[scales == 1, channel].amin((1, 2)).unique()) > 10
    with pytest.raises(UserError, match="a.png: 96 x 96 is less than a crop of 128"):
        pool(source, TASKS["sr"], 128, 0, 1)
    image = torch.zeros(3, 96, 96)
    image[:, :, 64:] = torch.rand(96, 32, generator=generator(0)).round() * 2 - 1
    write_image(tmp_path / "flat/a.png", image)
    crops = pool(open_split(Config(data=tmp_path / "flat"), "all"), TASKS["sr"], 24, 0, 30)[1]
    assert (crops.mean(1).flatten(1).std(1) > 0.02).all()


def test_crops_of_pairs_are_aligned_and_unscaled(tmp_path):
    source = open_split(Config(), "test")
    for index in range(3):
        hq = whole(source, TASKS["sr"], index)[1]
        write_image(tmp_path / "hq" / f"{index}.png", hq[0])
        write_image(tmp_path / "lq" / f"{index}.png", F.avg_pool2d(hq, 2)[0])
    pairs = pairs_in(tmp_path)
    lq, hq = pool(pairs, None, 48, 0, 12)
    assert F.avg_pool2d(lq - hq, 4).abs().mean() < 0.02 < (lq - hq.flip(3)).abs().mean() / 4
    assert lq.diff(dim=3).abs().mean() < hq.diff(dim=3).abs().mean()
    fixed = held_out(pairs, None, 48, 12)
    assert torch.equal(fixed[0], lq) and len(fixed[2]) == 12
    low, high = whole(pairs, None, 1)
    assert torch.equal(high, whole(source, TASKS["sr"], 1)[1]) and (low - high).abs().mean() < 0.1


def test_test_crops_are_those_of_the_first_edition():
    source = open_split(Config(), "test")
    lq, hq, names = held_out(source, TASKS["denoise"], 64, 128)
    assert hashlib.sha1(to_uint8(hq).numpy().tobytes()).hexdigest().startswith("f81854e2fddf")
    assert torch.equal(lq, TASKS["denoise"](hq, generator(0, 4))[0]) and len(set(names)) == 128
    stem, place = names[9].split("@")
    y, x = map(int, place.split(","))
    assert torch.equal(to_uint8(hq[9]), source[source.names.index(stem)][1][:, y:y + 64, x:x + 64])
    with pytest.raises(UserError, match="--size 600: no held-out crop"):
        held_out(source, TASKS["sr"], 600, 4)
    lq, hq = whole(source, TASKS["denoise"], 2)
    assert torch.equal(hq[0], read_image(source.paths[2][1]))
    assert torch.equal(lq, TASKS["denoise"](hq, generator(0, 4, 2))[0])


def test_held_out_opens_few_photographs_of_a_large_folder(tmp_path, monkeypatch):
    opened, image = [], torch.rand(3, 64, 64, generator=generator(0)) * 2 - 1
    monkeypatch.setattr("utils.read_image", lambda path: opened.append(int(path.stem)) or image)
    source = data.Source([(f"{i}", None, tmp_path / f"{i}.png") for i in range(1000)])
    assert len(held_out(source, TASKS["sr"], 32, 64)[2]) == 64
    assert len(opened) <= 32 and max(opened) > 900


def test_script(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["data.py", "--task", "derain", "--size", "32"])
    data.main()
    picture = to_uint8(read_image(tmp_path / "runs/data/derain.png"))
    lq, hq = pool(open_split(Config(), "train"), TASKS["derain"], 32, 0, 8)
    assert torch.equal(picture[:, :32, 32:64], to_uint8(lq[1]))
    assert picture.shape == (3, 64, 256) and torch.equal(picture[:, 32:, -32:], to_uint8(hq[7]))
    make(tmp_path / "mine", "a.png", "b.png")
    os.truncate(tmp_path / "mine/a.png", 4000)
    monkeypatch.setattr("sys.argv", ["data.py", "--data", "mine", "--size", "32"])
    with pytest.raises(UserError, match="1 of 2 images cannot be used"):
        data.main()
    printed = capsys.readouterr()
    assert "mine/a.png" in printed.out and "color profile" not in printed.err  # rocket.jpg
