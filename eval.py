"""Measures saved restorers on held-out photographs, or on pairs on disk: tables, paired differences, pictures.

  judge, judge2   rewards without reference, in [0, 1]; judge2 never serves as a reward, so it shows reward hacking
  psnr            -10 log10 mean (x - y)^2 in dB, x and y in [0, 1]; ssim: Wang et al. 2004, Gaussian window 11, sigma
                  1.5 (reward.ssim). On RGB, or on Y of ITU-R BT.601 YCbCr (MATLAB's rgb2ycbcr), without a border
  diversity       standard deviation over sampler seeds of each pixel, mean over pixels and colors, in levels of 255
  judge spread    standard deviation over sampler seeds of the judge's score: what RL can choose among
  pyiqa:NAME      any metric of pyiqa, its own sign, an arrow for its better direction
  mean ± error    over images, after the mean over sampler seeds; error: std / sqrt(images)
  difference      of two models on the same images and noise: mean and its 95 % interval, t_{0.975, n - 1} std / sqrt(n)

Chosen here:
 1. Each image has noise generators of its own, from (seed, index): a result depends neither on the batch size nor on
    which other images are measured, and two models see the same noise, so that their difference is paired.
 2. A model is sampled with the steps and the eta it was trained with, unless flags say otherwise.
 3. Color and border follow the literature of each task (CONVENTIONS) and are printed with every table, because they
    alone move PSNR by more than 1 dB. The script measures 8-bit images, as papers do; `evaluate`, which the trainings
    call, takes floats without a border: psnr_y on Y, psnr and ssim on RGB.
 4. Whole images go through tiles (sample.restore). The shipped judges learned crops of 64 x 64, so they score a whole
    image as the mean over its disjoint 64 x 64 tiles.
 5. For sr, lq has been enlarged bicubically, unless pairs have equal sizes: the row "lq" is the bicubic baseline, and
    is called so.

    python eval.py weights/sr runs/sr/model                       # laptop: two restorers in one table and picture
    python eval.py runs/table/*                                   # runs of rl.py named NAME-SEED: mean over seeds
    python eval.py --task denoise25 --hq ~/CBSD68                 # whole images; pairs: --lq DIR --hq DIR --match RULE
    python eval.py runs/a/model runs/b/model --dataset sots --root ~/SOTS/outdoor --device cuda --seeds 5 --workers 8
"""

import functools
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import torch

CROPS = 128  # of the held-out photographs, unless a flag says otherwise
CONVENTIONS = {"sr": ("y", 4), "derain": ("y", 0)}  # task -> color, border (for sr the scale); others: RGB, whole


@torch.no_grad()
def score(restorer, lq, hq, metrics, steps, eta, seeds, first=0, tile=0):
    """Restores a batch once per seed and scores it. restorer None: scores lq itself.

    lq, hq: (B, 3, H, W) in [-1, 1], images number `first` and following of their set, which decides their noise.
    tile: largest side that the network sees at once, 0: any. metrics: name -> metric(images, refs) -> (B,).
    Returns (scores, samples): scores[name] is (seeds, B), samples (seeds, B, 3, H, W); lq counts as one seed.
    """
    from sample import restore
    from utils import generator

    samples = [lq]
    if restorer is not None:
        numbers = range(first, first + len(lq))
        samples = [restore(restorer, lq, steps, eta, [generator(seed, 5, i) for i in numbers], tile or 2 ** 30)
                   for seed in seeds]
    scores = {name: torch.stack([metric(image, hq).float().cpu() for image in samples])
              for name, metric in metrics.items()}
    return scores, torch.stack(samples)


