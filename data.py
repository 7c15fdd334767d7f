"""Photographs, pairs on disk, crops, and the degradations that make a low-quality image (lq) out of a high-quality one.

A task is a pure, seeded, batched function (lq, severity) = degrade(hq, generator); `TASKS` names them all, each states
its formula and source. hq, lq: (B, 3, H, W) in [-1, 1]; x and y in the formulas are hq and lq in [0, 1].
severity: (B,), drawn uniformly per sample: 0 is the mildest, 1 the worst of the range that the task trains on. A number
behind a name fixes the severity: sr2, sr3, sr4 (= sr) the scale, denoise25 sigma, jpeg10 quality.

Pairs on disk: two folders and a rule for names (--match)
  same             the same path without ending: GoPro (with * for the scene: test/*/blur and test/*/sharp), LOL
  prefix           hq is named as lq up to the first "_": SOTS and OTS, hazy/1400_1.png -> gt/1400.png
  suffix:A,B       lq ends with A, hq with B, in one folder or two: suffix:_LR4,_HR for RealSR, suffix:x4, for DIV2K
  start:A,B        lq starts with A, hq with B; rain is start:rain-,norain- (Rain100)

Chosen here:
 1. Photographs come inside the wheels of scikit-image, matplotlib and pyiqa, so a laptop needs no download. The split
    is by image, never by crop; the two motorcycle views are one scene and stay on one side. Three splits: `train` for
    SFT, judges and RL; `val` to watch and to tune; `test` only for tables: five reference photographs of TID2013
    (Ponomarenko et al. 2015, cut from the Kodak set), which lie in pyiqa's wheel beside three photographs of `val`.
 2. Training crops are shrunk by 1, 2 or 3 with an area filter: more scales, and the JPEG blocks of sources vanish.
    The three of `val` from pyiqa are JPEGs of a megapixel and are shrunk by 2 for the same reason. Pairs are not.
 3. A crop without detail (sky, black border) tells neither the restorer nor the judge anything, so training crops
    whose brightness has a standard deviation under 0.04 are drawn again, and evaluation takes crops whose
    neighbouring pixels differ by 0.03 or more, as 97 % of the training crops do: a smooth crop looks the same at any
    quality. Both are decided on hq alone.
 4. lq always has the size of hq: a smaller lq is enlarged bicubically, and hq loses the rows that lq has no pixel for,
    fewer than the factor, as the SR literature crops it.
 5. lq is rounded to 8 bits as a file would hold it (sr: before it is enlarged). One severity drives a task's strength;
    angles, kernels, colors and depths are drawn independently of it.
 6. Files are decoded in DataLoader workers. A worker draws from a generator that is made of (seed, number of the item)
    and never from a global one, so results depend neither on the number of workers nor on which of them was faster.

    python data.py --task derain                      # laptop: writes runs/data/derain.png, lq above hq
    python data.py --task sr --data ~/DIV2K_train_HR  # the same for a folder of photographs
    python data.py --dataset sots --root ~/SOTS/outdoor   # pairs on disk: counts them, names what has no partner
    python data.py bench --workers 2                  # images per second that the workers decode
"""

import functools
import math
import re
import time
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


def uniform(generator, low, high, *shape):
    """Uniform numbers in [low, high] of `shape`, drawn on the CPU: the same on every device."""
    return low + (high - low) * torch.rand(shape, generator=generator)


def per_image(values, images):
    """(B,) -> (B, 1, 1, 1) on the device of the images."""
    return values.view(-1, 1, 1, 1).to(images.device)


def as_lq(unit, severity):
    """[0, 1] -> the return value of a task: 8-bit lq in [-1, 1] and severity (B,), on one device."""
    return round_8bit(unit * 2 - 1), severity.to(unit.device)


def filter2d(images, kernels):
    """Each image with its own kernel, reflected at the border; (B, C, H, W) and (B, K, K), K odd -> (B, C, H, W)."""
    count, channels, height, width = images.shape
    reach = kernels.shape[-1] // 2
    x = F.pad(images, (reach,) * 4, mode="reflect" if reach < min(height, width) else "replicate")
    weight = kernels.to(images).repeat_interleave(channels, 0)[:, None]  # (B C, 1, K, K)
    return F.conv2d(x.flatten(0, 1)[None], weight, groups=count * channels).view_as(images)


def gaussian_kernels(along, across, angle, side):
    """exp(-(u / along)^2 / 2 - (v / across)^2 / 2), axes turned by `angle`, sum 1; all (B,) -> (B, side, side)."""
    grid = torch.arange(side) - side // 2.0
    y, x = (g[None] for g in torch.meshgrid(grid, grid, indexing="ij"))
    cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
    along, across = along[:, None, None], across[:, None, None]
    kernels = torch.exp(-((x * cos + y * sin) / along) ** 2 / 2 - ((y * cos - x * sin) / across) ** 2 / 2)
    return kernels / kernels.sum((1, 2), keepdim=True)


def motion_kernels(length, generator, side, points=48):
    """Blur of a camera that wanders `length` (B,) pixels at constant speed, turning -> (B, side, side), sum 1.

    A path of `points` steps, drawn with bilinear weights around its own centre: the random trajectories of Boracchi and
    Foi 2012 and of DeblurGAN (Kupyn et al. 2018, arXiv 1711.07064), here without their sudden shakes.
    """
    count = len(length)
    bend = uniform(generator, 0, 0.25, count, 1)  # radians per step
    angle = uniform(generator, 0, 2 * math.pi, count, 1) + (
        bend * torch.randn(count, points, generator=generator)).cumsum(1)
    path = torch.stack([angle.sin(), angle.cos()]).cumsum(2) * length[:, None] / points  # (2, B, points): y, x
    path = path - (path.amax(2, keepdim=True) + path.amin(2, keepdim=True)) / 2
    grid = torch.arange(side) - side // 2.0
    y, x = (1 - (path[..., None] - grid).abs()).clamp(min=0)  # (B, points, side) each
    kernels = torch.einsum("bpy,bpx->byx", y, x)
    return kernels / kernels.sum((1, 2), keepdim=True)


