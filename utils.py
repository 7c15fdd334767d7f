"""What every script shares: seeds, image files, run folders, command lines, one-line errors.

Images are float tensors (3, H, W) in [-1, 1]; files hold 8-bit sRGB. Nothing here knows diffusion.
"""

import argparse
import contextlib
import copy
import csv
import dataclasses
import json
import logging
import os
import shutil
import sys
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


class UserError(Exception):
    """Bad input: one line that names the file or flag and the remedy; run_main exits with 2."""


def generator(seed, *stream):
    """A CPU torch.Generator for one purpose. stream: integers that keep purposes apart."""
    for part in stream:  # a linear congruential mix (Knuth's MMIX constants), modulo 2^32
        seed = seed * 6364136223846793005 + 1442695040888963407 + part
    return torch.Generator().manual_seed(seed & 0xFFFFFFFF)


def pick_device():
    """cuda, mps or cpu, whichever is there. CUDA_VISIBLE_DEVICES chooses cards; empty: none."""
    if torch.cuda.is_available():
        torch.backends.cudnn.allow_tf32 = False  # float32 means it: SSIM is off by up to 0.02 else
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))  # of this process
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


@contextlib.contextmanager
def one_line(name, remedy):
    """Turns any error of a library, the hub or a device into a UserError."""
    try:
        yield
    except Exception as error:
        text = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise UserError(f"{name}: cannot be used ({text}); {remedy}") from None


# ---- image files ----

def list_images(folder):
    """Image files under `folder`, sorted; follows links, leaves out hidden names and @eaDir."""
    found, seen = [], set()

    def left_out(error):
        note(f"{error}: left out")
    for home, folders, files in os.walk(folder, onerror=left_out, followlinks=True):
        if os.path.realpath(home) in seen:  # a link back to a folder above
            folders.clear()
            continue
        seen.add(os.path.realpath(home))
        folders[:] = [name for name in folders if name[0] not in ".@"]
        found += [Path(home, name) for name in files if name[0] != "."]
    return sorted(path for path in found if path.suffix.lower() in IMAGE_ENDINGS)


@cache  # once for each file
def note(text):
    print(f"note: {text}", file=sys.stderr)


def read_image(path):
    """An image file as (3, H, W) in [-1, 1]; rotation, palette, grey, alpha (over white) resolved.

    Notes say what is lost: color profiles, and the lower half of 16 bits per color (PIL's limit).
    """
    with one_line(path, "remove or convert it"):
        with Image.open(path) as image:
            profile = (image.info.get("icc_profile") or b"sRGB").replace(b"\0", b"")
            if ";16" in str(image.tile) and image.mode[0] != "I":
                note(f"{path}: of 16 bits per color the upper 8 are read")
            if b"sRGB" not in profile and "skimage" not in str(path):  # rocket.jpg
                note(f"{path}: color profile ignored, taken as sRGB")
            image = ImageOps.exif_transpose(image)
            if image.mode[0] in "IF":  # 16 bits of grey, or floats in [0, 1] or [0, 255]
                grey = torch.from_numpy(np.array(image, dtype=np.float32))
                full = 65535 if image.mode != "F" else 255 if grey.max() > 1 else 1
                return (grey / full).clamp(0, 1).expand(3, -1, -1) * 2 - 1
            if "A" in image.getbands() or "transparency" in image.info:
                white = Image.new("RGBA", image.size, "white")
                image = Image.alpha_composite(white, image.convert("RGBA"))
            pixels = torch.from_numpy(np.array(image.convert("RGB")))
    return pixels.permute(2, 0, 1).float() / 127.5 - 1


def to_uint8(images):
    """Any shape in [-1, 1] -> uint8, rounded to the nearest of the 256 levels of a PNG."""
    return (images.detach().float().clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8)


def write_image(path, image):
    """(3, H, W) in [-1, 1] -> 8-bit file, format by the ending of `path`."""
    with atomic(path) as temporary:
        Image.fromarray(to_uint8(image).permute(1, 2, 0).cpu().numpy()).save(temporary)


# ---- run folders ----

def new_run(out, resume=None):
    """Makes the folder of a run. Raises UserError if it holds something, or nothing to resume.

    resume: of a script that has the flag."""
    out = Path(out)
    started = (out / "checkpoint.safetensors").exists()
    if resume and not started:
        raise UserError(f"--resume: no checkpoint in {out}; start without it")
    if not resume and out.is_dir() and any(file.name[0] != "." for file in out.iterdir()):
        more = ", or go on with --resume" * (started and resume is not None)
        raise UserError(f"--out {out}: is not empty; choose another{more}")
    out.mkdir(parents=True, exist_ok=True)
    if not os.access(out, os.W_OK):
        raise UserError(f"--out {out}: cannot be written to; choose another")
    return out