def evaluate(restorer, lq, hq, judges, steps, eta, seeds, batch=32, first=0):
    """Scores of crops (N, 3, H, W) in [-1, 1] by judges (name -> reward(images, refs) -> (N,)), psnr_y, psnr and ssim.

    first: number of lq[0] in its set, from which its noise follows.
    Returns (scores, images): scores[name] is (N,), the mean over seeds, and images (N, 3, H, W) of the first seed.
    """
    from reward import psnr, psnr_y, ssim
    metrics = {**judges, "psnr_y": psnr_y, "psnr": psnr, "ssim": ssim}
    parts = [score(restorer, lq[i:i + batch], hq[i:i + batch], metrics, steps, eta, seeds, first + i)
             for i in range(0, len(lq), batch)]
    return ({name: torch.cat([scores[name].mean(0) for scores, _ in parts]) for name in metrics},
            torch.cat([samples[0] for _, samples in parts]))


def shaved(images, color, border):
    """What psnr and ssim look at: 8 bit, without `border` pixels at each side. (B, 3, H, W) in [-1, 1] -> the same
    range; color "y": Y of YCbCr in all three channels, "rgb": as it is."""
    from data import round_8bit
    from reward import luma
    height, width = images.shape[-2:]
    x = round_8bit(images)[..., border:height - border, border:width - border]
    return x if color == "rgb" else (2 * luma(x) - 1).expand(-1, 3, -1, -1)


def reference_metrics(color, border):
    """{"psnr": f, "ssim": f} on Y or RGB without a border; f(images, refs) -> (B,)."""
    import reward
    return {name: lambda images, refs, metric=metric: metric(shaved(images, color, border), shaved(refs, color, border))
            for name, metric in (("psnr", reward.psnr), ("ssim", reward.ssim))}


def on_tiles(judge, side=64):
    """A judge of whole images: the mean of its scores over disjoint tiles of `side`, centred; smaller images as they
    are. The same contract, judge(images, refs) -> (B,)."""
    def mean(images, refs=None):
        count, _, height, width = images.shape
        rows, columns = height // side, width // side
        if not rows or not columns:
            return judge(images, refs)
        top, left = (height - rows * side) // 2, (width - columns * side) // 2
        x = images[..., top:top + rows * side, left:left + columns * side]
        x = x.unflatten(3, (columns, side)).unflatten(2, (rows, side)).permute(0, 2, 4, 1, 3, 5)  # (B, r, c, 3, s, s)
        return judge(x.flatten(0, 2)).view(count, -1).mean(1)
    return mean


def measure(models, batches, metrics, seeds, tile=256, on_hq=()):
    """Rows of a table, name -> metric -> (N,).

    models: name -> (restorer, steps, eta, mean row?); restorer None: lq. batches: (lq, hq) of (B, 3, H, W) in [-1, 1].
    More than one seed adds the diversity, the spread of the first of on_hq, and for models with a mean row the row
    "NAME, mean of k": the k samples averaged. on_hq: metrics that score the row "hq", without a reference.
    """
    rows, first = {}, 0

    def add(name, scores):
        for key, values in scores.items():
            rows.setdefault(name, {}).setdefault(key, []).append(values)

    for lq, hq in batches:
        for name, (restorer, steps, eta, with_mean) in models.items():
            scores, samples = score(restorer, lq, hq, metrics, steps, eta, seeds, first, tile)
            add(name, {key: values.mean(0) for key, values in scores.items()})
            if len(samples) > 1:
                add(name, {f"{key} spread": scores[key].std(0) for key in on_hq[:1]}
                    | {"diversity": samples.std(0).flatten(1).mean(1).cpu() * 127.5})
            if with_mean and len(samples) > 1:
                scores = score(None, samples.mean(0), hq, metrics, 0, 0, [0])[0]
                add(f"{name}, mean of {len(samples)}", {key: values[0] for key, values in scores.items()})
        add("hq", {key: metrics[key](hq, hq).float().cpu() for key in on_hq})
        first += len(lq)
    return {name: {key: torch.cat(values) for key, values in row.items()} for name, row in rows.items()}


