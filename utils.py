"""Small things that every script shares: seeds, image files, atomic writes, options, clear errors.

Images are float tensors (3, H, W) in [-1, 1]; files hold 8-bit RGB. Nothing here knows about diffusion.
"""

import argparse
import contextlib
import dataclasses
import json
import logging
import os
import sys
import typing
from pathlib import Path

import torch


class UserError(Exception):
    """Bad input: one line that names the file or flag and the remedy. `run_main` turns it into exit code 2."""


def generator(seed, *stream):
    """A CPU torch.Generator for one purpose. stream: integers that keep purposes apart (no two share numbers)."""
    mixed = seed & 0xFFFFFFFF
    for part in stream:  # a 64-bit linear congruential mix (Knuth's MMIX constants)
        mixed = (mixed * 6364136223846793005 + 1442695040888963407 + part) & 0xFFFFFFFFFFFFFFFF
    return torch.Generator().manual_seed(mixed)


def make_folder(path):
    """Makes a folder and those above it, if missing. Raises UserError where that cannot be."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path}: no folder can be made there ({error.strerror}); choose another --out") from None


@contextlib.contextmanager
def atomic(path):
    """Yields a temporary path beside `path`, renamed onto it only if the block succeeds: no half-written file."""
    path = Path(path)
    make_folder(path.parent)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_pixels(path):
    """An image file as an array (H, W, 3): uint8, or float32 in [0, 1] for 16-bit and float files. Grey, palette, alpha
    (over white) and EXIF rotation are resolved. Raises UserError that names the file if it cannot be decoded."""
    import numpy as np
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            ImageOps.exif_transpose(image, in_place=True)  # without the copy that it returns otherwise
            if image.mode in ("I", "F") or image.mode.startswith("I;16"):  # PIL would clip to 255, not scale
                full = 1.0 if image.mode == "F" else 65535.0  # float files hold [0, 1], integer ones 16 bits
                grey = np.asarray(image, dtype=np.float32) / full
                return np.repeat(grey[..., None], 3, axis=2).clip(0, 1)
            if "A" in image.getbands() or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return np.array(image if image.mode == "RGB" else image.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: not a readable image ({error}); remove or convert it") from None


def read_image(path):
    """An image file as (3, H, W) float in [-1, 1]. Raises UserError that names the file if it cannot be decoded."""
    pixels = torch.from_numpy(read_pixels(path)).permute(2, 0, 1)
    return pixels.float() / 127.5 - 1 if pixels.dtype == torch.uint8 else pixels * 2 - 1


def read_uint8(path):
    """An image file as uint8 (3, H, W): to_uint8(read_image(path)), without floats where the file has 8 bits."""
    pixels = torch.from_numpy(read_pixels(path)).permute(2, 0, 1).contiguous()
    return pixels if pixels.dtype == torch.uint8 else to_uint8(pixels * 2 - 1)


def to_uint8(images):
    """(..., H, W) float in [-1, 1] -> uint8 in [0, 255], rounded to the nearest level as a saved PNG has it."""
    return (images.detach().float().clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8)


def write_image(path, image):
    """(3, H, W) in [-1, 1] -> 8-bit file, format by the ending of `path`, written under a temporary name."""
    from PIL import Image

    if Path(path).suffix.lower() not in Image.registered_extensions():
        raise UserError(f"{path}: this ending is of no image format; use .png or .jpg")
    with atomic(path) as temporary:
        Image.fromarray(to_uint8(image).permute(1, 2, 0).cpu().numpy()).save(temporary)


def write_json(path, value):
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n")


def write_rows(path, rows):
    """A list of dicts -> CSV; the columns are the union of the keys, in the order they first appear."""
    import csv

    columns = list(dict.fromkeys(key for row in rows for key in row))
    with atomic(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def save_checkpoint(path, modules, optimizer, generators, info):
    """Everything that a resumed run needs in one safetensors file, nothing pickled.

    modules, generators: dicts by name. info: JSON-able values (counters, histories), kept in the file's header.
    """
    from safetensors.torch import save_file

    tensors = {f"{name}.{key}": value.detach().cpu().contiguous().clone()
               for name, module in modules.items() for key, value in module.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{key}": value.detach().cpu().clone() for key, value in state.items()}
    tensors |= {f"generator.{name}": g.get_state() for name, g in generators.items()}
    with atomic(path) as temporary:
        save_file(tensors, temporary, metadata={"info": json.dumps(info)})


def load_checkpoint(path, modules, optimizer, generators):
    """Fills modules, optimizer and generators from a file of save_checkpoint; returns its info.

    Raises UserError that names the file if it does not fit.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}
            info = json.loads(file.metadata()["info"])
        for name, module in modules.items():
            start = name + "."
            module.load_state_dict({k[len(start):]: v for k, v in tensors.items() if k.startswith(start)})
        state = {}
        for key, value in tensors.items():
            if key.startswith("optimizer."):
                _, index, field = key.split(".")
                state.setdefault(int(index), {})[field] = value
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        for name, g in generators.items():
            g.set_state(tensors[f"generator.{name}"])
    except (OSError, KeyError, RuntimeError, SafetensorError, TypeError) as error:
        raise UserError(f"{path}: does not fit this run ({str(error).splitlines()[0]}); "
                        "resume with the flags it was started with, or start anew") from None
    return info


