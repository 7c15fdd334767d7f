"""Measures restorers on held-out photographs or pairs: tables, paired differences, pictures.

  judge, judge2  rewards without reference, in [0, 1]; judge2 never serves as a reward
  psnr_y         -10 log10 mean (x - y)^2 in dB, on Y of ITU-R BT.601 (MATLAB's rgb2ycbcr)
  psnr, ssim     on RGB; ssim: Wang et al. 2004, Gaussian window 11, sigma 1.5
  color_step     mean step between neighbouring pixels of (image minus its grey value), in levels
                 of 255: the fine color noise that PSNR-Y, SSIM and many judges do not see
  pyiqa:NAME     metrics with published parameters: lpips, dists (with reference), brisque, niqe
  mean ± error   over images, after the mean over sampler seeds; error: std / sqrt(images)
  minus          difference to the first model on the same images and noise, 95 % interval

Chosen here:
 1. All models get the same noise, drawn from (seed, number of the batch's first image), so that
    differences are paired.
 2. brisque and niqe say nothing about a crop of 64 pixels: images under 192 pixels, if all of one
    size, are laid out as one mosaic per model, with one score; its seams are in it for all models.
 3. Images are rounded to 8 bits; --border pixels are cut for psnr_y, psnr and ssim: compare only
    numbers with the same border, which alone moves PSNR by up to 1 dB.
 4. The sampler's own front (--front): what the first model reaches with other numbers of steps and
    other eta, without training. RL is worth its price only beyond it, at the same PSNR-Y.

    python eval.py weights/sr runs/sr-0/model                        # laptop: two restorers
    python eval.py runs/a/model runs/b/model --lq DIR --hq DIR --size 0 --out runs/pairs   # GPU
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from tqdm import tqdm

from data import get_task, held_out, open_split, whole
from model import load
from reward import load as load_reward
from reward import psnr, psnr_y, ready, ssim
from sample import restore
from utils import (UserError, atomic, generator, new_run, option, parse, pick_device, run_main,
                   to_uint8, write_rows)

INSTRUMENTS = ["judge", "judge2", "pyiqa:lpips", "pyiqa:brisque"]  # in every table
OF_SETS = ("pyiqa:brisque ↓", "pyiqa:niqe ↓")                      # need 192 pixels or more
FIDELITY = {"psnr_y": psnr_y, "psnr": psnr, "ssim": ssim}
FRONT = ((0.75, 1), (1.125, 1), (1.25, 1), (1.5, 1), (2, 1), (1, 2), (1, 0.5), (1, 0))
PIXELS = 2 ** 20  # that are restored at once
REGION = 160      # pixels, side of what the picture shows of a photograph


# ---- metrics ----

def color_step(images, refs=None):
    """Mean step between neighbouring pixels of image minus grey value, in levels of 255.

    (B, 3, H, W) in [-1, 1] -> (B,).
    """
    color = images - images.mean(1, keepdim=True)
    down, right = color.diff(dim=2).abs(), color.diff(dim=3).abs()
    return 127.5 * torch.cat([down.flatten(1), right.flatten(1)], 1).mean(1)


def load_metrics(names, device, loaded=None):
    """{name: metric(images, refs) -> (B,)}, each in its own direction; ↓: lower is better.

    lpips and brisque are left out where they would have to be fetched, which a line says.
    loaded: {name: reward} of those that need not be loaded again.
    """
    metrics, loaded = {}, loaded or {}
    for name in names:
        if not ready(name.removeprefix("pyiqa:")):
            print(f"{name}: left out, its parameters are not here (reward.py would fetch them)")
            continue
        metric = loaded.get(name) or load_reward(name, device)
        if getattr(metric, "sign", 1) < 0:
            metrics[f"{name} ↓"] = lambda images, refs, metric=metric: -metric(images, refs)
        else:
            metrics[name] = metric
    return metrics


def mosaic(images):
    """(N, 3, S, S) -> one image (1, 3, rows S, columns S) of them, without an unfinished row."""
    columns = math.isqrt(len(images))
    rows = [torch.cat([*row], 2) for row in images.split(columns) if len(row) == columns]
    return torch.cat(rows, 1)[None]


@torch.no_grad()
def measure(metrics, images, refs, border=0):
    """Scores of lists of batches (B, 3, H, W): {name: (N,)}, or (1,) where all have one score."""
    images = [to_uint8(x).float() / 127.5 - 1 for x in images]  # as a file has them
    small = max(images[0].shape[2:]) < 192 and len({x.shape[1:] for x in images}) == 1
    scores = {}
    for name, metric in (metrics | FIDELITY | {"color_step ↓": color_step}).items():
        pairs = list(zip(images, refs))
        if small and name in OF_SETS:
            pairs = [(mosaic(torch.cat(images)), mosaic(torch.cat(refs)))]
        elif name in FIDELITY and border:
            cut = (..., slice(border, -border), slice(border, -border))
            pairs = [(x[cut], y[cut]) for x, y in pairs]
        scores[name] = torch.cat([metric(x, y).float().cpu() for x, y in pairs])
    return scores


def in_batches(lq, hq, device):
    """(N, 3, H, W) twice -> [(lq, hq)] of 32 each, or as many as memory has room for."""
    part = max(1, min(32, PIXELS // (lq.shape[2] * lq.shape[3])))
    return list(zip(lq.to(device).split(part), hq.to(device).split(part)))


def evaluate(restorer, batches, metrics, steps=0, eta=-1.0, seeds=1, border=0):
    """Restores and scores batches, a list of (lq, hq), (B, 3, H, W) each in [-1, 1].

    restorer None: lq itself. steps 0, eta -1: as it was trained. -> (scores: {name: (N,)}, means
    over the seeds; images: the restored batches of the first seed, or lq).
    """
    if restorer is None:
        images = [lq for lq, _ in batches]
        return measure(metrics, images, [hq for _, hq in batches], border), images
    runs, first = [], None
    for seed in range(seeds):
        images, number = [], 0
        for lq, _ in batches:
            noise = generator(seed, 8, number)
            images.append(restore(restorer, lq, steps, eta, noise))
            number += len(lq)
        runs.append(measure(metrics, images, [hq for _, hq in batches], border))
        first = first or [x.cpu() for x in images]
    return {name: torch.stack([run[name] for run in runs]).nanmean(0) for name in runs[0]}, first


def compare(restorers, batches, metrics, steps=0, eta=-1.0, seeds=3, border=0, front=()):
    """{row: {metric: (N,)}} of lq, each of `restorers` (name -> restorer), and hq.

    front: shares of the steps and of eta, at which the first restorer is measured, too.
    """
    tested = {"lq": (None, 0, 0.0)}
    tested |= {name: (restorer, steps, eta) for name, restorer in restorers.items()}
    base, first = next(iter(restorers.items()))
    count, noise = first.settle(steps, eta)
    for share, other in front:
        n, x = round(share * count), other * noise
        if (n, x) != (count, noise):
            tested[f"{base}, {n} steps, eta {x}"] = (first, *first.settle(n, x))
    rows = {}
    bar = tqdm(tested.items(), "eval", unit="model")
    for name, (restorer, n, x) in bar:
        bar.set_postfix_str(name)
        rows[name], _ = evaluate(restorer, batches, metrics, n, x, seeds, border)
    rows["hq"], _ = evaluate(None, [(hq, hq) for _, hq in batches], metrics)
    rows["hq"] = {key: x for key, x in rows["hq"].items() if key not in FIDELITY}
    return rows


# ---- tables ----

def mean_error(values):
    """(mean, standard error) of (N,), NaN left out; the error is NaN for fewer than two."""
    values = values[~values.isnan()]
    error = values.std().item() / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return values.mean().item(), error


def interval(values, others):
    """(mean, half width of its 95 % interval) of a paired difference, by Student's t."""
    from scipy.stats import t
    mean, error = mean_error(values - others)
    count = int((~(values - others).isnan()).sum())
    return mean, t.ppf(0.975, count - 1) * error if count > 1 else math.nan


