"""Degradations, splits, pairs on disk, crops."""

import hashlib
import unicodedata

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import data
from data import TASKS, Config, Crops, Source, get_task, held_out, open_split, pool, whole
from utils import UserError, generator, read_image, to_uint8, write_image

RANDOM = [name for name in TASKS if not name.startswith("sr")]


@pytest.fixture(scope="module")
def smooth():
    """Six smooth color images; lively enough that no channel is like another."""
    coarse = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return F.interpolate(coarse, (64, 64), mode="bicubic").clamp(0, 1) * 2 - 1


def make(root, *names, size=(40, 48)):
    for index, name in enumerate(names):
        noise = torch.rand(3, *size, generator=generator(index)) * 2 - 1
        write_image(root / name, noise)


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
def test_tasks_are_those_of_the_first_edition(name, smooth):
    lq, severity = get_task(name)(smooth, torch.Generator().manual_seed(7))
    found = [lq.mean(), (lq - smooth).abs().mean(), severity.mean()]
    assert torch.stack(found).tolist() == pytest.approx(FORMER[name], abs=1.01e-4)


@pytest.mark.parametrize("name", TASKS)
def test_a_task_is_seeded_bounded_and_leaves_other_generators_alone(name, smooth):
    before, state = smooth.clone(), torch.get_rng_state()
    lq, severity = TASKS[name](smooth, generator(5))
    assert torch.equal(state, torch.get_rng_state()) and torch.equal(before, smooth)
    assert lq.shape == smooth.shape and lq.abs().max() <= 1
    assert severity.shape == (6,) and severity.min() >= 0 and severity.max() <= 1
    assert torch.equal(lq, TASKS[name](smooth, generator(5))[0])
    others = torch.cat([smooth[:1], smooth[1:].flip(0)])
    assert (TASKS[name](others, generator(5))[0][0] - lq[0]).abs().max() <= 1.01 / 127.5
    odd = smooth[:2, :, :33, :47]
    assert TASKS[name](odd, generator(5))[0].shape == odd.shape
    if name in RANDOM and name != "mixed":  # 8 bits
        torch.testing.assert_close(lq * 127.5 + 127.5, to_uint8(lq).float(), atol=1e-3, rtol=0)
    if name in RANDOM and "jpeg" not in name:
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


def test_haze_follows_its_formula():
    """Black and white in the same haze: their difference is the transmission t."""
    black = torch.full((8, 3, 48, 48), -1.0)
    dark, severity = TASKS["dehaze"](black, generator(3))
    t = (TASKS["dehaze"](-black, generator(3))[0] - dark) / 2
    beta = (0.5 + 2 * severity).view(-1, 1, 1, 1)
    assert (t >= torch.exp(-beta) - 0.01).all() and (t <= torch.exp(-0.2 * beta) + 0.01).all()
    assert t[:, :, :12].mean() < t[:, :, -12:].mean() - 0.05  # farther towards the top


def test_jpeg_equals_a_file_of_that_quality(smooth, tmp_path):
    for quality in (10, 20, 30, 40):
        pixels = to_uint8(smooth[0]).permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(tmp_path / "x.jpg", quality=quality)
        lq = TASKS[f"jpeg{quality}"](smooth[:1])[0][0]
        assert torch.equal(to_uint8(lq), to_uint8(read_image(tmp_path / "x.jpg")))


def test_filter2d_equals_a_plain_loop():
    images = torch.rand(2, 3, 20, 24, generator=generator(0))
    kernels = torch.rand(2, 1, 5, 5, generator=generator(1))
    padded = F.pad(images, (2, 2, 2, 2), mode="reflect")
    expected = 0
    for y in range(5):
        for x in range(5):
            expected = expected + kernels[:, :, y:y + 1, x:x + 1] * padded[:, :, y:y + 20, x:x + 24]
    torch.testing.assert_close(data.filter2d(images, kernels), expected)


def test_unknown_task_lists_the_known_ones():
    with pytest.raises(UserError, match="--task colorize.*denoise25.*mixed"):
        get_task("colorize")


# ---- splits ----

