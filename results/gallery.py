"""One HTML page of what RL changed: before and after behind a slider, the worst cases first.

Whole photographs, restored by the SFT restorer and by the run's with the same noise, are cut into
squares, sorted by the change of LPIPS (of the judge, where LPIPS is not here). The slider is moved
by arrow keys, too; beside it any of lq, SFT, RL and hq. The page holds all images, as PNG.

    python results/gallery.py runs/sr-154 --out runs/gallery.html       # laptop, a minute
    python results/gallery.py runs/sr-154 runs/sr-155 --side 256 --data DIR           # GPU
"""

import base64
import html
import io
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data import get_task, open_split, whole  # noqa: E402
from eval import load_metrics, measure  # noqa: E402
from model import load, read_json  # noqa: E402
from sample import restore  # noqa: E402
from utils import UserError, atomic, generator, option, parse  # noqa: E402
from utils import pick_device, run_main, to_uint8  # noqa: E402

KINDS, SHOWN = ("lq", "SFT", "RL", "hq"), {"SFT": "left", "RL": "right"}
STYLE = """
:root { color-scheme: light dark }
body { font: 16px/1.4 system-ui, sans-serif; margin: 1rem auto; max-width: 76rem }
main { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(24rem, 1fr)) }
article { border: 1px solid #8888; padding: .6rem } td, th { text-align: right }
.stack { display: grid } .stack img { grid-area: 1 / 1; width: 100%; visibility: hidden }
.stack .left, .stack .right { visibility: visible }
.stack .left:not(.right) { z-index: 1; clip-path: inset(0 calc(100% - var(--cut, 50%)) 0 0) }
input, table { width: 100%; font-size: .8rem }
"""
SCRIPT = """
for (const one of document.querySelectorAll("article")) {
  const stack = one.querySelector(".stack"), range = one.querySelector("input");
  const sides = [...one.querySelectorAll("select")];
  one.addEventListener("input", () => {
    stack.style.setProperty("--cut", range.value + "%");
    for (const image of stack.children) image.className = ["left", "right"].filter(
      (_, i) => sides[i].value === image.dataset.kind).join(" ");
  });
}
"""


def encode(image):
    """(3, H, W) in [-1, 1] -> a data URL of its PNG."""
    file = io.BytesIO()
    Image.fromarray(to_uint8(image).permute(1, 2, 0).cpu().numpy()).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def squares(image, side):
    """(1, 3, H, W) -> [(top, left, square)] of its disjoint squares; side 0: the whole."""
    height, width = image.shape[2:]
    high, wide = (min(side or length, length) for length in (height, width))
    return [(y, x, image[..., y:y + high, x:x + wide])
            for y in range(0, height - high + 1, high) for x in range(0, width - wide + 1, wide)]


def cases_of(run, cfg):
    """[{"name", "images": {kind: (3, h, w)}, "scores": {kind: {metric: (1,)}}}] of a run."""
    had = SimpleNamespace(**read_json(Path(run, "config.json")))
    if not Path(run, "model").is_dir() or not hasattr(had, "eta"):
        raise UserError(f"{run}: no finished run of rl.py")
    if cfg.data:
        had.data, had.lq, had.hq = cfg.data, "", ""
    source, device, cases = open_split(had, "test"), pick_device(), []
    restorers = {"SFT": load(had.model, had.task, device), "RL": load(f"{run}/model", "", device)}
    metrics = load_metrics(["judge", "judge2", "pyiqa:lpips"], device)
    for index in range(min(cfg.count, len(source))):
        lq, hq = (x.to(device) for x in whole(source, get_task(had.task), index))
        shown = {"lq": lq, "hq": hq}
        for kind, restorer in restorers.items():
            shown[kind] = restore(restorer, lq, had.steps, had.eta, generator(0, 9, index))
        cut = {kind: squares(shown[kind], cfg.side) for kind in KINDS}
        for i, (y, x, truth) in enumerate(cut["hq"]):
            images = {kind: cut[kind][i][2] for kind in KINDS}
            scores = {kind: measure(metrics, [z], [truth]) for kind, z in images.items()}
            cases.append({"name": f"{run}: {source.names[index]} at {y}, {x}", "scores": scores,
                          "images": {kind: z[0] for kind, z in images.items()}})
    return cases


def harm(case):
    """How much worse RL is than SFT: the rise of LPIPS, or else the fall of the first metric."""
    sft, rl = case["scores"]["SFT"], case["scores"]["RL"]
    key = "pyiqa:lpips ↓" if "pyiqa:lpips ↓" in sft else next(iter(sft))
    return (rl[key] - sft[key]).item() * (1 if key.endswith("↓") else -1)


def article(case):
    """A case as HTML; without JavaScript it shows one half of SFT and one of RL."""
    name, scores, choices, rows = html.escape(case["name"]), case["scores"], "", ""
    images = "".join(f'<img data-kind="{kind}" class="{SHOWN.get(kind, "")}" alt="{kind}, {name}" '
                     f'src="{encode(image)}">' for kind, image in case["images"].items())
    for chosen, side in SHOWN.items():
        options = [f"<option{' selected' * (kind == chosen)}>{kind}</option>" for kind in KINDS]
        choices += f"<label>{side} <select>{''.join(options)}</select></label> "
    for key, before in scores["SFT"].items():
        cells = [f"{scores[kind][key].item():.4g}" for kind in KINDS]
        cells.append(f"{(scores['RL'][key] - before).item():+.3g}")
        rows += f"<tr><th>{html.escape(key)}</th><td>{'</td><td>'.join(cells)}</td></tr>"
    head = "</th><th>".join(("", *KINDS, "RL minus SFT"))
    return (f'<article><b>{name}</b><div class="stack">{images}</div>'
            f'<input type="range" value="50" aria-label="width of the left image, {name}">'
            f"<p>{choices}</p><table><tr><th>{head}</th></tr>{rows}</table></article>\n")


def page(cases):
    """The whole file; worst cases first."""
    cases, worse = sorted(cases, key=harm, reverse=True), sum(harm(case) > 0 for case in cases)
    return ('<!DOCTYPE html>\n<html lang="en"><meta charset="utf-8"><title>SFT and RL</title>'
            f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style>\n'
            f"<h1>SFT and RL</h1><p>Worst first: {worse} of {len(cases)} squares got worse. "
            "Metrics marked ↓ are better when low.</p>\n"
            f"<main>{''.join(map(article, cases))}</main><script>{SCRIPT}</script></html>\n")


@dataclass
class Config:
    """Writes an HTML page from run folders of rl.py."""
    out: str = option("runs/gallery.html", "the page")
    data: str = option("", "folder of photographs; empty: that of each run")
    count: int = option(8, "photographs of a run, at most", least=1)
    side: int = option(192, "of the squares in pixels; 0: whole photographs", least=0)


def main():
    cfg, runs = parse(Config, positional="folders of runs")
    if Path(cfg.out).exists():
        raise UserError(f"--out {cfg.out}: is there already; choose another")
    cases = [case for run in runs for case in cases_of(run, cfg)]
    with atomic(cfg.out) as temporary:
        temporary.write_text(page(cases), encoding="utf-8", errors="backslashreplace")
    print(f"wrote {cfg.out}: {len(cases)} squares")


if __name__ == "__main__":
    run_main(main)
