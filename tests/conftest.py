"""Lets the tests import the flat scripts from the folder above, and shares the small things they need."""

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from utils import quiet  # noqa: E402

quiet()


@pytest.fixture
def gen():
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="session")
def tiny_restorer():
    """Builds a pixel restorer of a few thousand random weights; a fresh one per call."""
    from model import PixelRestorer
    return lambda **changes: PixelRestorer.create(
        block_out_channels=(8, 16, 16), norm_num_groups=4, defaults={"steps": 4}, **changes)


@pytest.fixture(scope="session")
def photo_folder(tmp_path_factory):
    """Five 96 x 96 photographs in a folder."""
    from data import photographs, random_crops
    from utils import write_image
    folder = tmp_path_factory.mktemp("photos")
    crops = random_crops(photographs("train"), 5, 96, torch.Generator().manual_seed(1))
    for index, crop in enumerate(crops):
        write_image(folder / f"{index}.png", crop)
    return folder
