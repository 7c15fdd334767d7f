"""Splits, image files of every kind, crops, tasks, pairs on disk and workers."""

import functools
import importlib
import math
import pickle
import re

import numpy as np
import pytest
import torch
from PIL import Image

import data
from data import (DATASETS, SHIPPED, TASKS, aligned_crop, degrade_sr, enlarge, filter2d, fine_detail, gaussian_kernels,
                  get_task, grid_crops, load_pairs, match_pairs, motion_kernels, open_split, pair_crops, pair_factor,
                  photographs, random_crops, resize, round_8bit, stream, training_batch, whole_image)
from utils import UserError, generator, read_image, read_uint8, to_uint8, write_image


def test_shipped_splits_share_no_photograph_and_all_decode():
    names = [name for split in SHIPPED.values() for name in split]
    assert len(names) == len(set(names))
    assert all("motorcycle" not in name for split in ("val", "test") for name in SHIPPED[split])
    for split in SHIPPED:
        photos = photographs(split)
        assert len(photos) == len(SHIPPED[split])
        for photo in photos:
            assert photo.dtype == torch.uint8 and photo.shape[0] == 3 and min(photo.shape[1:]) >= 300


def test_large_photographs_of_pyiqa_are_shrunk_by_two():
    photos = photographs("val")
    assert photos.shrink == [1, 1, 1, 1, 2, 2, 2] and photographs("test").shrink == [1] * 5
    full = to_uint8(read_image(photos.paths[-1])).float()
    height, width = (side // 2 * 2 for side in full.shape[1:])
    expected = full[:, :height, :width].unfold(1, 2, 2).unfold(2, 2, 2).mean((3, 4))
    assert (photos[6].float() - expected).abs().max() <= 0.51


def test_a_missing_shipped_photograph_is_named(monkeypatch):
    monkeypatch.setitem(SHIPPED, "test", ["skimage/data/no_such_photograph.png"])
    with pytest.raises(UserError, match="no_such_photograph.png.*test split.*--data"):
        photographs("test")


def test_every_kind_of_file_is_read(tmp_path):
    pixels = (np.arange(80 * 70 * 3) % 251).reshape(80, 70, 3).astype(np.uint8)
    rgb = Image.fromarray(pixels)
    rgb.save(tmp_path / "rgb.png")
    rgb.convert("L").save(tmp_path / "grey.png")
    rgb.convert("P").save(tmp_path / "palette.png")
    rgb.convert("1").save(tmp_path / "bits.png")
    rgb.save(tmp_path / "a.jpg"), rgb.save(tmp_path / "b.webp"), rgb.save(tmp_path / "c.bmp"), rgb.save(tmp_path / "d.tif")
    for file in tmp_path.iterdir():
        image = read_image(file)
        assert image.shape == (3, 80, 70) and image.min() >= -1 and image.max() <= 1, file
    torch.testing.assert_close(read_image(tmp_path / "rgb.png"),
                               torch.from_numpy(pixels).permute(2, 0, 1) / 127.5 - 1)


def test_16_bit_alpha_and_exif(tmp_path):
    deep = np.full((64, 64), 65535 // 2, dtype=np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    assert read_image(tmp_path / "deep.png").abs().max() < 1e-3  # mid grey, not clipped to white
    Image.new("RGBA", (64, 64), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert (read_image(tmp_path / "clear.png") == 1).all()  # transparent red shows the white behind it
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    Image.new("RGB", (70, 80)).save(tmp_path / "turned.jpg", exif=exif)
    assert read_image(tmp_path / "turned.jpg").shape == (3, 70, 80)


def test_folder_is_split_by_image_and_bad_files_are_named(photo_folder, tmp_path, capsys):
    parts = {split: photographs(split, photo_folder).names for split in ("train", "val", "test")}
    names = sum(parts.values(), [])
    assert sorted(names) == [f"{i}.png" for i in range(5)] and all(parts.values())
    nested = tmp_path / "deep" / "er"
    nested.mkdir(parents=True)
    for i in range(3):
        write_image(nested / f"{i}.PNG", torch.zeros(3, 64, 64))
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    write_image(tmp_path / "small.png", torch.zeros(3, 8, 8))
    assert len(photographs("train", tmp_path)) == 1
    printed = capsys.readouterr().out
    assert "broken.jpg" in printed and "small.png" in printed


def test_empty_and_missing_folders_are_errors(tmp_path):
    with pytest.raises(UserError, match="at least 3"):
        photographs("train", tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        photographs("train", tmp_path / "nowhere")
    with pytest.raises(UserError, match="unknown"):
        get_task("colorize")


def test_crops_are_seeded_in_range_and_hold_detail():
    photos = photographs("train")
    crops = random_crops(photos, 12, 64, generator(3))
    assert crops.shape == (12, 3, 64, 64) and crops.abs().max() <= 1
    assert torch.equal(crops, random_crops(photos, 12, 64, generator(3)))
    assert not torch.equal(crops, random_crops(photos, 12, 64, generator(4)))


def test_grid_crops_are_disjoint_and_from_their_photographs():
    photos = photographs("test")
    crops, names = grid_crops(photos, 30, 64, generator(0))
    assert len(crops) == len(names) == len(set(names)) == 30
    for crop, name in zip(crops, names):
        stem, place = name.split("@")
        y, x = map(int, place.split(","))
        assert y % 64 == x % 64 == 0
        source = photos[photos.names.index(stem)][:, y:y + 64, x:x + 64]
        assert torch.equal(to_uint8(crop), source) and fine_detail(source) >= 0.03


def test_sr_equals_pil_bicubic():
    hq = random_crops(photographs("train"), 2, 64, generator(0))
    for image, lq in zip(hq, degrade_sr(hq)[0]):
        small = Image.fromarray(to_uint8(image).permute(1, 2, 0).numpy()).resize((16, 16), Image.BICUBIC)
        big = torch.from_numpy(np.array(small.resize((64, 64), Image.BICUBIC))).permute(2, 0, 1) / 127.5 - 1
        assert (lq - big).abs().max() < 4 / 127.5 and (lq - big).abs().mean() < 0.6 / 127.5


def test_round_8bit_is_what_a_file_holds(tmp_path):
    image = torch.rand(3, 20, 20) * 2.2 - 1.1
    write_image(tmp_path / "x.png", image)
    torch.testing.assert_close(read_image(tmp_path / "x.png"), round_8bit(image))


# ---- tasks ----

@pytest.fixture(scope="module")
def crops():
    return random_crops(photographs("train"), 24, 64, generator(0))


@pytest.mark.parametrize("name", (*TASKS, "sr2", "sr3", "denoise25", "jpeg10"))
def test_a_task_is_seeded_and_returns_lq_and_severity(name, crops):
    degrade, before = get_task(name), crops.clone()
    lq, severity = degrade(crops, generator(5))
    assert lq.shape == crops.shape and lq.dtype == torch.float32 and lq.abs().max() <= 1
    assert severity.shape == (24,) and severity.min() >= 0 and severity.max() <= 1
    assert torch.equal(crops, before) and not torch.equal(lq, crops)
    again, same = degrade(crops, generator(5))
    assert torch.equal(lq, again) and torch.equal(severity, same)
    if not name.startswith("sr") and name != "jpeg10":
        assert not torch.equal(lq, degrade(crops, generator(6))[0])
    if name not in ("sr", "sr2", "sr3", "mixed"):
        torch.testing.assert_close(lq, round_8bit(lq), atol=1e-6, rtol=0)
    state = torch.get_rng_state()
    degrade(crops[:2], generator(5))
    assert torch.equal(state, torch.get_rng_state())  # nothing global was drawn


@pytest.mark.parametrize("name", TASKS)
def test_other_images_of_the_batch_do_not_matter(name, crops):
    lq, severity = get_task(name)(crops[:4], generator(1))
    others = crops[:4].clone()
    others[1:] = crops[10:13]
    changed, same = get_task(name)(others, generator(1))
    assert (lq[0] - changed[0]).abs().max() <= 1 / 127.5 and torch.equal(severity, same)


@pytest.mark.parametrize("name", ("denoise", "deblur", "jpeg", "derain", "dehaze", "lowlight", "real"))
def test_damage_grows_with_severity(name, crops):
    """The same crop 150 times: the squared error follows the severity in rank."""
    from scipy.stats import spearmanr
    hq = crops[3:4].expand(150, -1, -1, -1)
    lq, severity = get_task(name)(hq, generator(2))
    rank = spearmanr(severity, (lq - hq).square().mean((1, 2, 3))).statistic
    assert rank > 0.6, rank
    assert severity.min() < 0.1 and severity.max() > 0.9


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("height, width", ((65, 47), (17, 40)))
def test_a_task_takes_any_size(name, height, width):
    hq = torch.rand(2, 3, height, width, generator=generator(0)) * 2 - 1
    assert get_task(name)(hq, generator(0))[0].shape == hq.shape


def test_sr4_is_what_it_was_and_other_scales_differ(crops):
    former = resize(round_8bit(resize(crops, (16, 16))), (64, 64)).clamp(-1, 1)
    lq, severity = get_task("sr")(crops, generator(0))
    assert torch.equal(lq, former) and torch.equal(get_task("sr4")(crops)[0], former) and (severity == 1).all()
    errors = [(get_task(f"sr{k}")(crops)[0] - crops).square().mean() for k in (2, 3, 4)]
    assert errors[0] < errors[1] < errors[2]
    smooth = torch.linspace(-1, 1, 50).expand(1, 3, 50, 50)  # a ramp keeps its place: no shift by padding
    assert (get_task("sr3")(smooth)[0] - smooth)[..., 6:-6].abs().max() < 2 / 127.5


def test_noise_has_the_sigma_of_its_name():
    grey = torch.zeros(1, 3, 256, 256)
    lq, severity = get_task("denoise25")(grey, generator(0))
    assert lq.std().item() * 127.5 == pytest.approx(25, rel=0.01) and severity.item() == pytest.approx(20 / 70)
    lq, severity = get_task("denoise")(grey.expand(8, -1, -1, -1), generator(0))
    mild = severity < 0.55  # beyond a sigma of 43 a file's range cuts the noise off
    torch.testing.assert_close(lq[mild].flatten(1).std(1) * 127.5, 5 + 70 * severity[mild], rtol=0.02, atol=0)
    assert mild.sum() >= 3


def test_jpeg_equals_a_file_of_that_quality(crops, tmp_path):
    lq, severity = get_task("jpeg")(crops[:3], generator(0))
    for image, result, s in zip(crops, lq, severity.tolist()):
        Image.fromarray(to_uint8(image).permute(1, 2, 0).numpy()).save(tmp_path / "x.jpg", quality=round(60 - 50 * s))
        assert torch.equal(result, read_image(tmp_path / "x.jpg"))


def test_kernels_sum_to_one_and_have_their_spread():
    angle = torch.tensor([0.0, math.pi / 2])
    kernels = gaussian_kernels(torch.tensor([3.0, 3.0]), torch.tensor([1.0, 1.0]), angle, 25)
    torch.testing.assert_close(kernels.sum((1, 2)), torch.ones(2))
    grid = torch.arange(25.0) - 12
    assert (kernels[0].sum(0) * grid ** 2).sum().sqrt() == pytest.approx(3, abs=0.05)  # along x
    torch.testing.assert_close(kernels[1], kernels[0].T, atol=1e-6, rtol=1e-4)
    moved = motion_kernels(torch.tensor([3.0, 20.0] * 20), generator(0), 25)
    torch.testing.assert_close(moved.sum((1, 2)), torch.ones(40))
    assert (moved >= 0).all() and ((moved[1::2] > 0).sum((1, 2)) > (moved[::2] > 0).sum((1, 2))).all()
    assert (moved[1::2, 12] > 0).any(1).all()  # centred


def test_filter2d_equals_a_plain_loop():
    images = torch.rand(2, 3, 20, 24, generator=generator(0))
    kernels = torch.rand(2, 5, 5, generator=generator(1))
    padded = torch.nn.functional.pad(images, (2, 2, 2, 2), mode="reflect")
    expected = sum(kernels[:, y, x].view(2, 1, 1, 1) * padded[:, :, y:y + 20, x:x + 24]
                   for y in range(5) for x in range(5))
    torch.testing.assert_close(filter2d(images, kernels), expected)


def test_haze_follows_its_formula():
    """Two brightnesses at the same place with the same numbers: their difference is the transmission t."""
    black, white = torch.full((8, 3, 48, 48), -1.0), torch.ones(8, 3, 48, 48)
    dark, severity = get_task("dehaze")(black, generator(3))
    bright, _ = get_task("dehaze")(white, generator(3))
    t = (bright - dark) / 2
    beta = (0.5 + 2 * severity).view(-1, 1, 1, 1)
    assert (t >= torch.exp(-beta) - 0.01).all() and (t <= torch.exp(-0.2 * beta) + 0.01).all()
    light = ((dark + 1) / 2 / (1 - t)).flatten(1)
    assert light.min() > 0.65 and light.max() < 1.05
    assert (t.diff(dim=3).abs() < 0.12).all()  # the depth is smooth


def test_rain_only_brightens_and_lowlight_darkens(crops):
    rain, _ = get_task("derain")(crops, generator(0))
    assert (rain >= round_8bit(crops) - 1e-6).all()
    black = torch.full((64, 3, 48, 48), -1.0)
    lit, severity = get_task("derain")(black, generator(1))
    share = (lit > -1).float().mean((1, 2, 3))  # of pixels in the rain: one layer of few streaks to five of many
    assert share[severity < 0.12].mean() < 0.2 < 0.4 < share[severity > 0.88].mean()
    assert (lit.amax((1, 2, 3)) <= 2 * (0.25 + 0.5 * severity) - 1 + 0.01).all()  # b min(1, S): layers do not add up
    dark, severity = get_task("lowlight")(crops, generator(0))
    assert (dark.mean((1, 2, 3)) < crops.mean((1, 2, 3))).all()
    flat = torch.full((64, 3, 32, 32), 0.5)
    noisy, severity = get_task("lowlight")(flat, generator(1))
    noise = noisy.flatten(1).std(1)
    assert noise[severity > 0.8].mean() > 1.5 * noise[severity < 0.2].mean()


def test_mixed_uses_every_task(crops):
    hq = crops[:1].expand(120, -1, -1, -1)
    lq, severity = get_task("mixed")(hq, generator(0))
    assert severity.min() < 0.1 and severity.max() == 1
    means = lq.mean((1, 2, 3))
    assert means.min() < hq[0].mean() - 0.2 and means.max() > hq[0].mean() + 0.2  # lowlight and dehaze are among them
    assert sum(torch.equal(x, get_task(f"sr{k}")(hq[:1])[0][0]) for x in lq for k in (2, 3, 4)) >= 3


@pytest.mark.parametrize("name", ("colorize", "", "derain3", "sr1", "sr99", "jpeg0", "sr 4", "denoise-5"))
def test_unknown_tasks_are_errors(name):
    with pytest.raises(UserError, match="--task"):
        get_task(name)


# ---- pairs on disk ----

def make(root, *names, size=(16, 16)):
    for index, name in enumerate(names):
        write_image(root / name, torch.full((3, *size), index / len(names)))


LAYOUTS = {  # benchmark -> (files of lq, files of hq in the same order), as their authors lay them out
    "div2k": (["DIV2K_valid_LR_bicubic/X4/0801x4.png", "DIV2K_valid_LR_bicubic/X4/0802x4.png"],
              ["DIV2K_valid_HR/0801.png", "DIV2K_valid_HR/0802.png"]),
    "realsr": (["Canon/Test/4/Canon_001_LR4.png", "Nikon/Test/4/Nikon_001_LR4.png"],
               ["Canon/Test/4/Canon_001_HR.png", "Nikon/Test/4/Nikon_001_HR.png"]),
    "drealsr": (["test_LR/P1_x4.png", "test_LR/P2_x4.png"], ["test_HR/P1_x1.png", "test_HR/P2_x1.png"]),
    "rain100l": (["rainy/rain-1.png", "rainy/rain-2.png"], ["gt/norain-1.png", "gt/norain-2.png"]),
    "rain100h": (["test/input/1.png", "test/input/2.png"], ["test/target/1.png", "test/target/2.png"]),
    "sots": (["hazy/1400_1.png", "hazy/1400_2.png", "hazy/1401_0.8_0.2.jpg"],
             ["gt/1400.png", "gt/1400.png", "gt/1401.png"]),
    "gopro": (["test/GOPR0384/blur/000047.png", "test/GOPR0385/blur/000047.png"],
              ["test/GOPR0384/sharp/000047.png", "test/GOPR0385/sharp/000047.png"]),
    "lol": (["eval15/low/1.png", "eval15/low/22.png"], ["eval15/high/1.png", "eval15/high/22.png"]),
    "lolv2": (["Test/Low/low00690.png"], ["Test/Normal/normal00690.png"]),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_benchmark_layouts_are_found(name, tmp_path, capsys):
    lq, hq = LAYOUTS[name]
    factor = 4 if name == "div2k" else 1
    make(tmp_path, *lq, size=(16, 20)), make(tmp_path, *dict.fromkeys(hq), size=(16 * factor, 20 * factor))
    pairs = load_pairs("test", dataset=name, root=tmp_path)
    assert [(str(a.relative_to(tmp_path)), str(b.relative_to(tmp_path)))
            for a, b in zip(pairs.lq_paths, pairs.paths)] == list(zip(lq, hq))
    assert pairs.factor == [factor] * len(lq) and "without" not in capsys.readouterr().out
    low, high = pairs[0]
    assert low.dtype == torch.uint8 and low.shape == (3, 16, 20) and high.shape == (3, 16 * factor, 20 * factor)
    low, high = whole_image(pairs, None, 0)
    assert low.shape == high.shape == (1, 3, 16 * factor, 20 * factor)
    assert set(DATASETS) == {*LAYOUTS, "cbsd68", "live1"}


@pytest.mark.parametrize("name", ("cbsd68", "live1"))
def test_clean_benchmarks_are_degraded_by_their_task(name, photo_folder):
    photos = load_pairs("test", dataset=name, root=photo_folder)
    task = get_task(DATASETS[name][0])
    lq, hq = whole_image(photos, task, 2)
    assert len(photos) == 5 and torch.equal(hq[0], read_image(photo_folder / "2.png"))
    again, _ = whole_image(photos, task, 2)
    assert torch.equal(lq, again) and not torch.equal(lq, hq)
    with pytest.raises(UserError, match="no training folder"):
        load_pairs("train", dataset=name, root=photo_folder)


def test_every_match_rule_and_both_sides_of_it(tmp_path, capsys):
    make(tmp_path / "one", "a_LR4.png", "a_HR.png", "b_LR4.png", "c_HR.png", "a_LR2.png")
    pairs, unmatched = match_pairs(tmp_path / "one", tmp_path / "one", "suffix:_LR4,_HR")
    assert [(a.name, b.name) for a, b in pairs] == [("a_LR4.png", "a_HR.png")]
    assert [p.name for p in unmatched] == ["a_LR2.png", "b_LR4.png", "c_HR.png"]
    load_pairs("all", tmp_path / "one", tmp_path / "one", "suffix:_LR4,_HR")
    printed = capsys.readouterr().out
    assert "1 pairs; 3 files without a partner" in printed and "b_LR4.png" in printed
    make(tmp_path / "in", "deep/1.jpg", "deep/2.png"), make(tmp_path / "out", "deep/1.png")
    pairs, unmatched = match_pairs(tmp_path / "in", tmp_path / "out", "same")
    assert [a.name for a, _ in pairs] == ["1.jpg"] and [p.name for p in unmatched] == ["2.png"]


def test_bad_pairs_name_their_files(tmp_path):
    make(tmp_path / "lq", "a.png", size=(10, 16)), make(tmp_path / "hq", "a.png", size=(32, 32))
    with pytest.raises(UserError, match=r"lq/a.png \(16 x 10\) and .*hq/a.png \(32 x 32\)"):
        load_pairs("all", tmp_path / "lq", tmp_path / "hq")
    for lq, hq, fits in (((16, 16), (66, 67), 4), ((16, 16), (17, 16), 0), ((20, 20), (16, 16), 0),
                         ((9, 9), (9, 9), 1)):
        make(tmp_path, "x.png", size=lq), make(tmp_path, "y.png", size=hq)
        if fits:
            assert pair_factor(tmp_path / "x.png", tmp_path / "y.png") == fits
        else:
            with pytest.raises(UserError, match="x.png.*y.png"):
                pair_factor(tmp_path / "x.png", tmp_path / "y.png")
    with pytest.raises(UserError, match=r"no lq has its hq.*files: .*a.png"):
        match_pairs(tmp_path / "lq", tmp_path / "hq", "suffix:_L,_H")
    make(tmp_path / "twice", "a.png", "a.jpg")
    with pytest.raises(UserError, match="both would be the hq"):
        match_pairs(tmp_path / "lq", tmp_path / "twice", "same")
    for lq, hq, match, message in (("lq", "lq", "same", "same folder"), ("no", "hq", "same", "--lq .*no such folder"),
                                   ("lq", "hq", "sufix:a,b", "--match"), ("lq", "hq", "suffix:a", "--match")):
        with pytest.raises(UserError, match=message):
            match_pairs(tmp_path / lq, tmp_path / hq, match)
    with pytest.raises(UserError, match="--dataset gopro"):
        load_pairs("test", dataset="gopro", root=tmp_path)
    with pytest.raises(UserError, match="--dataset nope"):
        load_pairs("test", dataset="nope", root=tmp_path)
    make(tmp_path / "single", "a.png", size=(32, 32))
    with pytest.raises(UserError, match="too few images to have a val split"):
        load_pairs("val", tmp_path / "hq", tmp_path / "single")
    with pytest.raises(UserError, match="needs --hq"):
        load_pairs("test", lq=tmp_path / "lq")
    with pytest.raises(UserError, match="--dataset sots: knows its folders"):
        load_pairs("test", lq=tmp_path / "lq", dataset="sots", root=tmp_path)
    with pytest.raises(UserError, match="too few images to have a train split"):
        load_pairs("train", hq=tmp_path / "single")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no images there"):
        load_pairs("all", hq=tmp_path / "empty")


def test_the_border_that_sots_has_is_cut_off_hq(tmp_path):
    """SOTS indoor: hazy 620 x 460, gt 640 x 480; here 10 pixels of another brightness around each gt."""
    inner = torch.rand(3, 24, 40, generator=generator(0)) * 2 - 1
    outer = torch.full((3, 44, 60), -1.0)
    outer[:, 10:-10, 10:-10] = inner
    write_image(tmp_path / "hazy/1_1.png", inner / 2), write_image(tmp_path / "gt/1.png", outer)
    lq, hq = load_pairs("test", dataset="sots", root=tmp_path)[0]
    assert lq.shape == hq.shape == (3, 24, 40) and torch.equal(hq, to_uint8(inner))
    with pytest.raises(UserError, match="sizes do not fit"):  # of two folders, nothing is assumed
        load_pairs("all", tmp_path / "hazy", tmp_path / "gt", "prefix")


def test_pairs_are_split_by_hq(tmp_path):
    names = [f"{i:02d}" for i in range(12)]
    make(tmp_path, *(f"hazy/{n}_{k}.png" for n in names for k in (1, 2)), *(f"gt/{n}.png" for n in names))
    parts = [load_pairs(split, tmp_path / "hazy", tmp_path / "gt", "prefix") for split in ("train", "val", "test")]
    sets = [set(p.paths) for p in parts]
    assert len(set.union(*sets)) == 12 and sum(map(len, sets)) == 12
    assert all(len(p) == 2 * len(set(p.paths)) for p in parts)
    make(tmp_path / "d", *(f"our485/{f}/{n}.png" for n in names for f in ("low", "high")), "eval15/low/1.png",
         "eval15/high/1.png")
    sizes = [len(load_pairs(split, dataset="lol", root=tmp_path / "d")) for split in ("train", "val", "test")]
    assert sizes == [10, 2, 1]


@pytest.mark.parametrize("module", ("rl", "sft"))
def test_a_dataset_brings_its_task_and_an_explicit_one_stays(module, tmp_path, photo_folder):
    make(tmp_path, *(f"our485/{f}/{n}.png" for n in range(12) for f in ("low", "high")))
    config = importlib.import_module(module).Config
    lol = {"dataset": "lol", "root": str(tmp_path)}
    for given, expected in ((lol, "lowlight"), ({"data": str(photo_folder)}, "sr")):
        for task in ("", "mixed"):
            cfg = config(task=task, size=32, **given)
            open_split(cfg, "train")
            assert cfg.task == (task or expected)


@pytest.fixture(scope="module")
def small_pairs(tmp_path_factory):
    """Four pairs, lq smaller by 3."""
    root = tmp_path_factory.mktemp("pairs")
    for index, hq in enumerate(random_crops(photographs("train"), 4, 96, generator(7))):
        write_image(root / "hq" / f"{index}.png", hq)
        write_image(root / "lq" / f"{index}.png", resize(hq[None], (32, 32))[0])
    return load_pairs("all", root / "lq", root / "hq")


def test_an_aligned_crop_is_a_crop_of_the_enlarged_image(small_pairs):
    lq, hq = small_pairs[1]
    big = enlarge(lq[None].float() / 127.5 - 1, 3)[0]
    for top, left in ((0, 0), (13, 22), (48, 48), (1, 47)):
        low, high = aligned_crop(lq, hq, 3, top, left, 48)
        torch.testing.assert_close(low, big[:, top:top + 48, left:left + 48], atol=1e-5, rtol=0)
        assert torch.equal(to_uint8(high), hq[:, top:top + 48, left:left + 48])


def test_pair_crops_are_aligned_seeded_and_independent_of_workers(small_pairs):
    lq, hq = pair_crops(small_pairs, 9, 32, generator(1), per_pair=2)
    assert lq.shape == hq.shape == (9, 3, 32, 32) and lq.abs().max() <= 1
    shrunk = torch.nn.functional.avg_pool2d(lq - hq, 8)  # the two show the same place, turned alike
    assert shrunk.abs().mean() < 0.05
    for workers in (1, 2):
        other = pair_crops(small_pairs, 9, 32, generator(1), per_pair=2, workers=workers)
        assert torch.equal(lq, other[0]) and torch.equal(hq, other[1])
    assert not torch.equal(lq, pair_crops(small_pairs, 9, 32, generator(2), per_pair=2)[0])
    with pytest.raises(UserError, match="smaller than a crop of 128"):
        pair_crops(small_pairs, 1, 128, generator(0))


def test_recolored_crops_keep_their_structure_and_fill_the_range():
    from data import clean_crops, recolor
    photos = photographs("train")
    plain = clean_crops(photos, 64, 32, generator(0))
    assert torch.equal(plain, random_crops(photos, 64, 32, generator(0)))
    half, every = (clean_crops(photos, 64, 32, generator(0), share) for share in (0.5, 1.0))
    kept = (half == plain).flatten(1).all(1)
    assert 20 < kept.sum() < 44 and not (every == plain).flatten(1).all(1).any()
    assert every.abs().max() <= 1 and torch.equal(every, clean_crops(photos, 64, 32, generator(0), 1.0))
    bright = [(x.mean((1, 2, 3)) > 0.3).sum() for x in (plain, every)]
    assert bright[1] >= bright[0] + 5, bright
    ramp = torch.linspace(-1, 1, 32).expand(16, 3, 32, 32)
    moved, = recolor([ramp], generator(1), shift=1.0)
    assert (moved.diff(dim=3) >= -1e-6).all()  # a tone curve: what was brighter stays brighter
    first, second = recolor([ramp, ramp * 0.5], generator(2), shift=1.0)
    assert (first.amax((1, 2, 3)) - second.amax((1, 2, 3)) >= -1e-6).all()  # one draw for all of a list
    tones = [recolor([ramp], generator(1), tone)[0] - ramp for tone in (0.0, 0.3, 1.0)]  # a grey ramp has no colors
    still, little, much = (x.abs().mean() for x in tones)
    assert still < 1e-6 and 0.2 * much < little < 0.4 * much


def test_batches_come_in_order_from_any_number_of_workers(small_pairs):
    state = torch.get_rng_state()
    for source, degrade in ((small_pairs, None), (photographs("val"), get_task("mixed"))):
        make = functools.partial(training_batch, source, degrade, 3, 32, 0, 1, 0.5 if degrade else 0.0)
        plain = [make(step) for step in range(5)]
        for workers in (0, 2):
            for (lq, hq), (a, b) in zip(stream(make, range(5), workers), plain, strict=True):
                assert torch.equal(lq, a) and torch.equal(hq, b)
        resumed = list(stream(make, range(3, 5), 1))
        assert torch.equal(resumed[0][0], plain[3][0]) and not torch.equal(plain[3][0], plain[4][0])
    assert torch.equal(state, torch.get_rng_state())


def test_a_damaged_file_in_a_worker_is_named_in_one_line(tmp_path):
    make(tmp_path, "lq/a.png", "hq/a.png", size=(64, 64))
    pairs = load_pairs("all", tmp_path / "lq", tmp_path / "hq")
    whole = (tmp_path / "hq/a.png").read_bytes()
    (tmp_path / "hq/a.png").write_bytes(whole[:-40])
    with pytest.raises(UserError, match="hq/a.png: not a readable image") as error:
        pair_crops(pairs, 2, 32, generator(0), workers=1)
    assert "\n" not in str(error.value)


def test_photographs_survive_a_trip_to_a_worker():
    photos = photographs("val")
    copy = pickle.loads(pickle.dumps(photos))
    assert copy.names == photos.names and torch.equal(copy[0], photos[0])
    for path in photos.paths[:2] + photos.paths[-1:]:
        assert torch.equal(read_uint8(path), to_uint8(read_image(path)))


def test_bench_and_pairs_on_the_command_line(tmp_path, photo_folder, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["data.py", "bench", "--data", str(photo_folder), "--count", "8"])
    data.main()
    speed = re.search(r"([\d.]+) images per second and worker", capsys.readouterr().out)
    assert float(speed[1]) > 0
    make(tmp_path, "hazy/1_1.png", "gt/1.png", "gt/2.png", size=(64, 64))
    monkeypatch.setattr("sys.argv", ["data.py", "--dataset", "sots", "--root", str(tmp_path), "--out",
                                     str(tmp_path / "x.png")])
    data.main()
    assert "1 files without a partner" in capsys.readouterr().out and read_image(tmp_path / "x.png").shape[2] == 512
    (tmp_path / "empty").mkdir()
    for bad, message in (("--size=0", "--size 0"), (f"--out={tmp_path}/x.foo", "x.foo: this ending"),
                         (f"--hq={tmp_path}/empty", "empty: no images"),
                         (f"--out={tmp_path}/x.png/y.png", "no folder")):
        monkeypatch.setattr("sys.argv", ["data.py", bad])
        with pytest.raises(UserError, match=message):
            data.main()


def test_tasks_joined_by_a_plus_are_drawn_for_each_image(crops):
    hq = crops.repeat(4, 1, 1, 1)[:12]
    lq, severity = get_task("sr2+denoise50")(hq, generator(0))
    enlarged = degrade_sr(hq, scale=2)[0]
    which = torch.tensor([torch.equal(a, b) for a, b in zip(lq, enlarged)])
    assert 0 < which.sum() < 12 and torch.equal(which, severity < 0.5)
    again = get_task("sr2+denoise50")(hq, generator(0))[0]
    assert torch.equal(lq, again)
    for name in ("sr2+", "sr2+nope", "+"):
        with pytest.raises(UserError, match="--task"):
            get_task(name)
