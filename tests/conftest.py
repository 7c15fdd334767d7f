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


@pytest.fixture
def command(monkeypatch):
    """Runs the main() of a script with these words on its command line."""
    def run(script, *words):
        monkeypatch.setattr(sys, "argv", [script.__name__, *map(str, words)])
        script.main()
    return run


@pytest.fixture(scope="session")
def tiny_restorer():
    """Builds a pixel restorer of a few thousand random weights with 4 steps; a fresh one each."""
    from tiny import pixel
    return pixel


@pytest.fixture
def step_args(tiny_restorer, gen):
    """Arguments of rl.step_loss but for k, weights that have moved, with every term of a size."""
    import rl
    restorer, lq = tiny_restorer(), torch.rand(3, 3, 16, 16, generator=gen) * 2 - 1
    reference = restorer.frozen_copy()
    with torch.no_grad():
        path = rl.rollout(restorer, *rl.draw(restorer, lq, 5, gen), 0.5)
        for p in restorer.weights():
            p += 0.02 * torch.randn(p.shape, generator=gen)
    t, eps = rl.draw_noise(restorer, lq, gen)
    return restorer, reference, rl.Config(eta=0.5, sft_coef=0.3, kl_coef=0.2), {
        "path": path, "weight": torch.tensor([0.0, 0.3, 1.0]), "t": t, "eps": eps,
        "z0": restorer.encode(lq.flip(3), lq), "advantage": torch.randn(3, 5, generator=gen)}


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