def check_resume(cfg, saved, free):
    """Raises UserError if the dataclass cfg differs from `saved`, the dict of a checkpoint's, in more than the fields
    of `free`: those that say how long and where a run goes on."""
    changed = [f"--{key.replace('_', '-')} {value}" for key, value in saved.items()
               if key not in free and getattr(cfg, key, value) != value]
    if changed:
        raise UserError(f"--resume: the run was started with {' '.join(changed)}; resume with the same")


def pick_device(name, flag="--device"):
    """'auto' -> cuda, mps or cpu, whichever is there. Raises UserError for a device this machine lacks."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
    except Exception as error:
        raise UserError(f"{flag} {name}: not usable here ({str(error).splitlines()[0]}); try cpu") from None
    return name


def parse(config_class, argv=None, description=None, positional=None, defaults={}):
    """A flat dataclass -> its command line. Help comes from `Annotated[type, "help"]`; booleans are --x/--no-x.

    Returns the filled dataclass; with `positional` (a help text), the pair (dataclass, list of plain arguments).
    defaults: field -> value, instead of those of the dataclass.
    """
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    if positional:
        parser.add_argument("plain_arguments", nargs="*", help=positional, metavar="PATH")
    hints = typing.get_type_hints(config_class, include_extras=True)
    for field in dataclasses.fields(config_class):
        kind, text = typing.get_args(hints[field.name])
        default = defaults.get(field.name, field.default)
        if kind is bool:
            options = {"action": argparse.BooleanOptionalAction, "default": default, "help": text}
        elif kind is list:
            default = defaults.get(field.name, field.default_factory())
            shown = f" (default: {' '.join(default)})" if default else ""
            options = {"nargs": "+", "default": default, "help": text + shown}
        else:
            shown = "" if default == "" else f" (default: {default})"
            options = {"type": kind, "default": default, "help": text + shown}
        parser.add_argument("--" + field.name.replace("_", "-"), **options)
    values = vars(parser.parse_args(argv))
    plain = values.pop("plain_arguments", None)
    config = config_class(**values)
    return (config, plain) if positional else config


def quiet():
    """Silences two known messages at their source; every other warning still prints.

    bitsandbytes (installed by pyiqa, imported by diffusers) looks for an optional CPU kernel we never call;
    matplotlib announces that it builds its font cache, once.
    """
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)


def out_of_memory(error):
    """Whether an exception says that memory ran out: on a CPU, torch has no class of its own for that."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(
        words in str(error) for words in ("out of memory", "allocate memory"))


def run_main(main):
    """Runs a script's main(): UserError or too little memory -> one line on stderr and exit code 2, Ctrl-C -> 130, no
    traceback."""
    quiet()
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        text = (str(error).splitlines() or ["MemoryError"])[0]
        print(f"error: not enough memory ({text}); lower --micro-batch, --batch, --size or "
              "--tile, or use --dtype bfloat16 and, where there is one, --gradient-checkpointing", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("stopped; what was written stays", file=sys.stderr)
        raise SystemExit(130) from None
