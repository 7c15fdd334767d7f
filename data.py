"""Degradations that make a low-quality image (lq) of a high-quality one (hq), and photographs.

A task is a function (lq, severity) = degrade(hq, generator), see `degrade`. TASKS holds all, some
of fixed severity: sr3 is scale 3, denoise25 sigma 25/255, jpeg10 quality 10. Each task's function
gives its formula y = f(x, s) and source: x, y: hq, lq in [0, 1]; s: severity, 0 mild, 1 worst.

Pairs of files come from two folders; --match says how the names of lq and hq correspond:
  same        the same path without ending
  prefix      hq is named as lq up to the first "_": 1400_1.png -> 1400.png
  suffix:A,B  lq ends with A, hq with B, also in one folder: suffix:_LR4,_HR or suffix:x4
  start:A,B   lq starts with A, hq with B: start:rain-,norain-

Chosen here (the paper trains on DIV2K and the like; a laptop should need no download):
 1. Photographs come inside the wheels of scikit-image, matplotlib and pyiqa; `test`, for tables
    only, are five references of TID2013 (Ponomarenko et al. 2015).
 2. A folder is split by a hash of each name (10 % test, 10 % val), so that a new photograph moves
    no other one. If there are subfolders train, val or test, they are the split instead.
 3. Training crops are shrunk by 1, 2 or 3: more scales, and the JPEG blocks of sources vanish.
 4. Flat crops teach nothing and are drawn again. lq is rounded to 8 bits, like a file (of sr, the
    small image is).

    python data.py --task derain                           # laptop: writes runs/data/derain.png
    python data.py --task sr --data DIV2K_HR --size 256    # full scale: decodes every file, too
"""

import hashlib
import io
import math
import re
import sys
import unicodedata
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from itertools import zip_longest
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import ExifTags, Image
from torch.utils.data import Dataset
from tqdm import tqdm

import utils

progress = partial(tqdm, delay=2, leave=False)  # a bar only for what takes longer than 2 seconds


# ---- degradations, to be copied; x, y: (B, 3, H, W) in [0, 1], s: (B, 1, 1, 1), on the CPU ----

def degrade(formula, hq, generator=None, severity=None):
    """hq (B, 3, H, W) in [-1, 1] -> lq alike, of 8 bits, and severity (B,), uniform if None.

    hq: float32, with sides of at least 16 pixels. severity: of all images, in [0, 1]."""
    shape = (len(hq), 1, 1, 1)
    fixed = severity is not None
    s = torch.full(shape, severity) if fixed else torch.rand(shape, generator=generator)
    y = formula((hq.clamp(-1, 1) + 1) / 2, s, generator)
    return utils.to_uint8(y * 2 - 1).float() / 127.5 - 1, s.flatten()


def resize(images, size, mode="bicubic"):
    """(B, 3, H, W) -> (B, 3, *size), with antialias as PIL and the SR literature have it."""
    return F.interpolate(images, size=size, mode=mode, antialias=True, align_corners=False)


def uniform(like, low, high, generator):
    """Uniform numbers in [low, high] of the shape of `like`."""
    return low + (high - low) * torch.rand(like.shape, generator=generator)


def white_noise(x, generator):
    """N(0, 1) like x; the same in all channels of a grey x, or averaging them would remove it."""
    noise = torch.randn(x.shape, generator=generator)
    is_color = (x - x[:, :1]).abs().amax((1, 2, 3), keepdim=True) > 0.005  # over one of 255 levels
    return torch.where(is_color, noise, noise[:, :1])