def cell(mean, width, sign=""):
    """"0.123 ± 0.004", without the second half where it is not known."""
    digits = 2 if abs(mean) >= 1 or width >= 0.1 else 4
    text = f"{mean:{sign}.{digits}f}"
    return text if math.isnan(width) else f"{text} ± {width:.{digits}f}"


def markdown(corner, columns, lines):
    """A table; lines: {its first cell: {column: text}}."""
    text = [f"| {corner} | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, cells in lines.items():
        text.append(f"| {name} | " + " | ".join(cells.get(key, "-") for key in columns) + " |")
    return "\n".join(text)


def format_table(rows):
    """{row: {metric: (N,)}} -> Markdown: mean ± standard error over the images."""
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    lines = {name: {key: cell(*mean_error(x)) for key, x in row.items()}
             for name, row in rows.items()}
    return markdown("", columns, lines)


def format_differences(rows, base, names):
    """Markdown: each of `names` minus `base`, mean ± half of its 95 % interval; also of the means
    of several restorers, over these."""
    lines, means = {}, {key: [] for key in rows[base]}
    for name in names:
        lines[name] = {}
        for key, others in rows[base].items():
            lines[name][key] = cell(*interval(rows[name][key], others), "+")
            if not name.startswith(f"{base}, "):  # not of the front
                means[key].append(mean_error(rows[name][key] - others)[0])
    count = len(next(iter(means.values())))
    if count > 1:
        lines[f"mean of {count}, 95 % over them"] = {
            key: cell(*interval(torch.tensor(x), torch.zeros(count)), "+")
            for key, x in means.items()}
    return markdown(f"minus {base}, 95 %", list(rows[base]), lines)


def write_scores(path, rows, names):
    """A CSV with a line for each row of the table and image, and one for scores of the set."""
    lines = []
    for row, scores in rows.items():
        for i, image in enumerate(names):
            values = {key: x[i].item() for key, x in scores.items() if len(x) == len(names)}
            lines.append({"row": row, "image": image} | values)
        together = {key: x.item() for key, x in scores.items() if len(x) != len(names)}
        lines.append({"row": row, "image": "all together"} | together)
    write_rows(path, lines)


def gain_on_front(points, psnr_drop):
    """The largest gain of the sampler's front at a drop of PSNR-Y, dB; NaN beyond its reach.

    points: (drop, gain) of other steps and eta, a drop below 0 is a gain of PSNR-Y; two of them
    mixed, some images by one and some by the other, give all that lies between.
    """
    front = [(0.0, 0.0), *points]
    if psnr_drop > max(drop for drop, _ in front):
        return math.nan
    gains = [gain for drop, gain in front if drop <= psnr_drop]
    gains += [low + (high - low) * (psnr_drop - near) / (far - near)
              for near, low in front for far, high in front if near <= psnr_drop < far]
    return max(gains, default=math.nan)


def format_front(rows, base, others, names, key="pyiqa:lpips ↓"):
    """A line for each of `names`: its gain of LPIPS beside the front's at the same PSNR-Y."""
    def change(name):
        return [mean_error(rows[base][k] - rows[name][k])[0] for k in ("psnr_y", key)]
    points, lines = [change(name) for name in others], []
    for name in names:
        drop, gain = change(name)
        front = gain_on_front(points, drop)
        times = f", {gain / front:.1f} times" if front > 0 else ""
        reach = "ends before" if math.isnan(front) else f"{front:.4f}{times}"
        lines.append(f"{name}: {key} gains {gain:.4f} at {-drop:+.2f} dB of psnr_y; the sampler's "
                     f"own front {reach}")
    return "\n".join(lines)


def describe(rows, names):
    """The tables of `compare` as text; names: of the restorers, the first is the baseline."""
    base, *others = names
    front = [name for name in rows if name.startswith(f"{base}, ")]
    parts = [format_table(rows)]
    if others or front:
        parts.append(format_differences(rows, base, others + front))
    if front and "pyiqa:lpips ↓" in rows[base]:
        parts.append(format_front(rows, base, front, others))
    return "\n\n".join(parts)


# ---- pictures ----

def save_figure(path, figure):
    with atomic(path) as temporary:
        figure.savefig(temporary)


def save_grid(path, columns, captions=None):
    """Images side by side: columns {label: n images (3, H, W)}; captions {label: n strings}."""
    from matplotlib.figure import Figure
    count = len(next(iter(columns.values())))
    figure = Figure((2.4 * len(columns), 2.6 * count + 0.3), dpi=110, layout="compressed")
    axes = figure.subplots(count, len(columns), squeeze=False)
    for axis, (label, images) in zip(axes.T, columns.items()):
        axis[0].set_title(label, fontsize=10)
        for row, image in enumerate(images):
            pixels = to_uint8(image).permute(1, 2, 0).cpu().numpy()
            axis[row].imshow(pixels, interpolation="nearest")
            axis[row].set(xticks=[], yticks=[])
            if captions and label in captions:
                axis[row].set_xlabel(captions[label][row], fontsize=7)
    save_figure(path, figure)


def save_curves(path, rows, x):
    """A small plot of every column of `rows`, a list of dicts, over the column x."""
    from matplotlib.figure import Figure
    keys = [key for key in dict.fromkeys(k for row in rows for k in row) if key != x]
    figure = Figure((13, 2.2 * math.ceil(len(keys) / 4)), dpi=90, layout="constrained")
    axes = figure.subplots(math.ceil(len(keys) / 4), 4, squeeze=False).flatten()
    for axis, key in zip(axes, keys):
        points = [(row[x], row[key]) for row in rows if key in row]
        axis.plot(*zip(*points), marker=".")
        axis.set_title(key, fontsize=9)
        axis.grid(alpha=0.3)
    for axis in axes[len(keys):]:
        axis.set_visible(False)
    save_figure(path, figure)


def hardest_region(lq, hq, side=REGION):
    """(top, left) of the square where lq and hq, (1, 3, H, W), differ most on average."""
    change = F.avg_pool2d((lq - hq).abs().mean(1, keepdim=True), 8)
    change = F.avg_pool2d(change, side // 8, stride=1)[0, 0]
    top, left = divmod(int(change.argmax()), change.shape[1])
    return min(8 * top, lq.shape[2] - side), min(8 * left, lq.shape[3] - side)


def save_regions(path, source, degrade, restorers, judge, steps=0, eta=-1.0):
    """Picture: of up to five whole images the region where lq and hq differ most, lq | models | hq.

    judge: its scores stand below; a line says where it prefers a restoration to hq.
    """
    columns = {label: [] for label in ("lq", *restorers, "hq")}
    captions = {label: [] for label in columns}
    for index in range(min(5, len(source))):
        lq, hq = whole(source, degrade, index)
        first = next(iter(restorers.values()))
        side = min(max(REGION, first.defaults["size"]), *hq.shape[2:])
        top, left = hardest_region(lq, hq, side)
        device = first.device
        lq, hq = (x[..., top:top + side, left:left + side].to(device) for x in (lq, hq))
        shown = {"lq": lq}
        for label, restorer in restorers.items():
            shown[label] = restore(restorer, lq, steps, eta, generator(0, 9, index))
        best = judge(hq, hq).item()
        for label, image in (shown | {"hq": hq}).items():
            score = judge(image, hq).item()
            fidelity = "" if label == "hq" else f"  {psnr_y(image, hq).item():.1f} dB"
            fooled = "\njudge prefers it to hq" if score > best else ""
            columns[label].append(image[0])
            captions[label].append(f"judge {score:.2f}{fidelity}{fooled}")
    save_grid(path, columns, captions)


@dataclass
class Config:
    """Compares saved restorers; the first one is the baseline."""
    # what
    task: str = option("", "degradation, see data.py; empty: that of the first model")
    data: str = option("", "folder of photographs; empty: those inside the packages")
    lq: str = option("", "folder of low-quality images, with --hq: pairs instead of a task")
    hq: str = option("", "folder of their ground truth")
    match: str = option("same", "how names belong: same, prefix, suffix:LQ,HQ or start:LQ,HQ")
    split: str = option("test", "of the photographs or pairs", ["test", "val", "train", "all"])
    count: int = option(128, "images at most", least=1)
    size: int = option(-1, "side of a crop in pixels; 0: whole images; -1: as trained", least=-1)
    # how
    steps: int = option(0, "DDIM steps, up to 1000; 0: as each was trained", least=0)
    eta: float = option(-1.0, "stochasticity, 0: none; -1: as each was trained", least=-1)
    seeds: int = option(3, "sampler seeds", least=1)
    metrics: list = option(INSTRUMENTS, "besides psnr_y, psnr, ssim and color_step")
    border: int = option(0, "pixels cut off each side for psnr_y, psnr and ssim", least=0)
    front: bool = option(False, "also the first model with other steps and eta")
    dtype: str = option("float32", "arithmetic of the network", ["bfloat16", "float32"])
    out: str = option("", "folder for table.md, scores.csv and regions.png; empty: none is written")


def main():
    cfg, folders = parse(Config, positional="folders of saved restorers")
    out = new_run(cfg.out) if cfg.out else None
    device = pick_device()
    restorers = {name: load(name, device=device, dtype=cfg.dtype) for name in folders}
    degrade = None if cfg.lq else get_task(cfg.task or restorers[folders[0]].defaults["task"])
    size = (restorers[folders[0]].defaults["size"] or 64) if cfg.size < 0 else cfg.size
    if 0 < size < 16:
        raise UserError(f"--size {size}: must be 0, whole images, or at least 16")
    source = open_split(cfg, cfg.split)
    if size:
        lq, hq, names = held_out(source, degrade, size, cfg.count)
        batches = in_batches(lq, hq, device)
    else:
        count = min(cfg.count, len(source))
        chosen = [i * len(source) // count for i in range(count)]  # from all of its folders
        names = [source.names[i] for i in chosen]
        batches = [[x.to(device) for x in whole(source, degrade, i)] for i in chosen]
    metrics = load_metrics(cfg.metrics, device)
    rows = compare(restorers, batches, metrics, cfg.steps, cfg.eta, cfg.seeds, cfg.border,
                   FRONT if cfg.front else ())
    text = f"{len(names)} images, {cfg.seeds} sampler seeds, 8 bit, border {cfg.border}\n\n"
    text += describe(rows, folders)
    print(text)
    if out:
        with atomic(out / "table.md") as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")
        write_scores(out / "scores.csv", rows, names)
        judge = metrics.get("judge") or load_reward("judge", device)
        save_regions(out / "regions.png", source, degrade, restorers, judge, cfg.steps, cfg.eta)
        print(f"wrote {out}/table.md, scores.csv, regions.png")


if __name__ == "__main__":
    run_main(main)