def test_shipped_photographs(monkeypatch):
    splits = {split: open_split(Config(), split) for split in ("train", "val", "test", "all")}
    assert [len(splits[split]) for split in splits] == [11, 7, 5, 23]
    assert len(set(splits["all"].names)) == 23 and splits["test"].names[0] == "I03"
    assert {"motorcycle_left", "motorcycle_right"} <= set(splits["train"].names)
    lq, frame = splits["val"][6]
    full = to_uint8(read_image(splits["val"].paths[6][1])).float()
    halved = F.avg_pool2d(full, 2)
    assert lq is None and frame.dtype == torch.uint8 and (frame - halved).abs().max() <= 0.51
    monkeypatch.setitem(data.SHIPPED, "test", "no_such_photograph.png")
    with pytest.raises(UserError, match="no_such_photograph.png: missing.*--data"):
        open_split(Config(), "test")


def test_a_folder_is_split_by_the_hash_of_each_name(tmp_path):
    assert [name for name in map("{:04d}".format, range(1, 30)) if data.split_of(name) != "train"] \
        == ["0005", "0011", "0024", "0025", "0026"]
    parts = [data.split_of(f"deep/{i}") for i in range(5000)]
    assert 430 < parts.count("test") < 570 and 430 < parts.count("val") < 570
    make(tmp_path, *(f"{i:04d}.png" for i in range(1, 12)), "deep/0005.jpg", size=(8, 8))
    names = {split: open_split(Config(data=tmp_path), split).names for split in data.SHIPPED}
    assert names["test"] == ["0005"] and names["val"] == ["0011"] and len(names["train"]) == 10
    decomposed = unicodedata.normalize("NFD", "é3.png")
    make(tmp_path / "accent", decomposed, size=(8, 8))
    assert open_split(Config(data=tmp_path / "accent"), "all").names == ["é3"]


def test_subfolders_are_the_split_and_an_empty_split_says_so(photo_folder, tmp_path):
    assert open_split(Config(data=photo_folder), "test").names == ["test/cat"]
    assert len(open_split(Config(data=photo_folder), "train")) == 3
    make(tmp_path, "0001.png")
    with pytest.raises(UserError, match="no image falls to test.*subfolders train, val and test"):
        open_split(Config(data=tmp_path), "test")
    with pytest.raises(UserError, match="nowhere: no such folder"):
        open_split(Config(data=tmp_path / "nowhere"), "train")


# ---- pairs ----

def pairs_of(root, match, lq="lq", hq="hq"):
    data.match_pairs.cache_clear()
    source = open_split(Config(lq=str(root / lq), hq=str(root / hq), match=match), "all")
    return [(low.name, high.name) for low, high in source.paths]


def test_every_rule_of_names(tmp_path, capsys):
    make(tmp_path, "lq/a/1.png", "hq/a/1.jpg", "lq/rain-7.png", "hq/norain-7.png")
    make(tmp_path, "lq/b_x/14_1.png", "lq/b_x/14_0.8_2.png", "hq/b_x/14.png", "one/é_LR4.png")
    make(tmp_path, "one/" + unicodedata.normalize("NFD", "é_HR.png"), "one/b_LR4.png")
    assert pairs_of(tmp_path, "same") == [("1.png", "1.jpg")]
    assert "1 pairs by --match same, 5 files without a partner, " in capsys.readouterr().err
    assert pairs_of(tmp_path, "start:rain-,norain-") == [("rain-7.png", "norain-7.png")]
    assert pairs_of(tmp_path, "prefix") == [
        ("1.png", "1.jpg"), ("14_0.8_2.png", "14.png"), ("14_1.png", "14.png")]
    assert len(pairs_of(tmp_path, "suffix:_LR4,_HR", "one", "one")) == 1
    assert "1 files without a partner, " in capsys.readouterr().err
    with pytest.raises(UserError, match="--match sufix:a,b: use same, prefix"):
        pairs_of(tmp_path, "sufix:a,b")
    with pytest.raises(UserError, match="0 pairs by --match suffix:A,B"):
        pairs_of(tmp_path, "suffix:A,B")
    with pytest.raises(UserError, match="one folder needs --match suffix"):
        pairs_of(tmp_path, "same", "lq", "hq/../lq")
    make(tmp_path, "lq/a/1.jpg")
    with pytest.raises(UserError, match="a/1.jpg, .*a/1.png: one name"):
        pairs_of(tmp_path, "same")
    with pytest.raises(UserError, match="give both folders"):
        open_split(Config(lq=str(tmp_path)), "train")
    with pytest.raises(UserError, match="no --data"):
        open_split(Config(lq="lq", hq="hq", data="data"), "train")