@contextlib.contextmanager
def atomic(path):
    """Yields a temporary path for a file or folder, renamed onto `path` if the block succeeds."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        for file in (temporary, *temporary.rglob("*")):
            if file.is_file():  # safetensors makes files that only their owner may read
                file.chmod(0o666 & ~umask)
        shutil.rmtree(path, ignore_errors=True)  # does nothing to a file
        os.replace(temporary, path)
    except SafetensorError as error:  # a full disk, said in its own way
        raise OSError(f"{path}: {error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.unlink(missing_ok=True)


def write_json(path, value):
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def write_rows(path, rows):
    """A list of dicts -> CSV; the columns are the union of the keys, as they first appear."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    how = {"newline": "", "encoding": "utf-8", "errors": "surrogateescape"}
    with atomic(path) as temporary, open(temporary, "w", **how) as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def save_checkpoint(path, state, info):
    """state: nested dicts of tensors. info: what JSON holds, in the header of the safetensors."""
    flat, parts = {}, list(state.items())
    while parts:
        name, part = parts.pop()
        if isinstance(part, dict):
            parts += [(f"{name}/{key}", value) for key, value in part.items()]
        else:
            flat[name] = part.detach().cpu().contiguous().clone()
    with atomic(path) as temporary:
        save_file(flat, temporary, metadata={"info": json.dumps(info)})


def load_checkpoint(path):
    """What save_checkpoint wrote: (state, info); keys that are numbers come back as int."""
    state = {}
    with one_line(path, "it is no checkpoint of ours; start in a new --out"):
        with safe_open(path, "pt") as file:
            info = json.loads(file.metadata()["info"])
            for name in file.keys():
                *above, last = (int(x) if x.isdigit() else x for x in name.split("/"))
                place = state
                for key in above:
                    place = place.setdefault(key, {})
                place[last] = file.get_tensor(name)
    return state, info


def check_resume(cfg, info, free, photographs):
    """Raises UserError if the photographs, or settings but those in `free`, are not the run's.

    info: of its checkpoint.
    """
    for key, value in info["config"].items():
        if key not in free and getattr(cfg, key, value) != value:
            flag = "--" + key.replace("_", "-")
            how = f"without {flag}" if value == "" else f"with {flag} {value}"
            raise UserError(f"--resume: the run was started {how}; give the same")
    if info["photographs"] != photographs:
        raise UserError("--resume: the training photographs are other ones now; give them back "
                        "(a broken one: another under its name), or start anew")


# ---- command lines ----

def option(default, help, choices=None, least=None):
    """A field of a Config dataclass: default, one line of help, allowed values, least value."""
    notes = {"help": help, "choices": choices, "least": least}
    return dataclasses.field(default_factory=lambda: copy.copy(default), metadata=notes)


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message.removeprefix('argument ')} (see {self.prog} --help)")


def parse(config_class, argv=None, positional=None):
    """A flat dataclass of `option` fields -> its command line; a list takes several words.

    Returns the dataclass; with `positional` (its help), the pair (dataclass, plain arguments)."""
    parser = Parser(description=config_class.__doc__, allow_abbrev=False)
    if positional:
        parser.add_argument("paths", nargs="+", help=positional, metavar="PATH")
    for field in dataclasses.fields(config_class):
        default, notes = field.default_factory(), field.metadata
        how = {"type": type(default), "choices": notes["choices"]}
        if isinstance(default, bool):
            how = {"action": argparse.BooleanOptionalAction}
        elif isinstance(default, list):
            how = {"nargs": "*"}
        known = str(default) not in ("", "[]", "False")
        shown = notes["help"] + f" (default: {default})" * known
        flag = "--" + field.name.replace("_", "-")
        parser.add_argument(flag, default=default, help=shown.replace("%", "%%"), **how)
    values = vars(parser.parse_args(argv))
    paths = values.pop("paths", None)
    cfg = config_class(**values)
    for field in dataclasses.fields(cfg):
        value, least = values[field.name], field.metadata["least"]
        if least is not None and not value >= least:  # NaN is not
            parser.error(f"--{field.name.replace('_', '-')} {value}: must be at least {least}")
    return (cfg, paths) if positional else cfg


def run_main(main):
    """Runs main(): bad input, a full disk, too little memory -> one line and exit code 2."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # looks for a kernel nobody needs
    if hasattr(sys.stdout, "reconfigure"):
        # Windows would stumble over a ↓ in a table, and all over a name that is no UTF-8
        sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")
    try:
        return main()
    except KeyboardInterrupt:
        print("stopped; what was written stays", file=sys.stderr)
        raise SystemExit(130) from None
    except (UserError, OSError) as error:  # a DataLoader's worker puts its traceback before it
        line = str(error).rpartition("utils.UserError: ")[2]
    except (MemoryError, RuntimeError) as error:
        texts = "out of memory", "allocate memory"
        if not isinstance(error, MemoryError) and not any(text in str(error) for text in texts):
            raise
        line = f"not enough memory ({error}); lower --micro-batch, --batch, --size or --tile"
    print("error:", *line.split(), file=sys.stderr)
    raise SystemExit(2)
