"""The page of results/gallery.py: its images, its order, nothing from outside; in a browser."""

import base64
import io
import json
import re
import shutil
import subprocess
from dataclasses import asdict

import gallery
import numpy as np
import pytest
import torch
from PIL import Image

import rl
from utils import UserError

BROWSER = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
COLORS = {"lq": (255, 0, 0), "SFT": (0, 255, 0), "RL": (0, 0, 255), "hq": (255, 255, 0)}


def test_a_page_is_whole_and_has_the_worst_first(tmp_path, photo_folder, tiny_restorer,
                                                 monkeypatch, command, capsys):
    run = tmp_path / "run"
    tiny_restorer().save(tmp_path / "start")
    other = tiny_restorer()
    with torch.no_grad():
        other.weights()[0].mul_(1.5)
    other.save(run / "model")
    cfg = rl.Config(model=str(tmp_path / "start"), data=str(photo_folder), steps=4, eta=0.5)
    (run / "config.json").write_text(json.dumps(asdict(cfg)), encoding="utf-8")
    monkeypatch.setattr(gallery, "load_metrics", lambda names, device: {
        "pyiqa:lpips ↓": lambda x, y: (x - y).abs().mean((1, 2, 3))})
    command(gallery, run, "--side", 40, "--out", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    images = re.findall(r'<img data-kind="(\w+)"[^>]* alt="\1[^"]*"[^>]* '
                        r'src="data:image/png;base64,([^"]*)"', page)
    assert [kind for kind, _ in images] == 4 * list(gallery.KINDS)
    assert "4 squares" in capsys.readouterr().out
    pixels = []
    for _, data in images:
        with Image.open(io.BytesIO(base64.b64decode(data))) as file:
            assert file.size == (40, 40)
            pixels.append(np.asarray(file).astype(float))

    def harm(square):
        sft, new, hq = (pixels[4 * square + gallery.KINDS.index(x)] for x in ("SFT", "RL", "hq"))
        return abs(new - hq).mean() - abs(sft - hq).mean()
    harms = [harm(i) for i in range(4)]
    assert harms == sorted(harms, reverse=True) and len(set(harms)) == 4
    assert f"Worst first: {sum(x > 0 for x in harms)} of 4 squares" in page
    plain = re.sub(r'src="data:[^"]*"', "", page)  # nothing is fetched
    fetching = r"src=|srcset=|href=|action=|url\(|@import|<link|<iframe|fetch|http"
    assert not re.search(fetching, plain)
    assert len(re.findall('<input type="range"[^>]*aria-label="[^"]+"', plain)) == 4
    with pytest.raises(UserError, match="is there already"):
        command(gallery, run, "--out", tmp_path / "page.html")
    with pytest.raises(UserError, match="no finished run"):
        command(gallery, tmp_path, "--out", tmp_path / "x")
    (run / "config.json").write_text('{"steps": 9}', encoding="utf-8")  # as sft.py leaves it
    with pytest.raises(UserError, match="no finished run"):
        command(gallery, run, "--out", tmp_path / "x")


def test_without_lpips_the_first_metric_decides():
    scores = {"SFT": {"judge": torch.tensor([0.5])}, "RL": {"judge": torch.tensor([0.3])}}
    assert gallery.harm({"scores": scores}) == pytest.approx(0.2)


def seen(folder, actions):
    """{kind: share of the slider's picture} in a screenshot after JavaScript `actions`."""
    images = {kind: torch.tensor(color).view(3, 1, 1).expand(3, 64, 64) / 127.5 - 1
              for kind, color in COLORS.items()}
    scores = {kind: {"psnr": torch.tensor([20.0])} for kind in COLORS}
    text = gallery.page([{"name": "<a> & b", "images": images, "scores": scores}])
    page, shot = folder / "page.html", folder / "shot.png"
    page.write_text(f"{text}<script>{actions}</script>", encoding="utf-8")
    subprocess.run([BROWSER, "--headless", f"--screenshot={shot}", "--no-sandbox", "--disable-gpu",
                    f"--user-data-dir={folder / 'profile'}", "--window-size=900,900",
                    page.as_uri()], capture_output=True, timeout=120)
    if not shot.exists():
        pytest.skip(f"{BROWSER} takes no screenshot here")
    with Image.open(shot) as file:
        pixels = np.asarray(file.convert("RGB")).astype(int)
    counts = {kind: (abs(pixels - color).max(2) < 40).sum() for kind, color in COLORS.items()}
    return {kind: count / max(sum(counts.values()), 1) for kind, count in counts.items()}


@pytest.mark.skipif(BROWSER is None, reason="no chromium or google-chrome on PATH")
def test_in_a_browser_the_slider_and_the_choices_show_what_they_say(tmp_path):
    half = {"lq": 0, "SFT": 0.5, "RL": 0.5, "hq": 0}
    assert seen(tmp_path, "") == pytest.approx(half, abs=0.02)
    moved = seen(tmp_path, """
        const range = document.querySelector("input");
        const right = document.querySelectorAll("select")[1];
        range.value = 25; right.value = "hq";
        for (const x of [range, right]) x.dispatchEvent(new Event("input", {bubbles: true}));""")
    assert moved == pytest.approx({"lq": 0, "SFT": 0.25, "RL": 0, "hq": 0.75}, abs=0.02)