def mean_se(values):
    """(mean, standard error of the mean) of a (N,) tensor, NaN (a judge's answer that could not be read) left out; the
    error is NaN for N = 1."""
    values = values[~values.isnan()]
    return values.mean().item(), (values.std().item() / math.sqrt(len(values)) if len(values) > 1 else math.nan)


def paired(values, others):
    """(mean, low, high) of the difference of two (N,) tensors on the same images: the 95 % interval of Student's t."""
    from scipy.stats import t
    difference = (values - others)[~(values - others).isnan()]
    mean, error = mean_se(difference)
    half = t.ppf(0.975, len(difference) - 1) * error if len(difference) > 1 else math.nan
    return mean, mean - half, mean + half


def gap_closed(model, start, goal):
    """Share of the way up from `start` to `goal` that `model` has gone: floats -> float, 1 = all of it; NaN where
    `goal` is not above `start`."""
    return (model - start) / (goal - start) if goal > start else math.nan


def said_of_gap(model, start, goal):
    """gap_closed in words: "gap closed 61%", or "no gap"; "gap closed nan%" where a score is NaN."""
    return "no gap" if goal <= start else f"gap closed {gap_closed(model, start, goal):.0%}"


def digits(column):
    """Decimals that a column is printed with."""
    return 2 if column.startswith(("psnr", "diversity")) else 4