def test_pairs_of_one_hq_stay_in_one_split(tmp_path):
    make(tmp_path, *(f"lq/{i}_{k}.png" for i in range(20) for k in (1, 2)), size=(8, 8))
    make(tmp_path, *(f"hq/{i}.png" for i in range(20)), size=(8, 8))
    cfg, seen = Config(lq=str(tmp_path / "lq"), hq=str(tmp_path / "hq"), match="prefix"), []
    for split in data.SHIPPED:
        paths = open_split(cfg, split).paths
        assert {data.split_of(high.stem) for _, high in paths} == {split}
        seen += paths
    assert len(set(seen)) == 40


def test_sizes_are_read_from_headers_and_misfits_named(tmp_path, monkeypatch):
    def fits(lq, hq):
        make(tmp_path, "lq/a.png", size=lq)
        make(tmp_path, "hq/a.png", size=hq)
        data.decode.cache_clear()
        pairs_of(tmp_path, "same")

    fits((16, 16), (66, 67))
    low, high = open_split(Config(lq=str(tmp_path / "lq"), hq=str(tmp_path / "hq")), "all")[0]
    assert low.shape == high.shape == (3, 64, 64)  # hq lost the rows that lq has no pixel for
    assert torch.equal(high, to_uint8(read_image(tmp_path / "hq/a.png"))[:, :64, :64])
    small = read_image(tmp_path / "lq/a.png")[None]
    assert torch.equal(low, to_uint8(data.resize(small, (64, 64))[0]))
    for lq, hq in (((16, 16), (17, 16)), ((20, 20), (16, 16)), ((10, 16), (32, 32)),
                   ((16, 16), (32, 48)), ((16, 16), (32, 31))):
        with pytest.raises(UserError, match=r"lq/a.png \(.*hq/a.png \(.*do not fit"):
            fits(lq, hq)
    turned, exif = Image.new("RGB", (16, 32)), Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    turned.save(tmp_path / "lq/a.png", exif=exif)
    with pytest.raises(UserError, match=r"a.png \(32 x 16\)"):
        pairs_of(tmp_path, "same")
    make(tmp_path, "lq/a.png", size=(16, 16))
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
    with pytest.raises(UserError, match="32 x 31|31 x 32"):
        pairs_of(tmp_path, "same")


# ---- crops ----

def test_a_crop_depends_on_seed_and_item_alone():
    source, state = open_split(Config(), "val"), torch.get_rng_state()
    plain = pool(source, TASKS["mixed"], 32, 3, 10)
    assert plain[0].shape == plain[1].shape == (10, 3, 32, 32) and plain[1].abs().max() <= 1
    for other in (pool(source, TASKS["mixed"], 32, 3, 10, workers=2),
                  map(torch.stack, zip(*[Crops(source, TASKS["mixed"], 32, 3, 5, start=i)[0]
                                         for i in range(10)]))):
        assert all(torch.equal(a, b) for a, b in zip(plain, other))
    assert not torch.equal(plain[1], pool(source, TASKS["mixed"], 32, 4, 10)[1])
    noise = [lq - hq for lq, hq in (Crops(source, TASKS["denoise50"], 32, 0, 9)[i] for i in (0, 1))]
    assert abs(torch.corrcoef(torch.stack([x.flatten() for x in noise]))[0, 1]) < 0.2
    assert torch.equal(state, torch.get_rng_state())


def test_crops_have_every_place_scale_turn_and_flip(tmp_path):
    x = torch.arange(96) * 2.6 / 127.5 - 1
    red, green = x.expand(96, 96), x[:, None].expand(96, 96)
    write_image(tmp_path / "a.png", torch.stack([red, green, (red + green) / 2]))
    source = open_split(Config(data=tmp_path), "all")
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