def filter2d(x, kernels):
    """Each image (B, C, H, W) with its own kernel (B, 1, K, K), K odd, reflected at the border."""
    padded = F.pad(x, (kernels.shape[-1] // 2,) * 4, mode="reflect").flatten(0, 1)
    weight = kernels.repeat_interleave(x.shape[1], 0)  # (B C, 1, K, K)
    return F.conv2d(padded[None], weight, groups=len(weight)).view_as(x)


def gaussian_kernels(along, across, angle, side):
    """exp(-(u / along)^2 / 2 - (v / across)^2 / 2), sum 1; (B, 1, 1, 1) -> (B, 1, side, side).
    along, across: standard deviations in pixels; angle: of the axis u, in radians."""
    x = torch.arange(side) - side // 2.0
    u = (x * angle.cos() + x[:, None] * angle.sin()) / along
    v = (x[:, None] * angle.cos() - x * angle.sin()) / across
    kernels = torch.exp(-u ** 2 / 2 - v ** 2 / 2)
    return kernels / kernels.sum((2, 3), keepdim=True)


def motion_kernels(length, generator, side, points=48):
    """A camera that wanders `length` (B, 1, 1, 1) pixels, turning -> (B, 1, side, side), sum 1.
    The trajectories of Boracchi and Foi 2012 and DeblurGAN (arXiv 1711.07064) without shakes."""
    count = len(length)
    bend = 0.25 * torch.rand(count, 1, generator=generator)  # radians per step
    start = 2 * math.pi * torch.rand(count, 1, generator=generator)
    angle = start + (bend * torch.randn(count, points, generator=generator)).cumsum(1)
    path = torch.stack([angle.sin(), angle.cos()]).cumsum(2)  # (2, B, points): y, x
    path = path * length[:, 0, 0] / points
    path = path - (path.amax(2, keepdim=True) + path.amin(2, keepdim=True)) / 2  # centred
    y, x = (1 - (path[..., None] - torch.arange(side) + side // 2).abs()).clamp(min=0)  # bilinear
    kernels = torch.einsum("bpy,bpx->byx", y, x)[:, None]
    return kernels / kernels.sum((2, 3), keepdim=True)


def jpeg(image, quality):
    """(3, H, W) in [-1, 1] -> the same after JPEG with 4:2:0 chroma by PIL, quality 1 to 95."""
    pixels, file = utils.to_uint8(image).permute(1, 2, 0).numpy(), io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=int(quality))
    return utils.read_image(file)


def gaussian_noise(x, s, generator):
    """y = x + sigma / 255 n, sigma = 5 + 70 s (DnCNN, arXiv 1608.03981; FFDNet, 1710.04026)."""
    return x + (5 + 70 * s) / 255 * white_noise(x, generator)


def blur(x, s, generator):
    """y = k * x; half of the k are Gaussian, half are motion over 3 + 17 s pixels.
    Gaussian: sigma 0.6 + 2.4 s pixels along, 0.4 to 1 of it across (SRMD, arXiv 1712.06116)."""
    ratio, angle = uniform(s, 0.4, 1, generator), uniform(s, 0, math.pi, generator)
    still = gaussian_kernels(0.6 + 2.4 * s, (0.6 + 2.4 * s) * ratio, angle, 25)
    moved = motion_kernels(3 + 17 * s, generator, 25)
    return filter2d(x, torch.where(uniform(s, 0, 1, generator) < 0.5, moved, still))


def compress(x, s, generator):
    """JPEG of quality round(60 - 50 s), 10 to 60, around ARCNN's range (arXiv 1504.06993)."""
    qualities = (60 - 50 * s).round().flatten()
    return torch.stack([jpeg(image * 2 - 1, q) for image, q in zip(x, qualities)]) / 2 + 0.5


def add_rain(x, s, generator):
    """y = x + b min(1, sum_i S_i), b = 0.25 + 0.5 s (Yang et al. 2017, arXiv 1609.07769).
    1 + round(4 s) layers S_i of one angle each, up to 35 degrees from the vertical: pixels of
    probability 0.001 + 0.004 s, smeared to streaks of 12 to 28 pixels (4 sigma)."""
    rain = torch.zeros(1)
    for layer in range(5):
        along, across = uniform(s, 3, 7, generator), uniform(s, 0.4, 0.8, generator)
        angle = math.pi / 2 + uniform(s, -0.61, 0.61, generator)
        streak = gaussian_kernels(along, across, angle, 31)
        drops, each = torch.rand(2, *x[:, :1].shape, generator=generator)
        falls = (drops < 0.001 + 0.004 * s) & (layer <= (4 * s).round())
        streak = streak / streak.amax((2, 3), keepdim=True)
        rain = rain + filter2d(falls * (0.5 + 0.5 * each), streak)
    return x + (0.25 + 0.5 * s) * rain.clamp(max=1)


def add_haze(x, s, generator):
    """y = x t + A (1 - t), t = exp(-beta d), beta = 0.5 + 2 s (Narasimhan and Nayar 2002).
    A in [0.7, 1], grey, as in RESIDE (arXiv 1712.04143). The depth d in [0.2, 1] is smooth: 4 x 4
    random values, farther towards the top, enlarged bicubically."""
    light = uniform(s, 0.7, 1, generator)
    coarse = torch.rand(len(x), 1, 4, 4, generator=generator) + torch.linspace(1, 0, 4).view(4, 1)
    depth = F.interpolate(coarse, x.shape[2:], mode="bicubic", align_corners=False)
    low, high = depth.amin((2, 3), keepdim=True), depth.amax((2, 3), keepdim=True)
    passed = torch.exp(-(0.5 + 2 * s) * (0.2 + 0.8 * (depth - low) / (high - low)))
    return x * passed + light * (1 - passed)


def darken(x, s, generator):
    """y = z + sqrt(k z + r^2) n, z = g x^gamma, gamma = 1.5 + 2 s, g in [0.6, 0.9]; LLNet, arXiv
    1511.03995. Shot noise k = 0.0005 + 0.0025 s, read noise r = 0.002 + 0.01 s, Foi et al. 2008."""
    dark = uniform(s, 0.6, 0.9, generator) * x ** (1.5 + 2 * s)
    sigma = ((0.0005 + 0.0025 * s) * dark + (0.002 + 0.01 * s) ** 2).sqrt()
    return dark + sigma * white_noise(x, generator)


def damage_once(x, s, generator, sigma, side, shrink, noise):
    """A round of `damage`: (1, 3, h, w) -> another size; s: float; side: of the blur's kernel."""
    u = torch.rand(9, 1, 1, 1, 1, generator=generator)
    along = 0.2 + sigma * s * u[0]
    x = filter2d(x, gaussian_kernels(along, along * (0.4 + 0.6 * u[1]), math.pi * u[2], side))
    factor = 1.2 * (1 / (1 + shrink * s) / 1.2) ** u[3].item()
    size = [max(8, round(length * factor)) for length in x.shape[2:]]
    mode = ("area", "bilinear", "bicubic")[int(3 * u[4])]
    x = F.interpolate(x, size, mode="area") if mode == "area" else resize(x, size, mode)
    light = x.clamp(0, 1).sqrt() if u[6] < 0.5 else 1
    grain = white_noise(x[:, :1 if u[7] < 0.4 else 3], generator)
    x = x + (1 + noise * s * u[5]) / 255 * light * grain
    return jpeg(x[0] * 2 - 1, round(95 - 65 * s * u[8].item()))[None] / 2 + 0.5


def damage(x, s, generator):
    """Blur, resize, noise and JPEG, twice, then back: Real-ESRGAN (arXiv 2107.10833) without sinc.
    Uniform up to: sigma of the blur 0.2 + (2.8, then 1.3) s; size from 1.2 to 1 / (1 + (2, then 1)
    s), in log; noise (1 + (29, then 24) s) / 255, half of it shot noise, 40 % grey; JPEG 95 - 65 s.
    """
    images = []
    for image, strength in zip(x.split(1), s.flatten().tolist()):
        for bounds in ((2.8, 21, 2, 29), (1.3, 11, 1, 24)):
            image = damage_once(image, strength, generator, *bounds)
        images.append(resize(image, x.shape[2:]))
    return torch.cat(images)


def degrade_sr(hq, generator=None, scale=4):
    """lq = up(down(hq)), bicubic, as DIV2K has it (Agustsson and Timofte 2017); small: 8 bits.
    Severity (scale - 1) / 3, not random. Odd sizes are padded by reflection."""
    height, width = hq.shape[2:]
    x = F.pad(hq, (0, -width % scale, 0, -height % scale), mode="reflect")
    small = utils.to_uint8(resize(x, [side // scale for side in x.shape[2:]]))
    lq = resize(small.float() / 127.5 - 1, x.shape[2:]).clamp(-1, 1)[..., :height, :width]
    return lq, torch.full((len(hq),), (scale - 1) / 3)


def degrade_mixed(hq, generator=None, kinds=()):
    """One of `kinds`, else of all other tasks without a fixed severity, for each image."""
    results, names = [], kinds or ("sr2", "sr3", "sr4", *FORMULAS)
    for image in hq.split(1):
        name = names[int(torch.randint(len(names), (), generator=generator))]
        results.append(TASKS[name](image, generator))
    lq, severity = zip(*results)
    return torch.cat(lq), torch.cat(severity)


FORMULAS = {"denoise": gaussian_noise, "deblur": blur, "jpeg": compress, "derain": add_rain,
            "dehaze": add_haze, "lowlight": darken, "real": damage}
TASKS = {"sr": degrade_sr, "mixed": degrade_mixed}
TASKS |= {kind: partial(degrade, formula) for kind, formula in FORMULAS.items()}
TASKS |= {f"sr{n}": partial(degrade_sr, scale=n) for n in (2, 3, 4)}
TASKS |= {f"denoise{n}": partial(degrade, gaussian_noise, severity=(n - 5) / 70)
          for n in (15, 25, 50)}
TASKS |= {f"jpeg{n}": partial(degrade, compress, severity=(60 - n) / 50) for n in (10, 20, 30, 40)}


def get_task(name):
    """The degradation called `name`."""
    if name not in TASKS:
        raise utils.UserError(f"--task {name}: choose one of {', '.join(sorted(TASKS))}")
    return TASKS[name]


# ---- photographs and pairs ----

FOLDERS = ("skimage/data", "matplotlib/mpl-data/sample_data", "ResultsCalibra/ref_dir",
           "tests/test_efficiency_img_dir")  # beside the packages; the last two are pyiqa's
SHIPPED = {  # both motorcycles are one scene
    "train": "astronaut.png coffee.png motorcycle_left.png motorcycle_right.png rocket.jpg ihc.png "
             "hubble_deep_field.jpg retina.jpg brick.png grass.png gravel.png",
    "val": "grace_hopper.jpg coins.png chelsea.png camera.png frame_4wrwr48cdk6rbcjl.jpg "
           "frame_7gzdcz9sif0ekg31.jpg frame_9ogwhvvy7gfj6jzh.jpg",
    "test": "I03.bmp I04.bmp I06.bmp I08.bmp I19.bmp",
}


class Source:
    """source[i] -> (lq or None, hq), uint8 (3, H, W), decoded when asked for; paths[i] alike.

    A smaller lq is enlarged to the size of hq, which loses rows and columns that lq lacks."""

    def __init__(self, files):
        self.names = [name for name, _, _ in files]
        self.paths = [(lq, hq) for _, lq, hq in files]

    def __len__(self):
        return len(self.paths)

    @lru_cache(64)  # the latest images stay decoded
    def __getitem__(self, index):
        lq, hq = self.paths[index]
        large = hq.parent.as_posix().endswith(FOLDERS[3])  # JPEGs, whose blocks vanish if halved
        hq = utils.read_image(hq)
        hq = F.avg_pool2d(hq, 2) if large else hq
        if lq is None:
            return None, utils.to_uint8(hq)
        lq = utils.read_image(lq)
        height, width = (hq.shape[1] // lq.shape[1] * side for side in lq.shape[1:])
        lq = resize(lq[None], (height, width))[0]
        return utils.to_uint8(lq), utils.to_uint8(hq[:, :height, :width])


def shipped(split):
    """Source of the photographs inside the packages."""
    names = " ".join(SHIPPED.values()) if split == "all" else SHIPPED[split]
    files = []
    for name in names.split():
        places = [Path(home, folder, name) for home in sys.path for folder in FOLDERS]
        path = next(filter(Path.exists, places), None)
        if path is None:
            raise utils.UserError(f"{name}: missing; install requirements.txt, or use --data DIR")
        files.append((path.stem, None, path))
    return Source(files)


def named_images(folder, flag):
    """{name: path} of the images under `folder`; name: NFC, from there, without ending."""
    found = {}
    for path in utils.list_images(folder):
        name = path.relative_to(folder).with_suffix("").as_posix()
        name = unicodedata.normalize("NFC", name)
        if name in found:
            raise utils.UserError(f"{found[name]}, {path}: one name; rename or remove one of them")
        found[name] = path
    if not found:
        raise utils.UserError(f"{flag} {folder}: no such folder, or no images there")
    return found


@cache  # the three splits of two folders list them once, and say once what has no partner
def match_pairs(lq, hq, match):
    """Two folders and a rule -> [(name of hq, lq path, hq path)]; one hq may serve several lq."""
    kind, _, parts = unicodedata.normalize("NFC", match).partition(":")
    low, _, high = map(re.escape, parts.partition(","))
    rules = {  # of the names of lq and hq; those belong together whose groups are equal
        "same": ("(.*)", "(.*)"),
        "prefix": ("(.*/|)([^/_]*)(?:_[^/]*)?", "(.*/|)([^/]*)"),
        "suffix": (f"(.*){low}", f"(.*){high}"),
        "start": (f"(.*/|){low}([^/]*)", f"(.*/|){high}([^/]*)"),
    }
    if kind not in rules:
        raise utils.UserError(f"--match {match}: use same, prefix, suffix:LQ,HQ or start:LQ,HQ")
    lq_images, hq_images = named_images(lq, "--lq"), named_images(hq, "--hq")
    lq_rule, hq_rule = map(re.compile, rules[kind])
    partners, pairs = {}, []
    for found in filter(None, map(hq_rule.fullmatch, hq_images)):
        partners[found.groups()] = found[0]
    for found in filter(None, map(lq_rule.fullmatch, lq_images)):
        path, partner = lq_images[found[0]], partners.get(found.groups())
        if partner and not path.samefile(hq_images[partner]):
            pairs.append((partner, path, hq_images[partner]))
    used = {path for pair in pairs for path in pair[1:]}
    alone = sorted({*lq_images.values(), *hq_images.values()} - used)
    note = f"{len(pairs)} pairs by --match {match}, {len(alone)} files without a partner"
    note = ", ".join([note, *map(str, alone[:5])])
    if not pairs:
        raise utils.UserError(f"--lq {lq}, --hq {hq}: {note}; see the top of data.py for --match")
    print(note, file=sys.stderr)
    return pairs


def check_fit(lq, hq):
    """Raises UserError unless hq / lq is an integer, up to rows and columns that lq lacks.

    Reads headers only, with the quarter turns that EXIF asks for."""
    sizes = []
    for path in (lq, hq):
        with Image.open(path) as image:
            tags = Image.Image.getexif(image)  # PNG's own would decode the file
            turned = tags.get(ExifTags.Base.Orientation, 1) >= 5
            sizes.append(image.size[::-1] if turned else image.size)
    (w, h), (width, height) = sizes
    factor = max(1, height // h)
    if (width // factor, height // factor) != (w, h):
        raise utils.UserError(f"{lq} ({w} x {h}), {hq} ({width} x {height}): sizes do not fit; lq "
                              "must be as large as hq or smaller by an integer factor")


def split_of(name):
    """train, val or test: by the first 32 bits of the SHA-1 of a photograph's name."""
    digest = hashlib.sha1(name.encode(errors="surrogateescape")).hexdigest()
    share = int(digest[:8], 16) / 2 ** 32
    return "test" if share < 0.1 else "val" if share < 0.2 else "train"


def open_split(cfg, split):
    """The Source of "train", "val", "test" or "all" that cfg.data, lq, hq and match ask for."""
    if bool(cfg.lq) != bool(cfg.hq) or (cfg.lq and cfg.data):
        raise utils.UserError("--lq, --hq: give both folders, and no --data")
    home = cfg.data or cfg.hq
    if not home:
        return shipped(split)
    files = [(name, None, path) for name, path in named_images(home, "--data").items()] \
        if cfg.data else match_pairs(cfg.lq, cfg.hq, cfg.match)
    by_folder = any(Path(home, part).is_dir() for part in SHIPPED)
    parts = [name.split("/")[0] if by_folder else split_of(name) for name, _, _ in files]
    files = [file for file, part in zip(files, parts) if split in (part, "all")]
    if not files:
        raise utils.UserError(f"{home}: no image falls to {split}; sort them by hand into "
                              "subfolders train, val and test")
    bad = []
    for _, lq, hq in progress(files if cfg.lq else [], "reading sizes"):
        try:
            check_fit(lq, hq)
        except (utils.UserError, OSError) as error:
            bad.append(str(error))
    if bad:
        raise utils.UserError(f"{len(bad)} of {len(files)} pairs: " + "; ".join(bad[:20]))
    return Source(files)


# ---- crops ----

class Crops(Dataset):
    """Item i: (lq, hq), (3, size, size) in [-1, 1], a function of (seed, start + i) alone.

    Any image, place, turn and flip; hq without an lq is shrunk by 1, 2 or 3 and degraded. A flat hq
    (standard deviation of the brightness under 0.04 of the full range) is drawn again."""

    def __init__(self, source, degrade, size, seed, count, start=0):
        self.source, self.degrade, self.size = source, degrade, size
        self.seed, self.count, self.start = seed, count, start

    def __len__(self):
        return self.count

    def __getitem__(self, item):
        def draw(high):
            return int(torch.randint(high, (), generator=generator))

        if not 0 <= item < self.count:
            raise IndexError(item)  # ends a loop over the crops
        generator = utils.generator(self.seed, 5, self.start + item)
        for _ in range(20):
            index = draw(len(self.source))
            images = [image for image in self.source[index] if image is not None]
            height, width = images[-1].shape[1:]
            largest = min(height, width) // self.size
            if largest == 0:
                raise utils.UserError(f"{self.source.paths[index][1]}: {width} x {height} is less "
                                      f"than a crop of {self.size}; lower --size or remove it")
            shrink = min((1, 1, 2, 3)[draw(4)], largest) if len(images) == 1 else 1
            side = self.size * shrink
            top, left = draw(height - side + 1), draw(width - side + 1)
            crops = torch.stack([x[:, top:top + side, left:left + side] for x in images]).float()
            if crops[-1].mean(0).std() / 255 >= 0.04:
                break
        crops = torch.rot90(F.avg_pool2d(crops, shrink) / 127.5 - 1, draw(4), (2, 3))
        crops = crops.flip(3) if draw(2) else crops
        if len(crops) == 1:
            generator = utils.generator(self.seed, 6, self.start + item)
            crops = torch.cat([self.degrade(crops, generator)[0], crops])
        return crops[0], crops[1]


def pool(source, degrade, size, seed, count, start=0):
    """(lq, hq), (count, 3, size, size) each: the items of Crops."""
    crops = Crops(source, degrade, size, seed, count, start)
    lq, hq = torch.empty(2, count, 3, size, size)
    for i in progress(range(count), "decoding"):
        lq[i], hq[i] = crops[i]
    return lq, hq


def fine_detail(crop):
    """Root mean square step between neighbouring pixels of uint8 (3, S, S), 1: the full range."""
    x = crop.float() / 255
    return (x.diff(dim=1).square().mean() + x.diff(dim=2).square().mean()).sqrt().item()


def held_out(source, degrade, size, count):
    """Crops that no seed of a run changes: (lq, hq (N, 3, size, size), names), N <= count.

    Pairs: Crops. Else disjoint crops with fine detail, from at most 32 photographs in turn."""
    if source.paths[0][0]:
        return *pool(source, degrade, size, 0, count), [f"crop {i}" for i in range(count)]
    columns, generator = [], utils.generator(0, 3)
    for index in progress(range(0, len(source), math.ceil(len(source) / 32)), "decoding"):
        found, photograph = [], source[index][1]
        for y in range(0, photograph.shape[1] - size + 1, size):
            for x in range(0, photograph.shape[2] - size + 1, size):
                crop = photograph[:, y:y + size, x:x + size]
                if fine_detail(crop) >= 0.03:
                    found.append((crop, f"{source.names[index]}@{y},{x}"))
        columns.append([found[i] for i in torch.randperm(len(found), generator=generator)])
    chosen = [crop for turn in zip_longest(*columns) for crop in turn if crop][:count]
    if not chosen:
        raise utils.UserError(f"--size {size}: no held-out crop has detail; lower it or add images")
    hq = torch.stack([crop for crop, _ in chosen]).float() / 127.5 - 1
    return degrade(hq, utils.generator(0, 4))[0], hq, [name for _, name in chosen]


def whole(source, degrade, index):
    """Image `index`, whole: (lq, hq), (1, 3, H, W) in [-1, 1]."""
    lq, hq = source[index]
    if min(hq.shape[1:]) < 16:
        raise utils.UserError(f"{source.paths[index][1]}: has a side under 16 pixels; remove it")
    hq = hq[None].float() / 127.5 - 1
    if lq is None:
        return degrade(hq, utils.generator(0, 4, index))[0], hq
    return lq[None].float() / 127.5 - 1, hq


@dataclass
class Config:
    """Shows what a task does to photographs, or pairs of files: lq above hq, eight crops."""
    task: str = utils.option("sr", "key of TASKS", sorted(TASKS))
    data: str = utils.option("", "folder of photographs; empty: those inside the packages")
    lq: str = utils.option("", "folder of low-quality images, with --hq: pairs instead of a task")
    hq: str = utils.option("", "folder of their ground truth")
    match: str = utils.option("same", "same, prefix, suffix:LQ,HQ or start:LQ,HQ")
    size: int = utils.option(64, "side of a crop in pixels", least=16)


def main():
    cfg, bad = utils.parse(Config), 0
    source = open_split(cfg, "all" if cfg.data or cfg.lq else "train")
    for index in progress(range(len(source)), "decoding"):
        try:
            if min(source[index][1].shape[1:]) < cfg.size:
                raise utils.UserError(f"{source.paths[index][1]}: is less than a crop")
        except utils.UserError as error:
            print(error)
            bad += 1
    if bad:
        raise utils.UserError(f"{bad} of {len(source)} images cannot be used, see above")
    print(f"{len(source)} images, all readable")
    crops = pool(source, get_task(cfg.task), cfg.size, 0, 8)
    out = f"runs/data/{'pairs' if cfg.lq else cfg.task}.png"
    utils.write_image(out, torch.cat([torch.cat([*images], 2) for images in crops], 1))
    print(f"wrote {out}")


if __name__ == "__main__":
    utils.run_main(main)
