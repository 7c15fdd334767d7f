"""Photographs, crops and the degradations that make a low-quality image (lq) out of a high-quality one (hq).

A task is a pure, seeded, batched function lq = degrade(hq, generator) at the size of hq; `TASKS` names them all.
  sr: lq = up_4(round_8bit(down_4(hq))), both bicubic, down_4 with antialias, the usual "bicubic" setting of
      super-resolution (DIV2K track 1, Agustsson and Timofte 2017), brought back to the hq size.

Chosen here:
 1. Photographs come inside the wheels of scikit-image, matplotlib and pyiqa, so a laptop needs no download. The split
    is by image, never by crop; the two motorcycle views are one scene and stay on one side. Three splits: `train` for
    SFT, judges and RL; `val` to watch and to tune; `test` only for tables: five reference photographs of TID2013
    (Ponomarenko et al. 2015, cut from the Kodak set), which lie in pyiqa's wheel beside three photographs of `val`.
 2. Training crops are shrunk by 1, 2 or 3 with an area filter: more scales, and the JPEG blocks of sources vanish.
    The three of `val` from pyiqa are JPEGs of a megapixel and are shrunk by 2 for the same reason.
 3. A crop without detail (sky, black border) tells neither the restorer nor the judge anything, so training crops
    whose brightness has a standard deviation under 0.04 are drawn again, and evaluation takes crops whose
    neighbouring pixels differ by 0.03 or more, as 97 % of the training crops do: a smooth crop looks the same at any
    quality. Both are decided on hq alone.

    python data.py --task sr                          # laptop: writes runs/data/sr.png, lq above hq
    python data.py --task sr --data ~/DIV2K_train_HR  # the same for a folder of photographs
"""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F

IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
SKIMAGE, MATPLOTLIB = "skimage/data", "matplotlib/mpl-data/sample_data"
PYIQA, TID2013 = "tests/test_efficiency_img_dir", "ResultsCalibra/ref_dir"  # both in pyiqa's wheel
SHIPPED = {
    "train": [f"{SKIMAGE}/{name}" for name in (
        "astronaut.png", "coffee.png", "motorcycle_left.png", "motorcycle_right.png", "rocket.jpg", "ihc.png",
        "hubble_deep_field.jpg", "retina.jpg", "brick.png", "grass.png", "gravel.png")],
    "val": [f"{MATPLOTLIB}/grace_hopper.jpg"] + [f"{SKIMAGE}/{name}.png" for name in ("coins", "chelsea", "camera")] + [
        f"{PYIQA}/{name}.jpg" for name in (
            "frame_4wrwr48cdk6rbcjl", "frame_7gzdcz9sif0ekg31", "frame_9ogwhvvy7gfj6jzh")],
    "test": [f"{TID2013}/{name}.bmp" for name in ("I03", "I04", "I06", "I08", "I19")],
}


# ---- degradations: hq (B, 3, H, W) in [-1, 1] -> lq of the same shape and range ----

def round_8bit(images):
    """Clamps to [-1, 1] and rounds to the 256 levels that a file can hold; (..., H, W) -> the same shape."""
    return ((images.clamp(-1, 1) * 127.5 + 127.5).round() - 127.5) / 127.5


def resize(images, size, mode="bicubic"):
    """(B, 3, H, W) -> (B, 3, *size), bicubic with antialias as PIL and the SR literature have it."""
    return F.interpolate(images, size=size, mode=mode, antialias=True, align_corners=False)


