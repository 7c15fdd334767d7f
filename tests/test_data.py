"""Splits, image files of every kind, crops and the sr task."""

import numpy as np
import pytest
import torch
from PIL import Image

from data import SHIPPED, degrade_sr, fine_detail, get_task, grid_crops, photographs, random_crops, round_8bit
from utils import UserError, generator, read_image, to_uint8, write_image


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
    for image, lq in zip(hq, degrade_sr(hq)):
        small = Image.fromarray(to_uint8(image).permute(1, 2, 0).numpy()).resize((16, 16), Image.BICUBIC)
        big = torch.from_numpy(np.array(small.resize((64, 64), Image.BICUBIC))).permute(2, 0, 1) / 127.5 - 1
        assert (lq - big).abs().max() < 4 / 127.5 and (lq - big).abs().mean() < 0.6 / 127.5


def test_round_8bit_is_what_a_file_holds(tmp_path):
    image = torch.rand(3, 20, 20) * 2.2 - 1.1
    write_image(tmp_path / "x.png", image)
    torch.testing.assert_close(read_image(tmp_path / "x.png"), round_8bit(image))