def degrade_sr(hq, generator=None, scale=4):
    """Bicubic down by `scale` with antialias, 8 bit, bicubic up; severity (scale - 1) / 3. Uses no randomness.

    y = up(round_8bit(down(x))), the usual "bicubic" setting of super-resolution (DIV2K track 1, Agustsson and Timofte
    2017), brought back to the size of hq. Other sizes than multiples of `scale` are padded by reflection and cut again.
    """
    height, width = hq.shape[-2:]
    x = F.pad(hq, (0, -width % scale, 0, -height % scale), mode="reflect")
    small = round_8bit(resize(x, (x.shape[-2] // scale, x.shape[-1] // scale)))
    lq = resize(small, x.shape[-2:]).clamp(-1, 1)[..., :height, :width]
    return lq, torch.full((len(hq),), (scale - 1) / 3, device=hq.device)


def degrade_denoise(hq, generator=None, sigma=None):
    """Additive white Gaussian noise: y = x + sigma / 255 n, n ~ N(0, 1) (Zhang et al. 2017, DnCNN, arXiv 1608.03981).

    sigma = 5 + 70 severity, up to the 75 of FFDNet (Zhang et al. 2018, arXiv 1710.04026).
    """
    severity = uniform(generator, 0, 1, len(hq)) if sigma is None else torch.full((len(hq),), (sigma - 5) / 70)
    noise = torch.randn(hq.shape, generator=generator).to(hq.device)
    return as_lq((hq + 1) / 2 + per_image((5 + 70 * severity) / 255, hq) * noise, severity)


def degrade_deblur(hq, generator=None):
    """Blur y = k * x; half of the kernels are Gaussian with two sigmas and an angle, half are of camera motion.

    Gaussian: the larger sigma is 0.6 + 2.4 severity pixels, the smaller one 0.4 to 1 of it (the anisotropic kernels of
    Zhang et al. 2018, SRMD, arXiv 1712.06116). Motion: a path of 3 + 17 severity pixels, see motion_kernels.
    """
    count = len(hq)
    severity = uniform(generator, 0, 1, count)
    sigma, ratio, angle = 0.6 + 2.4 * severity, uniform(generator, 0.4, 1, count), uniform(
        generator, 0, math.pi, count)
    still, moved = gaussian_kernels(sigma, sigma * ratio, angle, 25), motion_kernels(3 + 17 * severity, generator, 25)
    is_motion = uniform(generator, 0, 1, count) < 0.5
    return as_lq((filter2d(hq, torch.where(is_motion[:, None, None], moved, still)) + 1) / 2, severity)


def degrade_jpeg(hq, generator=None, quality=None):
    """Baseline JPEG with 4:2:0 chroma, by PIL in memory; quality = round(60 - 50 severity), 10 to 60.

    The range around that of ARCNN (Dong et al. 2015, arXiv 1504.06993); severity is that of the whole quality used.
    """
    from reward import jpeg
    if quality is None:
        quality = (60 - 50 * uniform(generator, 0, 1, len(hq))).round()
    else:
        quality = torch.full((len(hq),), float(quality))
    images = torch.stack([jpeg(image, q) for image, q in zip(hq.cpu(), quality.tolist())])
    return images.to(hq.device), ((60 - quality) / 50).to(hq.device)


def degrade_derain(hq, generator=None):
    """Bright streaks on top of the image: y = x + b min(1, sum_i S_i) (Yang et al. 2017, arXiv 1609.07769).

    Layers i = 1 to 1 + round(4 severity), each with an angle of its own: from one layer, as in Rain100L, to five, as
    in Rain100H. S_i: single bright pixels with probability 0.001 + 0.004 severity (the density), each smeared to a
    streak of 12 to 28 pixels (4 sigma of a Gaussian), 0.4 to 0.8 pixels thick (sigma), up to 35 degrees from the
    vertical, all alike within a layer. b = 0.25 + 0.5 severity, the same for the three colors.
    """
    count, _, height, width = hq.shape
    severity, rain = uniform(generator, 0, 1, count), 0.0
    density, bright = per_image(0.001 + 0.004 * severity, hq), per_image(0.25 + 0.5 * severity, hq)
    for layer in range(5):
        along, across = uniform(generator, 3, 7, count), uniform(generator, 0.4, 0.8, count)
        angle = math.pi / 2 + uniform(generator, -0.61, 0.61, count)
        drops, each = torch.rand(2, count, 1, height, width, generator=generator).to(hq.device)
        falls = (drops < density) & per_image(layer <= (4 * severity).round(), hq)
        streak = gaussian_kernels(along, across, angle, 31)
        rain = rain + filter2d(falls * (0.5 + 0.5 * each), streak / streak.amax((1, 2), keepdim=True))
    return as_lq((hq + 1) / 2 + bright * rain.clamp(max=1), severity)


def degrade_dehaze(hq, generator=None):
    """Atmospheric scattering: y = x t + A (1 - t), t = exp(-beta d) (Koschmieder 1924; Narasimhan and Nayar 2002).

    beta = 0.5 + 2 severity, A in [0.7, 1] and grey, as in RESIDE (Li et al. 2019, arXiv 1712.04143). The depth d is
    smooth: 4 x 4 random values, farther towards the top, enlarged bicubically and stretched to [0.2, 1].
    """
    count, _, height, width = hq.shape
    severity = uniform(generator, 0, 1, count)
    light = uniform(generator, 0.7, 1, count)
    coarse = uniform(generator, 0, 1, count, 1, 4, 4) + torch.linspace(1, 0, 4).view(4, 1)
    depth = F.interpolate(coarse, (height, width), mode="bicubic", align_corners=False)
    low, high = depth.amin((2, 3), keepdim=True), depth.amax((2, 3), keepdim=True)
    depth = (0.2 + 0.8 * (depth - low) / (high - low)).to(hq.device)
    passed = torch.exp(-per_image(0.5 + 2 * severity, hq) * depth)
    return as_lq((hq + 1) / 2 * passed + per_image(light, hq) * (1 - passed), severity)


def degrade_lowlight(hq, generator=None):
    """A dark, noisy exposure: z = g x^gamma, y = z + sqrt(k z + r^2) n, n ~ N(0, 1).

    gamma = 1.5 + 2 severity and gain g in [0.6, 0.9] as LLNet and MBLLEN darken (Lore et al. 2017, arXiv 1511.03995; Lv
    et al. 2018); shot noise k = 0.0005 + 0.0025 severity and read noise r = 0.002 + 0.01 severity as in the Poisson-
    Gaussian model of Foi et al. 2008.
    """
    severity = uniform(generator, 0, 1, len(hq))
    gain = per_image(uniform(generator, 0.6, 0.9, len(hq)), hq)
    s = per_image(severity, hq)
    dark = gain * ((hq + 1) / 2).clamp(0, 1) ** (1.5 + 2 * s)
    noise = torch.randn(hq.shape, generator=generator).to(hq.device)
    return as_lq(dark + ((0.0005 + 0.0025 * s) * dark + (0.002 + 0.01 * s) ** 2).sqrt() * noise, severity)


def real_round(x, severity, generator, sigma, side, shrink, noise):
    """Blur, resize, noise and JPEG, once: (1, 3, h, w) in [-1, 1] -> another size. The other arguments are the worst
    sigma of the blur in pixels, side of its kernel, factor of shrinking, and sigma of the noise in 1/255; see
    degrade_real."""
    from reward import jpeg
    u = torch.rand(9, generator=generator)
    along = 0.2 + sigma * severity * u[0:1]
    x = filter2d(x, gaussian_kernels(along, along * (0.4 + 0.6 * u[1]), math.pi * u[2:3], side))
    factor = 1.2 * (1 / (1 + (shrink - 1) * severity) / 1.2) ** u[3].item()  # from 1.2 down, evenly in log
    size = [max(8, round(side * factor)) for side in x.shape[-2:]]
    mode = ("area", "bilinear", "bicubic")[int(3 * u[4])]
    x = F.interpolate(x, size, mode="area") if mode == "area" else resize(x, size, mode)
    std = 2 / 255 * (1 + noise * severity * u[5])
    std = std * ((x.clamp(-1, 1) + 1) / 2).sqrt() if u[6] < 0.5 else std  # shot noise grows with the light
    grain = torch.randn(1, 1 if u[7] < 0.4 else 3, *size, generator=generator)
    return jpeg((x + std * grain)[0].clamp(-1, 1), round(95 - 65 * severity * u[8].item()))[None]


def degrade_real(hq, generator=None):
    """Unknown real-world damage: blur, resize, noise and JPEG, all of it twice, then bicubic back to the size of hq.

    The second-order chain of Real-ESRGAN (Wang et al. 2021, arXiv 2107.10833, sec. 3), without their sinc filters.
    Blur: anisotropic Gaussian, the larger sigma up to 0.2 + 2.8 severity, then 0.2 + 1.3 severity. Resize: by 1.2 down
    to 1 / (1 + 2 severity), then 1 / (1 + severity); area, bilinear or bicubic. Noise: white or shot noise in equal
    parts, 40 % grey, sigma up to (1 + 29 severity) / 255, then (1 + 24 severity) / 255. JPEG quality 95 down to
    95 - 65 severity. Each strength is uniform (resize: in log) up to these bounds. One image at a time: sizes differ.
    """
    severity, images = uniform(generator, 0, 1, len(hq)), []
    for s, image in zip(severity.tolist(), hq.cpu().split(1)):
        x = real_round(image, s, generator, sigma=2.8, side=21, shrink=3, noise=29)
        x = real_round(x, s, generator, sigma=1.3, side=11, shrink=2, noise=24)
        images.append(resize(x, hq.shape[-2:]))
    return as_lq((torch.cat(images).to(hq.device) + 1) / 2, severity)


def degrade_mixed(hq, generator=None, names=()):
    """One of the tasks called `names` for each image, all equally likely; none given: any other (sr: scale 2, 3 or 4).
    Severities compare only within a task."""
    every, results = names or [name for name in TASKS if name != "mixed"], []
    for image in hq.split(1):
        name = every[int(torch.randint(len(every), (), generator=generator))]
        if name == "sr" and not names:
            name += str(int(torch.randint(2, 5, (), generator=generator)))
        results.append(get_task(name)(image, generator))
    lq, severity = zip(*results)
    return torch.cat(lq), torch.cat(severity)


TASKS = {"sr": degrade_sr, "denoise": degrade_denoise, "deblur": degrade_deblur, "jpeg": degrade_jpeg,
         "derain": degrade_derain, "dehaze": degrade_dehaze, "lowlight": degrade_lowlight, "real": degrade_real,
         "mixed": degrade_mixed}
NUMBERED = {"sr": ("scale", 2, 8), "denoise": ("sigma", 1, 255), "jpeg": ("quality", 1, 95)}


def split_task(name):
    """"denoise25" -> ("denoise", {"sigma": 25}), "derain" -> ("derain", {}), "sr2+jpeg" -> ("mixed", {"names": ["sr2",
    "jpeg"]}). Raises UserError for an unknown task."""
    from utils import UserError
    if "+" in name:
        for part in name.split("+"):
            split_task(part)
        return "mixed", {"names": name.split("+")}
    base, number = re.fullmatch(r"(.*?)(\d*)", name, re.DOTALL).groups()
    if base not in TASKS or (number and base not in NUMBERED):
        raise UserError(f"--task {name}: unknown; choose one of {', '.join(TASKS)}, or sr2, sr3, denoise25, jpeg10 and "
                        "the like")
    if not number:
        return base, {}
    option, low, high = NUMBERED[base]
    if not low <= int(number) <= high:
        raise UserError(f"--task {name}: {option} must be from {low} to {high}")
    return base, {option: int(number)}


def get_task(name):
    """The degradation called `name`, degrade(hq, generator) -> (lq, severity). Raises UserError for an unknown one."""
    base, options = split_task(name)
    return functools.partial(TASKS[base], **options) if options else TASKS[base]


# ---- photographs ----

class Photographs:
    """A list of (name, path), decoded on demand into uint8 (3, H, W); the most recent ones stay in memory.

    shrink: area downscaling of each photograph by this integer factor, a list, or None for none at all."""

    def __init__(self, paths, root, cache=64, shrink=None):
        self.paths, self.names = list(paths), [str(Path(p).relative_to(root)) for p in paths]
        self.shrink, self.cache = shrink or [1] * len(self.paths), cache
        self.decode = functools.lru_cache(cache)(self._decode)

    def __getstate__(self):  # a worker process starts with an empty cache of its own
        return {key: value for key, value in vars(self).items() if key != "decode"}

    def __setstate__(self, state):
        vars(self).update(state)
        self.decode = functools.lru_cache(self.cache)(self._decode)

    def _decode(self, index):
        from utils import read_uint8, to_uint8
        image, shrink = read_uint8(self.paths[index]), self.shrink[index]  # (3, H, W)
        return to_uint8(F.avg_pool2d(image / 127.5 - 1, shrink)) if shrink > 1 else image

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
    return Photographs(take_split(readable, split), folder)


def take_split(items, split, held_out=("test", "val")):
    """The part of a list that belongs to `split`: of every tenth item (third to ninth in lists under 20) the first is
    test, the second val, the others train. held_out: the splits taken out of this list."""
    every = max(3, min(10, len(items) // 2))
    place = {name: i for i, name in enumerate(held_out)}
    return [x for i, x in enumerate(items)
            if (i % every == place[split] if split in place else i % every >= len(held_out))]


def list_images(folder):
    """All image files under `folder`, recursively, sorted by path."""
    return sorted(p for p in Path(folder).rglob("*") if p.suffix.lower() in IMAGE_ENDINGS and p.is_file())


def image_size(path, whole=True):
    """(height, width) of an image file as it will be decoded. Raises UserError if the file is damaged.

    whole: False reads the header only, which is fast and finds no damage behind it."""
    from PIL import Image

    from utils import UserError
    try:
        with Image.open(path) as image:
            width, height = image.size
            rotated = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)  # EXIF orientations that swap the sides
            if whole:
                image.load()  # the header alone does not show a truncated file
    except Exception as error:  # decoders raise many types on damaged files
        raise UserError(f"{path}: not a readable image ({error})") from None
    return (width, height) if rotated else (height, width)


# ---- pairs on disk ----

# dataset -> (task, names of its train and test folder, layouts under --root; the first with pairs is taken).
# A layout is "lq hq match"; {} stands for the name of the split, without it the layout is test only; lq "-": degraded
# by the task.
DATASETS = {
    "div2k": ("sr", ("train", "valid"), ("DIV2K_{}_LR_bicubic/X4 DIV2K_{}_HR suffix:x4,",)),
    "realsr": ("sr", ("Train", "Test"), ("*/{}/4 */{}/4 suffix:_LR4,_HR", ". . suffix:_LR4,_HR")),
    "drealsr": ("sr", ("train", "test"), ("{}_LR {}_HR same", "{}_LR {}_HR suffix:_x4,_x1")),
    "rain100l": ("derain", ("train", "test"), (
        "{}/rainy {}/gt rain", "{}/input {}/target same", "rainy gt rain", "input target same")),
    "sots": ("dehaze", ("train", "test"), ("hazy gt prefix",)),
    "gopro": ("deblur", ("train", "test"), (
        "{}/*/blur {}/*/sharp same", "{}/input {}/target same", "input target same")),
    "lol": ("lowlight", ("our485", "eval15"), ("{}/low {}/high same",)),
    "lolv2": ("lowlight", ("Train", "Test"), ("{}/Low {}/Normal same", "{}/Low {}/Normal start:low,normal")),
    "cbsd68": ("denoise25", ("train", "test"), ("- . same",)),
    "live1": ("jpeg10", ("train", "test"), ("- . same",)),
}
DATASETS["rain100h"] = DATASETS["rain100l"]
HQ_BORDER = {"sots": 10}  # pixels that hq may have more at each side: SOTS indoor has 640 x 480 for hazy 620 x 460


def name_rule(match):
    """--match -> (lq_key, hq_key): functions of a path without ending that return what the two names share, or None
    where a name does not fit the rule."""
    def cut(start="", end=""):
        def key(name):
            folder, slash, stem = name.rpartition("/")
            fits = stem.startswith(start) and stem.endswith(end) and len(stem) >= len(start) + len(end)
            return folder + slash + stem[len(start):len(stem) - len(end)] if fits else None
        return key

    kind, _, rest = {"rain": "start:rain-,norain-"}.get(match, match).partition(":")
    if kind == "same" and not rest:
        return cut(), cut()
    if kind == "prefix" and not rest:
        return lambda name: re.sub(r"_[^/]*$", "", name), cut()
    if kind in ("start", "suffix") and rest.count(",") == 1 and rest != ",":
        return tuple(cut(**{"start" if kind == "start" else "end": part}) for part in rest.split(","))
    from utils import UserError
    raise UserError(f"--match {match}: expected same, prefix, rain, suffix:LQ,HQ or start:LQ,HQ, "
                    "for example suffix:_LR4,_HR")


def named_images(folder, flag):
    """[(name, path)] of the images under `folder`; a name is the path from there without its ending.

    A * in `folder` stands for any one folder, whose name then begins the names: GoPro/test/*/blur.
    """
    from utils import UserError
    parts = Path(folder).parts
    fixed = next((i for i, part in enumerate(parts) if "*" in part), len(parts))
    base, pattern = Path(*parts[:fixed]), "/".join(parts[fixed:])
    homes = sorted(p for p in base.glob(pattern) if p.is_dir()) if pattern else [base] if base.is_dir() else []
    if not homes:
        raise UserError(f"--{flag} {folder}: no such folder")
    stars = [i for i, part in enumerate(parts) if "*" in part]
    return [("/".join([*(home.parts[i] for i in stars), *path.relative_to(home).with_suffix("").parts]), path)
            for home in homes for path in list_images(home)]


def match_pairs(lq, hq, match):
    """Folders and a rule -> (list of (lq path, hq path), list of paths without a partner); several lq may share one hq.

    Raises UserError for a missing folder, for two files that would be the hq of one lq, and if nothing matches.
    """
    from utils import UserError
    lq_key, hq_key = name_rule(match)
    if match == "same" and Path(lq).resolve() == Path(hq).resolve():
        raise UserError(f"--lq {lq}: the same folder as --hq; tell the files apart with --match suffix:LQ,HQ")
    sources, targets, by_key = named_images(lq, "lq"), named_images(hq, "hq"), {}
    for name, path in targets:
        key = hq_key(name)
        if key is not None and key in by_key:
            raise UserError(f"{by_key[key]} and {path}: both would be the hq of one lq; rename or remove one")
        by_key[key] = path
    by_key.pop(None, None)
    pairs = [(path, by_key[key]) for name, path in sources if (key := lq_key(name)) in by_key]
    used = {path for pair in pairs for path in pair}
    unmatched = sorted({path for _, path in sources + targets} - used)
    if not pairs:
        shown = f"{len(unmatched)} files: " + ", ".join(map(str, unmatched[:4])) if unmatched else "no images"
        raise UserError(f"--lq {lq}, --hq {hq}: no lq has its hq by --match {match} ({shown})")
    return pairs, unmatched


def without_border(height, width, h, w, border):
    """(border, height, width) of the part of hq (height, width) that belongs to lq (h, w): hq without `border` pixels
    at each side if just these are more than lq has, else all of it and 0."""
    return (border, h, w) if (height - h, width - w) == (2 * border, 2 * border) else (0, height, width)


def pair_factor(lq, hq, border=0):
    """How much smaller lq is than hq, from their headers: an integer, 1 for equal sizes. hq may have fewer than
    `factor` rows or columns more, or `border` pixels at each side. Raises UserError that names both files."""
    (h, w), (height, width) = image_size(lq, whole=False), image_size(hq, whole=False)
    _, height, width = without_border(height, width, h, w, border)
    factor = height // h
    if factor < 1 or not (0 <= height - factor * h < factor and 0 <= width - factor * w < factor):
        from utils import UserError
        raise UserError(f"{lq} ({w} x {h}) and {hq} ({width} x {height}): sizes do not fit; lq must be as large as hq "
                        "or smaller by an integer factor")
    return factor


class Pairs(Photographs):
    """Pairs of files, decoded on demand into uint8 (lq (3, h, w), hq (3, f h, f w)); factor[i] is f.

    files: list of (lq path, hq path). border: see pair_factor. Reads the headers of all files; raises UserError where
    two sizes do not fit."""

    def __init__(self, files, cache=8, border=0):
        super().__init__([hq for _, hq in files], Path(files[0][1]).anchor, cache)
        self.lq_paths = [lq for lq, _ in files]
        self.names = [str(lq) for lq in self.lq_paths]
        self.factor, self.border = [pair_factor(lq, hq, border) for lq, hq in files], border

    def _decode(self, index):
        from utils import read_uint8
        lq, hq = read_uint8(self.lq_paths[index]), read_uint8(self.paths[index])
        start, *_ = without_border(*hq.shape[1:], *lq.shape[1:], self.border)
        height, width = (side * self.factor[index] for side in lq.shape[1:])
        return lq, hq[:, start:start + height, start:start + width]


def load_pairs(split="all", lq="", hq="", match="same", dataset="", root=".", shown=5):
    """Pairs of a split (all, train, val, test) from two folders, or from `dataset`, a key of DATASETS, under `root`.

    Two folders are split by hq file as `photographs` splits; a dataset has folders for train, of which every tenth hq
    is val, and for test (`all` is test). Prints the first `shown` files without partner. Without lq (a dataset of
    clean images): Photographs, to be degraded by its task.
    """
    from utils import UserError
    held_out, too_few = ("test", "val"), f"too few images to have a {split} split; training, validation and test need 3"
    if dataset:
        if lq or hq:
            raise UserError(f"--dataset {dataset}: knows its folders; leave --lq and --hq out, or --dataset")
        held_out = ("val",)
        if dataset not in DATASETS:
            raise UserError(f"--dataset {dataset}: unknown; choose one of {', '.join(sorted(DATASETS))}")
        lq, hq, match = dataset_layout(dataset, root, split in ("train", "val"))
        split = "all" if split == "test" else split
    elif not hq:
        raise UserError("--lq: needs --hq, the folder of the ground truth")
    if not lq:
        paths = [path for _, path in named_images(hq, "hq")]
        if not paths:
            raise UserError(f"--hq {hq}: no images there")
        paths = take_split(paths, split) if split != "all" else paths
        if not paths:
            raise UserError(f"--hq {hq}: {too_few}")
        return Photographs(paths, Path(hq).anchor)
    files, unmatched = match_pairs(lq, hq, match)
    if unmatched and shown:
        print(f"{len(files)} pairs; {len(unmatched)} files without a partner: " + ", ".join(map(str, unmatched[:shown]))
              + (f" and {len(unmatched) - shown} more (python data.py lists all)" if len(unmatched) > shown else ""))
    if split != "all":
        chosen = set(take_split(list(dict.fromkeys(hq for _, hq in files)), split, held_out))
        files = [(lq, hq) for lq, hq in files if hq in chosen]
    if not files:
        raise UserError(f"--hq {hq}: {too_few}")
    return Pairs(files, border=HQ_BORDER.get(dataset, 0))


def chosen_task(task, dataset):
    """The task that is asked for, else that of the dataset, else sr."""
    return task or (DATASETS[dataset][0] if dataset else "sr")


def open_split(cfg, split):
    """What the flags of a script ask for: Pairs or clean Photographs from --lq, --hq and --dataset, else Photographs of
    --data or the shipped ones. An empty cfg.task becomes that of the dataset, or sr. What has no partner is printed for
    `train` only."""
    if not (cfg.lq or cfg.hq or cfg.dataset):
        source = photographs(split, cfg.data, cfg.size)
    else:
        source = load_pairs(split, cfg.lq, cfg.hq, cfg.match, cfg.dataset, cfg.root, 5 * (split == "train"))
    cfg.task = chosen_task(cfg.task, cfg.dataset)
    return source


def dataset_layout(dataset, root, train):
    """(lq, hq, match) of the first layout of `dataset` that has pairs under `root`; lq "" for clean images only.

    train: of the folders for training, else of those for testing. Raises UserError that lists what was looked for.
    """
    from utils import UserError
    _, splits, layouts = DATASETS[dataset]
    layouts = [layout.replace("{}", splits[not train]).split() for layout in layouts if "{}" in layout or not train]
    for lq, hq, match in layouts:
        lq, hq = lq if lq == "-" else str(Path(root) / lq), str(Path(root) / hq)
        try:
            if lq != "-":
                match_pairs(lq, hq, match)
            elif not named_images(hq, "hq"):
                continue
            return "" if lq == "-" else lq, hq, match
        except UserError:
            continue
    looked = ", or ".join(f"{lq} with {hq} ({match})" if lq != "-" else "images" for lq, hq, match in layouts)
    raise UserError(f"--dataset {dataset} --root {root}: nothing found; looked for {looked or 'no training folder'}; "
                    "or give --lq, --hq and --match")


def enlarge(lq, factor):
    """(B, 3, h, w) in [-1, 1] -> (B, 3, f h, f w), bicubic; factor 1 changes nothing."""
    return lq if factor == 1 else resize(lq, [side * factor for side in lq.shape[-2:]]).clamp(-1, 1)


def whole_image(source, degrade, index):
    """Image `index` of Pairs (degrade None), or of Photographs with a task, as (lq, hq), (1, 3, H, W) each in [-1, 1].

    The degradation has a generator of its own, made of `index`."""
    from utils import generator
    if degrade is None:
        lq, hq = (x[None].float() / 127.5 - 1 for x in source[index])
        return enlarge(lq, source.factor[index]), hq
    hq = source[index][None].float() / 127.5 - 1
    return degrade(hq, generator(0, 4, index))[0], hq


# ---- workers ----

class _Calls(torch.utils.data.Dataset):
    """Item i is make(i). An error that names a file travels back as a value, which keeps it one line long."""

    def __init__(self, make):
        self.make = make

    def __getitem__(self, index):
        from utils import UserError
        try:
            return self.make(index)
        except UserError as error:
            return error


def stream(make, items, workers=0):
    """Yields make(i) for each i of `items`, in order, computed ahead by `workers` processes (0: in this one).

    make: a picklable function whose randomness comes from i alone: the number of workers then changes nothing."""
    loader = torch.utils.data.DataLoader(_Calls(make), batch_size=None, sampler=items, num_workers=workers,
                                         generator=torch.Generator())  # else the global one would advance
    for result in loader:
        if isinstance(result, Exception):
            raise result
        yield result


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
            if min(photo.shape[1:]) < size:
                from utils import UserError
                raise UserError(f"--size {size}: a photograph is only {photo.shape[2]} x {photo.shape[1]}; lower "
                                "it or use larger ones (--data DIR)")
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


def recolor(images, generator, tone=1.0, shift=0.0):
    """Random gamma, contrast, order and strength of colors, one draw per image and the same for each of `images`, a
    list of (B, 3, H, W) in [-1, 1]: eleven photographs show few colors, and quality is not a matter of color.

    tone: how far gamma and contrast stray, 0: not at all; a judge that sees them change at random has no reason to take
    haze or darkness for damage. shift: share of the room that the first of `images` leaves to white (or to black) by
    which the brightness moves at most; the others may clip."""
    count = len(images[0])
    gamma, contrast, color = (torch.rand(3, count, 1, 1, 1, generator=generator) * torch.tensor(
        [0.8, 0.5, 1.4]).view(3, 1, 1, 1, 1) + torch.tensor([0.7, 0.6, -0.2]).view(3, 1, 1, 1, 1)).unbind()
    gamma, contrast = torch.lerp(torch.ones(2, *gamma.shape), torch.stack([gamma, contrast]), tone)
    order = torch.rand(count, 3, generator=generator).argsort(1)[:, :, None, None].expand_as(images[0])
    result = []
    for x in images:
        x = (((x + 1) / 2) ** gamma * contrast * 2 - contrast).gather(1, order)  # channels in another order
        result.append(torch.lerp(x.mean(1, keepdim=True), x, color.clamp(0, 1)).clamp(-1, 1))
    if shift:
        move = shift * uniform(generator, -1, 1, count, 1, 1, 1)
        low, high = (extreme(result[0], (1, 2, 3), keepdim=True) for extreme in (torch.amin, torch.amax))
        room = torch.where(move > 0, 1 - high, low + 1)
        result = [(x + move * room).clamp(-1, 1) for x in result]
    return result


def clean_crops(photos, count, size, generator, recolored=0.0):
    """random_crops, a share `recolored` of them in other colors and at another brightness: a restorer that has seen few
    bright scenes darkens them."""
    hq = random_crops(photos, count, size, generator)
    if not recolored:
        return hq
    chosen = torch.rand(count, 1, 1, 1, generator=generator) < recolored
    return torch.where(chosen, recolor([hq], generator, shift=1.0)[0], hq)


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
        raise UserError(f"--size {size}: the held-out photographs hold no such crop with detail; lower it or add "
                        "photographs (--data)")
    crops = torch.stack([photos[i][:, y:y + size, x:x + size] for i, y, x in order]).float() / 127.5 - 1
    return crops, [f"{photos.names[i]}@{y},{x}" for i, y, x in order]


def aligned_crop(lq, hq, factor, top, left, size):
    """One place of uint8 lq (3, h, w) and hq (3, f h, f w) -> (lq, hq), (3, size, size) in [-1, 1].

    lq is cut out with a margin of 4 pixels, more than the bicubic kernel reaches, and enlarged: the same pixels as a
    crop of the enlarged image."""
    y, x = max(0, top // factor - 4), max(0, left // factor - 4)
    part = lq[:, y:(top + size - 1) // factor + 5, x:(left + size - 1) // factor + 5].float() / 127.5 - 1
    y, x = top - y * factor, left - x * factor
    return (enlarge(part[None], factor)[0, :, y:y + size, x:x + size],
            hq[:, top:top + size, left:left + size].float() / 127.5 - 1)


def crops_of_one_pair(pairs, size, count, min_detail, seed):
    """`count` aligned crops of one random pair, all random numbers from `seed`: (lq, hq), (count, 3, size, size)."""
    from utils import UserError, generator
    gen = generator(seed)

    def draw(high):
        return int(torch.randint(high, (), generator=gen))

    index = draw(len(pairs))
    lq, hq = pairs[index]
    if min(hq.shape[1:]) < size:
        raise UserError(f"{pairs.paths[index]}: {hq.shape[2]} x {hq.shape[1]} is smaller than a crop of {size}; "
                        "lower --size or remove it")
    crops = []
    for _ in range(count):
        for _attempt in range(20):
            top, left = draw(hq.shape[1] - size + 1), draw(hq.shape[2] - size + 1)
            if detail(hq[:, top:top + size, left:left + size]) >= min_detail:
                break
        turn, mirror = draw(4), draw(2)
        pair = (torch.rot90(x, turn, (1, 2)) for x in aligned_crop(lq, hq, pairs.factor[index], top, left, size))
        crops.append([x.flip(2) if mirror else x for x in pair])
    return tuple(torch.stack(x) for x in zip(*crops))


def pair_crops(pairs, count, size, generator, per_pair=1, workers=0, min_detail=0.04):
    """Random aligned crops (lq, hq), (count, 3, size, size) in [-1, 1], turned and flipped alike, lq enlarged.

    per_pair: crops taken of each decoded pair; decoding costs far more than cropping. workers: processes that decode.
    """
    seeds = torch.randint(2 ** 31, (-(-count // per_pair),), generator=generator).tolist()
    make = functools.partial(crops_of_one_pair, pairs, size, per_pair, min_detail)
    lq, hq = zip(*stream(make, seeds, workers))
    return torch.cat(lq)[:count], torch.cat(hq)[:count]


def training_batch(source, degrade, count, size, seed, per_pair, recolored, step):
    """Batch number `step` of a training, (lq, hq): pair_crops of Pairs (degrade None), or degraded clean_crops.

    For `stream`, with all arguments but step bound: batches are made ahead in workers, and a training that is resumed
    at a step goes on with the same ones."""
    from utils import generator
    gen = generator(seed, 6, step)
    if degrade is None:
        return pair_crops(source, count, size, gen, per_pair)
    hq = clean_crops(source, count, size, gen, recolored)
    return degrade(hq, gen)[0], hq


@dataclass
class BenchConfig:
    data: Annotated[str, "folder of images to decode; empty: a 2040 x 1404 PNG and JPEG made for it"] = ""
    count: Annotated[int, "decodings per measurement, more than 3 per worker"] = 40
    workers: Annotated[int, "DataLoader workers, at least 1"] = 1


def timed(photos, index):
    """(photos[index], seconds of CPU that it took)."""
    start = time.process_time()
    return photos[index], time.process_time() - start


def bench(cfg):
    """Prints how many images per second a worker decodes into uint8 (3, H, W), by Photographs and `stream`, and the CPU
    time of a decoding, which other jobs on the machine change less."""
    import tempfile

    from PIL import Image

    from utils import UserError, generator, write_image
    if cfg.workers < 1 or cfg.count <= 3 * cfg.workers:
        raise UserError(f"--workers {cfg.workers} --count {cfg.count}: at least 1 worker, over 3 images for each")
    with tempfile.TemporaryDirectory() as made:
        folders = {"images": cfg.data}
        if not cfg.data:
            hq = grid_crops(photographs("train"), 1, 256, generator(0))[0]
            hq = resize(hq, (1404, 2040)) + 4 / 255 * torch.randn(1, 3, 1404, 2040, generator=generator(1))
            folders = {"png": f"{made}/png", "jpeg": f"{made}/jpeg"}
            write_image(f"{made}/png/0.png", hq[0])
            Path(f"{made}/jpeg").mkdir()
            Image.open(f"{made}/png/0.png").save(f"{made}/jpeg/0.jpg", quality=95)
        for name, folder in folders.items():
            photos = Photographs(list_images(folder), folder, cache=0)
            if not len(photos):
                raise UserError(f"--data {folder}: no images there")
            items = [i % len(photos) for i in range(cfg.count)]
            size = sum(p.stat().st_size for p in photos.paths) / len(photos) / 1e6
            stamps, busy = [], 0.0
            for _, seconds in stream(functools.partial(timed, photos), items, cfg.workers):
                stamps.append(time.perf_counter())
                busy += seconds / cfg.count
            first = 3 * cfg.workers  # the start of the workers and what they had made ahead meanwhile do not count
            speed = (len(stamps) - first) / (stamps[-1] - stamps[first - 1]) / max(1, cfg.workers)
            print(f"{name:6s} {size:.1f} MB each: {speed:.1f} images per second and worker (workers: {cfg.workers}), "
                  f"{busy:.3f} s of CPU each")


@dataclass
class Config:
    task: Annotated[str, "key of data.TASKS; sr3, denoise25, jpeg10 fix its severity; empty: of --dataset, or sr"] = ""
    data: Annotated[str, "folder of photographs; empty: those inside the packages"] = ""
    lq: Annotated[str, "folder of low-quality images, with --hq: pairs instead of a task"] = ""
    hq: Annotated[str, "folder of their ground truth"] = ""
    match: Annotated[str, "same, prefix, rain, suffix:LQ,HQ or start:LQ,HQ: how names of lq and hq belong"] = "same"
    dataset: Annotated[str, "a key of data.DATASETS, instead of --lq, --hq and --match"] = ""
    root: Annotated[str, "folder of --dataset"] = "."
    out: Annotated[str, "picture to write; empty: runs/data/TASK.png"] = ""
    size: Annotated[int, "side of a crop in pixels"] = 64
    seed: Annotated[int, "seed of the crops"] = 0


def main():
    import sys

    from utils import UserError, generator, parse, write_image
    if sys.argv[1:2] == ["bench"]:
        return bench(parse(BenchConfig, sys.argv[2:], "Measures the decoding of images in workers."))
    cfg = parse(Config, description="Shows pairs of a task or of two folders: lq above hq. See also: data.py bench.")
    if cfg.size < 1:
        raise UserError(f"--size {cfg.size}: must be at least 1")
    gen, source = generator(cfg.seed), None
    if cfg.lq or cfg.hq or cfg.dataset:
        source = load_pairs("all", cfg.lq, cfg.hq, cfg.match, cfg.dataset, cfg.root, shown=sys.maxsize)
        print(f"{len(source)} images" + (f", lq smaller by {sorted(set(source.factor))}" if cfg.lq else ""))
    task = chosen_task(cfg.task, cfg.dataset)
    if isinstance(source, Pairs):
        lq, hq = pair_crops(source, 8, cfg.size, gen)
    else:
        degrade = get_task(task)
        source = photographs("train", cfg.data, cfg.size) if source is None else source
        hq = random_crops(source, 8, cfg.size, gen)
        lq, severity = degrade(hq, gen)
        print("severity " + " ".join(f"{s:.2f}" for s in severity))
    out = cfg.out or f"runs/data/{cfg.dataset or ('pairs' if cfg.lq else task)}.png"
    write_image(out, torch.cat([torch.cat(list(x), dim=2) for x in (lq, hq)], dim=1))
    print(f"wrote {out}")


if __name__ == "__main__":
    from utils import run_main
    run_main(main)