def degrade_sr(hq, generator=None, scale=4):
    """Bicubic down by `scale`, 8 bit, bicubic up. H and W must be multiples of `scale`. Uses no randomness."""
    height, width = hq.shape[-2:]
    small = round_8bit(resize(hq, (height // scale, width // scale)))
    return resize(small, (height, width)).clamp(-1, 1)


TASKS = {"sr": degrade_sr}


def get_task(name):
    """The degradation called `name`. Raises UserError for an unknown one."""
    if name not in TASKS:
        from utils import UserError
        raise UserError(f"--task {name}: unknown; choose one of {', '.join(TASKS)}")
    return TASKS[name]


# ---- photographs ----

class Photographs:
    """A list of (name, path), decoded on demand into uint8 (3, H, W); the most recent ones stay in memory.

    shrink: area downscaling of each photograph by this integer factor, a list, or None for none at all."""

    def __init__(self, paths, root, cache=64, shrink=None):
        self.paths, self.names = list(paths), [str(Path(p).relative_to(root)) for p in paths]
        self.shrink = shrink or [1] * len(self.paths)
        self.decode = functools.lru_cache(cache)(self._decode)

    def _decode(self, index):
        from utils import read_image, to_uint8
        image = read_image(self.paths[index])
        return to_uint8(F.avg_pool2d(image, self.shrink[index]))  # (3, H, W)

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        """uint8 (3, H, W)."""
        return self.decode(index)


def photographs(split, folder="", smallest=64):
    """The photographs of `split` (train, val, test): the shipped ones, or those of `folder`, split by image.

    In a folder (searched recursively) every tenth readable image is `test`, the next one `val`, the rest `train`; with
    fewer than 20 images every third to ninth, so that no split is empty. Files that cannot be read or have a side
    under `smallest` pixels are named and skipped. Raises UserError if fewer than three are left.
    """
    from utils import UserError, read_image
    if not folder:
        from importlib.util import find_spec
        # found without being imported
        packages = {SKIMAGE: "skimage", MATPLOTLIB: "matplotlib", PYIQA: "pyiqa", TID2013: "pyiqa"}
        homes = {start: Path(find_spec(name).origin).parent.parent for start, name in packages.items()
                 if find_spec(name)}
        paths = [next((home / p for start, home in homes.items() if p.startswith(start)), Path(p))
                 for p in SHIPPED[split]]
        if missing := [str(p) for p in paths if not p.exists()]:
            raise UserError(f"{missing[0]}: a photograph of the {split} split is missing; requirements.txt brings it "
                            "(in scikit-image, matplotlib or pyiqa 0.1.16), or use --data DIR")
        found = Photographs(paths, "/", shrink=[2 if p.startswith(PYIQA) else 1 for p in SHIPPED[split]])
        found.names = [p.stem for p in paths]
        return found
    if not Path(folder).is_dir():
        raise UserError(f"--data {folder}: no such folder; give a folder of photographs")
    readable = []
    for path in list_images(folder):
        try:
            height, width = image_size(path)
            if min(height, width) < smallest:
                print(f"skipped {path}: {width} x {height} is smaller than {smallest} x {smallest}")
                continue
            readable.append(path)
        except UserError as error:
            print(f"skipped {error}")
    if len(readable) < 3:
        raise UserError(f"--data {folder}: {len(readable)} readable photographs of at least {smallest} x {smallest} "
                        f"({', '.join(IMAGE_ENDINGS)}); training, validation and test need at least 3")
    every = max(3, min(10, len(readable) // 2))
    place = {"test": 0, "val": 1}
    chosen = [p for i, p in enumerate(readable)
              if (i % every == place[split] if split in place else i % every > 1)]
    return Photographs(chosen, folder)


def list_images(folder):
    """All image files under `folder`, recursively, sorted by path."""
    return sorted(p for p in Path(folder).rglob("*") if p.suffix.lower() in IMAGE_ENDINGS and p.is_file())


def image_size(path):
    """(height, width) of an image file as it will be decoded. Raises UserError if the file is damaged."""
    from PIL import Image

    from utils import UserError
    try:
        with Image.open(path) as image:
            width, height = image.size
            rotated = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)  # EXIF orientations that swap the sides
            image.load()  # the header alone does not show a truncated file
    except Exception as error:  # decoders raise many types on damaged files
        raise UserError(f"{path}: not a readable image ({error})") from None
    return (width, height) if rotated else (height, width)


# ---- crops ----

def detail(crop):
    """Standard deviation of the brightness of uint8 (3, S, S), in units of the full range [0, 1]."""
    return crop.float().mean(0).std().item() / 255


def fine_detail(crop):
    """Root mean square difference between neighbouring pixels of uint8 (3, S, S), in units of the full range [0, 1]."""
    x = crop.float() / 255
    return (x.diff(dim=1).square().mean() + x.diff(dim=2).square().mean()).sqrt().item()


def random_crops(photos, count, size, generator, min_detail=0.04):
    """(count, 3, size, size) float in [-1, 1]: random photograph, place, area shrinking by 1, 2 or 3, flips, turns."""
    def draw(high):
        return int(torch.randint(high, (), generator=generator))

    crops = []
    for _ in range(count):
        for _attempt in range(20):
            photo = photos[draw(len(photos))]
            largest = min(3, min(photo.shape[1:]) // size)
            factor = (1, 1, 2, 3)[draw(4)]
            side = size * max(1, min(factor, largest))
            top, left = draw(photo.shape[1] - side + 1), draw(photo.shape[2] - side + 1)
            crop = photo[:, top:top + side, left:left + side]
            if detail(crop) >= min_detail:
                break
        crop = F.avg_pool2d(crop.float(), side // size) / 127.5 - 1
        crop = torch.rot90(crop, draw(4), (1, 2))
        crops.append(crop.flip(2) if draw(2) else crop)
    return torch.stack(crops)


def grid_crops(photos, count, size, generator, min_fine_detail=0.03):
    """Up to `count` crops (N, 3, size, size) in [-1, 1] for evaluation: disjoint, unscaled, taken from the photographs
    in turn. Returns (crops, names), a name per crop that tells photograph, top and left."""
    places = []
    for index in range(len(photos)):
        photo, mine = photos[index], []
        for top in range(0, photo.shape[1] - size + 1, size):
            for left in range(0, photo.shape[2] - size + 1, size):
                if fine_detail(photo[:, top:top + size, left:left + size]) >= min_fine_detail:
                    mine.append((index, top, left))
        places.append([mine[i] for i in torch.randperm(len(mine), generator=generator)])
    order = [p[i] for i in range(max(map(len, places))) for p in places if i < len(p)][:count]
    if not order:
        from utils import UserError
        raise UserError("--data: the held-out photographs hold no crop with detail; add photographs")
    crops = torch.stack([photos[i][:, y:y + size, x:x + size] for i, y, x in order]).float() / 127.5 - 1
    return crops, [f"{photos.names[i]}@{y},{x}" for i, y, x in order]


@dataclass
class Config:
    task: Annotated[str, "degradation, a key of data.TASKS"] = "sr"
    data: Annotated[str, "folder of photographs; empty: those inside the packages"] = ""
    out: Annotated[str, "picture to write; empty: runs/data/TASK.png"] = ""
    size: Annotated[int, "side of a crop in pixels"] = 64
    seed: Annotated[int, "seed of the crops"] = 0


def main():
    from utils import generator, parse, write_image
    cfg = parse(Config, description="Shows pairs of a task: lq above hq.")
    degrade, gen = get_task(cfg.task), generator(cfg.seed)
    hq = random_crops(photographs("train", cfg.data, cfg.size), 8, cfg.size, gen)
    rows = torch.cat([torch.cat(list(x), dim=2) for x in (degrade(hq, gen), hq)], dim=1)
    out = cfg.out or f"runs/data/{cfg.task}.png"
    write_image(out, rows)
    print(f"wrote {out}")


if __name__ == "__main__":
    from utils import run_main
    run_main(main)