def format_differences(rows, names):
    """Paired differences of names[1:] to names[0] -> Markdown lines, mean [low, high]; no lines for one name."""
    if len(names) < 2:
        return ""
    base, n = rows[names[0]], len(next(iter(rows[names[0]].values())))
    columns = [key for key in base if all(key in rows[name] for name in names)]
    lines = [f"| minus {names[0]}, 95 % interval, n = {n} | " + " | ".join(columns) + " |",
             "|---" * (len(columns) + 1) + "|"]
    for name in names[1:]:
        cells = ["{:+.{d}f} [{:+.{d}f}, {:+.{d}f}]".format(*paired(rows[name][key], base[key]), d=digits(key))
                 for key in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def summary(rows, names):
    """All means with their standard errors, then the paired differences of names[1:] to names[0], as rows of a CSV."""
    means = [{"model": name, "minus": "", "metric": key, "images": len(values)} | dict(zip(
        ("mean", "error"), mean_se(values))) for name, row in rows.items() for key, values in row.items()]
    return means + [{"model": name, "minus": names[0], "metric": key, "images": len(values)} | dict(zip(
        ("mean", "low", "high"), paired(values, rows[names[0]][key])))
        for name in names[1:] for key, values in rows[name].items()]


def format_table(rows):
    """{row name: {metric: (N,) tensor}} -> Markdown lines, mean ± standard error, "-" where nothing was measured, and
    how many scores were NaN and left out."""
    columns = list(dict.fromkeys(key for row in rows.values() for key in row))
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, row in rows.items():
        cells = []
        for column in columns:
            if column not in row:
                cells.append("-")
                continue
            mean, error = mean_se(row[column])
            lost, places = int(row[column].isnan().sum()), digits(column)
            cells.append(f"{mean:.{places}f} ± {error:.{places}f}" + (f" ({lost} NaN)" if lost else ""))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def save_grid(path, columns, captions=None):
    """Images side by side: a column per entry of `columns` (label -> (n, 3, H, W) in [-1, 1]), a row per image.

    captions: label -> n strings under the images, or None.
    """
    from matplotlib.figure import Figure

    from utils import atomic, to_uint8
    count = min(len(images) for images in columns.values())
    figure = Figure(figsize=(2.2 * len(columns), 2.35 * count + 0.3), dpi=110, layout="compressed")
    axes = figure.subplots(count, len(columns), squeeze=False)
    for column, (label, images) in enumerate(columns.items()):
        for row in range(count):
            axis = axes[row][column]
            axis.imshow(to_uint8(images[row]).permute(1, 2, 0).cpu().numpy(), interpolation="nearest")
            axis.set_xticks([]), axis.set_yticks([])
            if row == 0:
                axis.set_title(label, fontsize=10)
            if captions and label in captions:
                axis.set_xlabel(captions[label][row], fontsize=7)
    with atomic(path) as temporary:
        figure.savefig(temporary)


def busiest(a, b, side):
    """(top, left) of the square of `side` pixels where two images (3, H, W) differ most."""
    import torch.nn.functional as F
    change = F.avg_pool2d((a - b).abs().mean(0)[None, None].cpu(), side, stride=1)[0, 0]
    return divmod(int(change.argmax()), change.shape[1])


def with_inset(image, top, left, side, zoom=3):
    """(3, H, W) with the square at (top, left) framed and repeated `zoom` times larger in the corner away from it."""
    image = image.detach().clone()
    height, width = image.shape[1:]
    line = max(1, min(height, width) // 160)
    part = image[:, top:top + side, left:left + side].repeat_interleave(zoom, 1).repeat_interleave(zoom, 2)
    large = part.shape[1]
    y = 0 if top + side / 2 > height / 2 else height - large
    x = 0 if left + side / 2 > width / 2 else width - large
    for y0, x0, size, inside in ((top, left, side, image[:, top:top + side, left:left + side].clone()),
                                 (y, x, large, part)):
        image[:, y0:y0 + size, x0:x0 + size] = torch.tensor([1.0, 0.6, -1.0]).view(3, 1, 1)  # an orange frame
        image[:, y0 + line:y0 + size - line, x0 + line:x0 + size - line] = inside[:, line:-line, line:-line]
    return image


def save_curves(path, rows, x, keys):
    """One small plot per key over rows[x]; rows: dicts, a key may be missing or None in some."""
    from matplotlib.figure import Figure

    from utils import atomic
    wide = min(4, len(keys))
    high = math.ceil(len(keys) / wide)
    figure = Figure(figsize=(3.2 * wide, 2.4 * high), dpi=100, layout="constrained")
    axes = figure.subplots(high, wide, squeeze=False).flatten()
    for axis, key in zip(axes, keys):
        points = [(row[x], row[key]) for row in rows if row.get(key) is not None]
        axis.plot(*zip(*points) if points else ([], []), marker="." if len(points) < 60 else "")
        axis.set_title(key, fontsize=9), axis.tick_params(labelsize=7), axis.grid(alpha=0.3)
    for axis in axes[len(keys):]:
        axis.set_visible(False)
    with atomic(path) as temporary:
        figure.savefig(temporary)


def crop_errors(folder):
    """Standard errors over the crops of a run's scores.csv: {metric: of the change from SFT to RL}; {} without one."""
    import csv
    if not (folder / "scores.csv").exists():
        return {}
    with open(folder / "scores.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    scores = {(name, key): torch.tensor([float(row[key]) for row in rows if row["model"] == name], dtype=torch.float64)
              for name in ("sft", "rl") for key in ("judge", "judge2", "psnr_y", "ssim")}
    return {key: mean_se(scores["rl", key] - scores["sft", key])[1] for name, key in scores if name == "rl"}


def aggregate(folders):
    """Runs of rl.py, in folders named NAME-SEED -> Markdown, two tables with a row per NAME: the changes from SFT to
    RL, mean ± standard error over the runs, or over the crops where there is one run only; and the scores, means over
    the runs. gap closed is of the first judge. Raises UserError for a folder without a summary."""
    import json

    from utils import UserError
    groups, digits = {}, {"gap closed": 0, "judge": 3, "judge2": 3, "psnr_y": 2, "ssim": 4}
    for folder in map(Path, folders):
        try:
            runs = json.loads((folder / "summary.json").read_text())
            gap = runs["hq"]["judge"] - runs["sft"]["judge"]
            change = {key: runs["rl"][key] - runs["sft"][key] for key in digits if key != "gap closed"}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{folder}: no readable summary.json ({error}); give runs that rl.py has ended") from None
        error = crop_errors(folder)
        error |= {"gap closed": 100 * gap_closed(error["judge"], 0, gap)} if error else {}
        groups.setdefault(folder.name.rsplit("-", 1)[0], []).append(
            (runs, {"gap closed": 100 * gap_closed(change["judge"], 0, gap)} | change, error))

    changes = ["| run | seeds | gap closed, % | judge | judge2 | PSNR-Y, dB | SSIM |", "|---|---|---|---|---|---|---|"]
    scores = ["| run | judge: lq, SFT, RL, hq | judge2: lq, SFT, RL, hq | PSNR-Y: lq, SFT, RL | SSIM: lq, SFT, RL |",
              "|---|---|---|---|---|"]
    for name, group in groups.items():
        cells = []
        for key, places in digits.items():
            values = torch.tensor([change[key] for _, change, _ in group])
            error = mean_se(values)[1] if len(group) > 1 else group[0][2].get(key, math.nan)
            spread = f" ± {error:.{places}f}" if math.isfinite(error) else ""
            each = f" ({', '.join(f'{v:.{places}f}' for v in values)})"
            each = each if len(group) > 1 and key in ("gap closed", "psnr_y") else ""
            gone = key == "gap closed" and any(runs["hq"]["judge"] <= runs["sft"]["judge"] for runs, _, _ in group)
            cells.append("no gap" if gone else f"{values.mean():+.{places}f}{spread}{each}")
        changes.append(f"| {name} | {len(group)} | " + " | ".join(cells) + " |")
        means = {key: [sum(runs[row][key] for runs, _, _ in group) / len(group) for row in ("lq", "sft", "rl", "hq")
                       if group[0][0][row][key] is not None] for key in digits if key != "gap closed"}
        scores.append(f"| {name} | " + " | ".join(
            ", ".join(f"{value:.{digits[key]}f}" for value in row) for key, row in means.items()) + " |")
    return "\n".join(changes) + "\n\n" + "\n".join(scores)


@dataclass
class Config:
    # what is measured
    model: Annotated[list, "folders of saved restorers, as the plain arguments; the first is the baseline"] = field(
        default_factory=list)
    task: Annotated[str, "degradation, a key of data.TASKS, e.g. sr3 or denoise25; empty: the first model's"] = ""
    data: Annotated[str, "folder of photographs; empty: those inside the packages"] = ""
    split: Annotated[str, "of photographs: test (for tables) or val (for tuning)"] = "test"
    size: Annotated[int, "side of the crops of photographs in pixels; 0: whole photographs"] = 64
    lq: Annotated[str, "folder of low-quality images, with --hq: pairs instead of a task"] = ""
    hq: Annotated[str, "folder of ground truth, whole images; without --lq the task degrades them"] = ""
    match: Annotated[str, "same, prefix, rain, suffix:LQ,HQ or start:LQ,HQ: how names of lq and hq belong"] = "same"
    dataset: Annotated[str, "a key of data.DATASETS, instead of --lq, --hq and --match"] = ""
    root: Annotated[str, "folder of --dataset"] = "."
    count: Annotated[int, "images at most; 0: 128 crops, or all whole images"] = 0
    # how
    seeds: Annotated[int, "sampler seeds per image: 0, 1, ..."] = 3
    steps: Annotated[int, "DDIM steps; 0: as trained"] = 0
    eta: Annotated[float, "stochasticity of the sampler; -1: as trained"] = -1.0
    baselines: Annotated[bool, "also the first model with eta 0 and 1, and the mean of its samples"] = True
    judge: Annotated[str, "quality score shown first; none: no such score"] = "judge"
    judge2: Annotated[str, "independent quality score, never a reward; none: no such score"] = "judge2"
    metrics: Annotated[list, "further metrics, e.g. pyiqa:lpips pyiqa:niqe"] = field(default_factory=list)
    color: Annotated[str, "y, rgb, or auto: as the literature of the task; for psnr and ssim"] = "auto"
    border: Annotated[int, "pixels cut off each side for psnr and ssim; -1: as the literature of the task"] = -1
    # running
    tile: Annotated[int, "largest side in pixels that the network sees at once; 192 or more, see the README"] = 256
    workers: Annotated[int, "processes that decode whole images"] = 0
    out: Annotated[str, "folder for table.md, table.csv, scores.csv and comparison.png"] = "runs/eval"
    device: Annotated[str, "auto, cpu, cuda, cuda:1, mps"] = "auto"
    dtype: Annotated[str, "float32, bfloat16 or float16: the network's arithmetic"] = "float32"


def held_out(task, source, count, size, device, workers=0):
    """The fixed crops of a split, the same for every seed of a run: (lq, hq, names), lq and hq (N, 3, size, size).

    source: data.Photographs, which the task degrades, or data.Pairs."""
    from data import Pairs, get_task, grid_crops, pair_crops
    from utils import generator
    if isinstance(source, Pairs):
        lq, hq = pair_crops(source, count, size, generator(0, 3), workers=workers)
        return lq.to(device), hq.to(device), [f"crop {i}" for i in range(count)]
    hq, names = grid_crops(source, count, size, generator(0, 3))
    return get_task(task)(hq, generator(0, 4))[0].to(device), hq.to(device), names


def compare(restorers, lq, hq, judges, seeds=3, batch=32):
    """Scores crops lq, hq (N, 3, H, W) and each restorer (name -> restorer) on them, as it was trained.

    judges: name -> reward. Returns (rows, images): rows[name][metric] (N,), images[name] (N, 3, H, W).
    """
    from tqdm import tqdm
    rows, images = {}, {}
    for name, restorer in (bar := tqdm({"lq": None, **restorers}.items(), desc="eval", unit="model")):
        bar.set_postfix_str(name)
        settings = restorer.defaults if restorer else {"steps": 0, "eta": 0.0}
        rows[name], images[name] = evaluate(restorer, lq, hq, judges, settings["steps"], settings["eta"],
                                            range(seeds if restorer else 1), batch)
    rows["hq"] = {name: judge(hq, hq).float().cpu() for name, judge in judges.items()}
    images["hq"] = hq
    return rows, images


def images_of(cfg, border):
    """What cfg asks for: (names, get, whole, enlarged). get(i) -> (lq, hq), (1, 3, H, W) each; whole: these are no
    crops; enlarged: lq was, bicubically. Raises UserError for images that are too small within the border."""
    from data import Pairs, get_task, image_size, load_pairs, photographs, split_task, whole_image
    from utils import UserError
    if not (cfg.lq or cfg.hq or cfg.dataset or cfg.size == 0):
        source = photographs(cfg.split, cfg.data, cfg.size)
        lq, hq, names = held_out(cfg.task, source, cfg.count or CROPS, cfg.size, "cpu")
        if cfg.size - 2 * border < 11:
            raise UserError(f"--size {cfg.size}, --border {border}: ssim needs at least 11 pixels within the border")
        return names, lambda i: (lq[i:i + 1], hq[i:i + 1]), False, split_task(cfg.task)[0] == "sr"
    if cfg.lq or cfg.hq or cfg.dataset:
        source = load_pairs("test" if cfg.dataset else "all", cfg.lq, cfg.hq, cfg.match, cfg.dataset, cfg.root)
    else:
        source = photographs(cfg.split, cfg.data)
    degrade = None if isinstance(source, Pairs) else get_task(cfg.task)
    names = source.names[:cfg.count or None]
    for path in source.paths[:len(names)]:
        if min(image_size(path, whole=False)) - 2 * border < 11:
            raise UserError(f"{path}: too small, ssim needs at least 11 pixels within the border (--border {border})")
    enlarged = max(source.factor) > 1 if degrade is None else split_task(cfg.task)[0] == "sr"
    return names, functools.partial(whole_image, source, degrade), True, enlarged


def batched(get, count, whole, workers, device, size=32):
    """Batches of get(0), ..., get(count - 1): single images decoded by workers if they are whole, else `size` crops."""
    from data import stream
    if whole:
        for lq, hq in stream(get, range(count), workers):
            yield lq.to(device), hq.to(device)
    else:
        for start in range(0, count, size):
            parts = [get(i) for i in range(start, min(start + size, count))]
            yield tuple(torch.cat(x).to(device) for x in zip(*parts))


def load_metrics(cfg, color, border, whole, device):
    """(metrics, names of those without reference), in the order of the columns: judges, psnr, ssim, --metrics."""
    from reward import JUDGES
    from reward import load as load_reward
    metrics, alone = {}, []
    for label, name in (("judge", cfg.judge), ("judge2", cfg.judge2)):
        if name not in ("none", ""):
            judge = load_reward(name, device)
            metrics[label] = on_tiles(judge) if whole and name in JUDGES else judge
            alone.append(label)
    metrics |= reference_metrics(color, border)
    for name in cfg.metrics:
        reward = load_reward(name, device)
        reward = on_tiles(reward) if whole and name in JUDGES else reward
        sign = getattr(reward, "sign", 1.0)
        label = name + (" ↓" if sign < 0 else " ↑")
        metrics[label] = lambda images, refs, reward=reward, sign=sign: sign * reward(images, refs)
        if name.startswith("pyiqa:") and reward.metric.metric_mode == "NR":
            alone.append(label)
    return metrics, alone


def load_models(cfg, folders, device):
    """name -> restorer for the folders, or the shipped one of --task. Raises UserError if neither is given."""
    from data import DATASETS
    from model import load, shipped
    from utils import UserError
    if cfg.dataset in DATASETS and not cfg.task:
        cfg.task = DATASETS[cfg.dataset][0]
    if not folders and not cfg.task:
        raise UserError("no model: give one or more folders of saved restorers, e.g. weights/sr, or --task")
    if not folders:
        return {f"weights/{Path(shipped(cfg.task)).name}": load("", device, cfg.dtype, cfg.task)}
    return {folder: load(folder, device, cfg.dtype) for folder in folders}


def lineup(restorers, cfg, lq_name):
    """Rows to measure: name -> (restorer, steps, eta, mean row?): lq, each model, and the first one's baselines."""
    from sample import chosen_steps
    models = {lq_name: (None, 0, 0.0, False)}
    for index, (name, restorer) in enumerate(restorers.items()):
        own = restorer.defaults
        steps, eta = chosen_steps(restorer, cfg.steps), cfg.eta if cfg.eta >= 0 else own["eta"]
        models[name] = (restorer, steps, eta, cfg.baselines and index == 0)
        if cfg.baselines and index == 0:
            models |= {f"{name}, eta {other:g}": (restorer, steps, other, False)
                       for other in (0.0, 1.0) if other != eta}
    return models


def save_extremes(path, rows, models, names, get, tile, device):
    """Picture of the two largest gains and the two largest losses of the last of `names` against the first one, by the
    first metric; each image restored again with seed 0, with an inset where the two differ most."""
    first, last = names[0], names[-1]
    metric = next(iter(rows[first]))
    gain = rows[last][metric] - rows[first][metric]
    order = gain.argsort(descending=True).tolist()
    picks = list(dict.fromkeys(order[:2] + order[-2:]))
    columns, captions = {name: [] for name in (*models, "hq")}, {}
    for index in picks:
        lq, hq = (x.to(device) for x in get(index))
        shown = {name: score(restorer, lq, hq, {}, steps, eta, [0], index, tile)[1][0, 0].cpu()
                 for name, (restorer, steps, eta, _) in models.items()} | {"hq": hq[0].cpu()}
        side = min(max(8, min(hq.shape[-2:]) // 6), min(hq.shape[-2:]) // 3)
        place = busiest(shown[first], shown[last], side)
        for name, image in shown.items():
            columns[name].append(with_inset(image, *place, side))
    for name in columns:
        if metric in rows.get(name, {}):
            captions[name] = [f"{metric} {rows[name][metric][i]:.{digits(metric)}f}" for i in picks]
    captions[last] = [f"{text} ({gain[i]:+.{digits(metric)}f})" for text, i in zip(captions[last], picks)]
    save_grid(path, columns, captions)


def main():
    from data import split_task
    from utils import UserError, atomic, make_folder, parse, pick_device, write_rows
    cfg, folders = parse(Config, description="Compares saved restorers, or sums up runs of rl.py.",
                         positional="folders of saved restorers, or of finished runs of rl.py")
    device, folders = pick_device(cfg.device), list(dict.fromkeys([*folders, *cfg.model]))
    if cfg.seeds < 1 or cfg.count < 0 or cfg.tile < 8 or cfg.color not in ("auto", "y", "rgb"):
        raise UserError(f"--seeds {cfg.seeds}, --count {cfg.count}, --tile {cfg.tile}, --color {cfg.color}: at least "
                        "1, 0 and 8, and one of auto, y, rgb")
    if cfg.split not in ("test", "val", "train") or cfg.workers < 0 or cfg.size < 0:
        raise UserError(f"--split {cfg.split}, --workers {cfg.workers}, --size {cfg.size}: test, val or train, and at "
                        "least 0")
    if any((Path(folder) / "summary.json").exists() for folder in folders):
        print(aggregate(folders))
        return
    restorers = load_models(cfg, folders, device)
    folders = list(restorers)
    cfg.task = cfg.task or restorers[folders[0]].defaults["task"]
    base, options = split_task(cfg.task)
    color, border = CONVENTIONS.get(base, ("rgb", 0))
    color = color if cfg.color == "auto" else cfg.color
    border = cfg.border if cfg.border >= 0 else options.get("scale", border)
    names, get, whole, enlarged = images_of(cfg, border)
    make_folder(cfg.out)  # now: a mistake must not cost the scores
    metrics, alone = load_metrics(cfg, color, border, whole, device)

    # scores
    from tqdm import tqdm
    lq_name = "lq (bicubic)" if enlarged else "lq"
    models = lineup(restorers, cfg, lq_name)
    batches = tqdm(batched(get, len(names), whole, cfg.workers, device), desc="eval", unit="batch",
                   total=len(names) if whole else -(-len(names) // 32))
    rows = measure(models, batches, metrics, range(cfg.seeds), cfg.tile, alone)

    # tables
    out = Path(cfg.out)
    said = (f"{cfg.dataset or cfg.hq or cfg.task}: {len(names)} {'whole images' if whole else 'crops'}, "
            f"{cfg.seeds} sampler seeds; psnr and ssim on {color.upper()}, border {border}, 8 bit; "
            "mean ± standard error over images")
    parts = [said, format_table(rows), format_differences(rows, folders)]
    if "judge" in rows.get("hq", {}):
        start, goal = rows[folders[0]]["judge"].nanmean(), rows["hq"]["judge"].nanmean()
        parts += [f"{name}: judge {said_of_gap(rows[name]['judge'].nanmean(), start, goal)}"
                  for name in folders[1:]]
    text = "\n\n".join(part for part in parts if part)
    print(text)
    with atomic(out / "table.md") as temporary:
        temporary.write_text(text + "\n")
    write_rows(out / "table.csv", summary(rows, folders))
    write_rows(out / "scores.csv", [{"model": name, "image": names[i]} | {k: v[i].item() for k, v in row.items()}
                                    for name, row in rows.items() for i in range(len(names))])
    save_extremes(out / "comparison.png", rows, {name: models[name] for name in (lq_name, *folders)},
                  folders if len(folders) > 1 else [lq_name, *folders], get, cfg.tile, device)
    print(f"wrote {out}/table.md, table.csv, scores.csv, comparison.png")


if __name__ == "__main__":
    from utils import run_main
    run_main(main)
