"""Lets the tests import the flat scripts from the folder above; small things they share."""

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / x) for x in ("", "tests", "results", "weights", "examples")]

from utils import read_image, write_image  # noqa: E402


@pytest.fixture
def gen():
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="session")
def tiny_restorer():
    """Builds a pixel restorer of a few thousand random weights with 4 steps; a fresh one each."""
    from tiny import pixel
    return pixel


@pytest.fixture(scope="session")
def photo_folder(tmp_path_factory):
    """Five 96 x 96 photographs in a folder with subfolders train (3), val (1) and test (1)."""
    import skimage
    shipped = Path(skimage.__file__).parent / "data"
    astronaut = read_image(shipped / "astronaut.png")  # (3, 512, 512)
    chelsea = read_image(shipped / "chelsea.png")      # (3, 300, 451)
    folder = tmp_path_factory.mktemp("photos")
    for name, photo, top, left in (
            ("train/face", astronaut, 60, 180), ("train/suit", astronaut, 300, 220),
            ("train/rocket", astronaut, 100, 380), ("val/flag", astronaut, 250, 10),
            ("test/cat", chelsea, 80, 180)):
        write_image(folder / f"{name}.png", photo[:, top:top + 96, left:left + 96])
    return folder