def test_flat_places_are_drawn_again(tmp_path):
    image = torch.zeros(3, 96, 96)
    image[:, :, 64:] = torch.rand(96, 32, generator=generator(0)).round() * 2 - 1
    write_image(tmp_path / "a.png", image)
    crops = pool(open_split(Config(data=tmp_path), "all"), TASKS["sr"], 24, 0, 30)[1]
    assert (crops.mean(1).flatten(1).std(1) > 0.02).all()


def test_crops_of_pairs_are_aligned_and_unscaled(tmp_path):
    source = open_split(Config(), "test")
    for index in range(3):
        hq = whole(source, TASKS["sr"], index)[1]
        write_image(tmp_path / "hq" / f"{index}.png", hq[0])
        write_image(tmp_path / "lq" / f"{index}.png", F.avg_pool2d(hq, 2)[0])
    data.match_pairs.cache_clear()
    pairs = open_split(Config(lq=str(tmp_path / "lq"), hq=str(tmp_path / "hq")), "all")
    lq, hq = pool(pairs, None, 48, 0, 12)
    assert F.avg_pool2d(lq - hq, 4).abs().mean() < 0.02 < (lq - hq.flip(3)).abs().mean() / 4
    assert lq.diff(dim=3).abs().mean() < hq.diff(dim=3).abs().mean()
    fixed = held_out(pairs, None, 48, 12)
    assert torch.equal(fixed[0], lq) and len(fixed[2]) == 12
    low, high = whole(pairs, None, 1)
    assert torch.equal(high, whole(source, TASKS["sr"], 1)[1]) and low.shape == high.shape
    assert (low - high).abs().mean() < 0.1


def test_test_crops_are_those_of_the_first_edition():
    source = open_split(Config(), "test")
    lq, hq, names = held_out(source, TASKS["sr"], 64, 128)
    assert hashlib.sha1(to_uint8(hq).numpy().tobytes()).hexdigest().startswith("f81854e2fddf")
    assert torch.equal(lq, TASKS["sr"](hq)[0]) and len(set(names)) == 128
    for crop, name in zip(hq[:20], names):
        stem, place = name.split("@")
        y, x = map(int, place.split(","))
        photograph = source[source.names.index(stem)][1]
        assert torch.equal(to_uint8(crop), photograph[:, y:y + 64, x:x + 64])
        assert y % 64 == x % 64 == 0 and data.fine_detail(to_uint8(crop)) >= 0.03
    noisy = held_out(source, TASKS["denoise"], 64, 5)
    assert torch.equal(noisy[0], TASKS["denoise"](noisy[1], generator(0, 4))[0])
    with pytest.raises(UserError, match="--size 600: no held-out crop"):
        held_out(source, TASKS["sr"], 600, 4)
    lq, hq = whole(source, TASKS["denoise"], 2)
    assert torch.equal(hq[0], read_image(source.paths[2][1]))
    assert torch.equal(lq, TASKS["denoise"](hq, generator(0, 4, 2))[0])


def test_held_out_opens_few_photographs_of_a_large_folder(monkeypatch):
    opened, image = [], torch.randint(0, 255, (3, 64, 64), generator=generator(0)).byte()
    monkeypatch.setattr(data, "decode", lambda lq, hq: opened.append(hq) or (None, image))
    source = Source([(f"{i}", None, i) for i in range(1000)])
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
    monkeypatch.setattr("sys.argv", ["data.py", "--out", "runs/data/derain.png"])
    with pytest.raises(UserError, match="is there already"):
        data.main()
    make(tmp_path / "mine", "a.png", "b.png")
    with open(tmp_path / "mine/a.png", "rb+") as file:
        file.truncate(4000)
    monkeypatch.setattr("sys.argv", ["data.py", "--data", str(tmp_path / "mine")])
    with pytest.raises(UserError, match="1 of 2 images cannot be read"):
        data.main()
    assert "mine/a.png" in capsys.readouterr().out
