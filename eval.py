"""Measures saved restorers on held-out photographs: tables with standard errors, and pictures.

  judge, judge2   rewards without reference, in [0, 1]; judge2 never serves as a reward, so it shows reward hacking
  psnr_y, psnr    dB; on Y of ITU-R BT.601 YCbCr ("ycbcr" in MATLAB) and on RGB, no border crop
  ssim            Wang et al. 2004, Gaussian window 11, sigma 1.5, RGB mean (reward.ssim)
The standard error is over images (after the mean over sampler seeds): std / sqrt(images).

Chosen here:
 1. Each image has noise generators of its own, from (seed, index): a result depends neither on the batch size nor on
    which other images are measured, and two models see the same noise, so that their difference is paired.
 2. A model is sampled with the steps and the eta it was trained with, unless flags say otherwise.

    python eval.py weights/sr runs/sr/model                       # laptop: two restorers in one table and picture
    python eval.py runs/table/*                                   # runs of rl.py named NAME-SEED: mean over seeds
    python eval.py runs/a/model runs/b/model --data DIR --device cuda --count 1000 --seeds 5
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch


@torch.no_grad()
def evaluate(restorer, lq, hq, judges, steps, eta, seeds, batch=32):
    """Restores lq once per seed and scores it. restorer None: scores lq itself.

    lq, hq: (N, 3, H, W) in [-1, 1]. judges: name -> reward(images, refs) -> (N,).
    Returns (scores, images): scores[name] is (N,), the mean over seeds, and images (N, 3, H, W) of the first seed.
    """
    from reward import psnr, psnr_y, ssim
    from sample import rollout
    from utils import generator

    metrics = {**judges, "psnr_y": psnr_y, "psnr": psnr, "ssim": ssim}
    totals, first = {name: torch.zeros(len(lq)) for name in metrics}, []
    for seed in seeds:
        for start in range(0, len(lq), batch):
            part = slice(start, start + batch)
            image = lq[part]
            if restorer is not None:
                own = [generator(seed, 5, index) for index in range(start, start + len(image))]
                image = restorer.decode(rollout(restorer, image, steps, eta, own, keep=False).z[-1], image)
            for name, metric in metrics.items():
                totals[name][part] += metric(image, hq[part]).float().cpu() / len(seeds)
            if seed == seeds[0]:
                first.append(image)
    return totals, torch.cat(first)


def mean_se(values):
    """(mean, standard error of the mean) of a (N,) tensor; the error is NaN for N = 1."""
    return values.mean().item(), (values.std().item() / math.sqrt(len(values)) if len(values) > 1 else math.nan)


def gap_closed(model, start, goal):
    """Share of the way from `start` to `goal` that `model` has gone: floats -> float, 1 = all of it."""
    return (model - start) / (goal - start) if goal != start else math.nan


def format_table(rows):
    """{row name: {metric: (N,) tensor}} -> Markdown lines, mean ± standard error; infinite values print as such."""
    columns = list(dict.fromkeys(key for row in rows.values() for key in row))
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, row in rows.items():
        cells = []
        for column in columns:
            mean, error = mean_se(row[column]) if column in row else (math.nan, math.nan)
            digits = 2 if column.startswith("psnr") else 4
            cells.append("-" if not math.isfinite(mean) else f"{mean:.{digits}f} ± {error:.{digits}f}")
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


def aggregate(folders):
    """Summaries of runs named NAME-SEED -> Markdown lines, a row per NAME: change from SFT to RL, mean ± standard
    error over seeds. gap closed is of the first judge. Raises UserError for a folder without a summary."""
    import json

    from utils import UserError
    groups = {}
    for folder in map(Path, folders):
        try:
            runs = json.loads((folder / "summary.json").read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"{folder}: no readable summary.json ({error}); give runs that rl.py has ended") from None
        sft, rl = runs["sft"], runs["rl"]
        change = {"gap closed": 100 * gap_closed(rl["judge"], sft["judge"], runs["hq"]["judge"])}
        change |= {key: rl[key] - sft[key] for key in ("judge", "judge2", "psnr_y", "ssim")}
        groups.setdefault(folder.name.rsplit("-", 1)[0], []).append(change)
    lines = ["| run | seeds | gap closed, % | judge | judge2 | PSNR-Y, dB | SSIM |", "|---|---|---|---|---|---|---|"]
    for name, changes in groups.items():
        cells = []
        for key, digits in (("gap closed", 0), ("judge", 3), ("judge2", 3), ("psnr_y", 2), ("ssim", 4)):
            values = torch.tensor([change[key] for change in changes])
            spread = f" ± {values.std() / math.sqrt(len(values)):.{digits}f}" if len(values) > 1 else ""
            worst = f" ({', '.join(f'{v:.{digits}f}' for v in values)})" if key in ("gap closed", "psnr_y") else ""
            cells.append(f"{values.mean():+.{digits}f}{spread}{worst}")
        lines.append(f"| {name} | {len(changes)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


@dataclass
class Config:
    task: Annotated[str, "degradation, a key of data.TASKS; empty: the first model's"] = ""
    data: Annotated[str, "folder of photographs; empty: those inside the packages"] = ""
    split: Annotated[str, "test (for tables) or val (for tuning)"] = "test"
    count: Annotated[int, "held-out crops at most"] = 64
    size: Annotated[int, "side of a crop in pixels"] = 64
    seeds: Annotated[int, "sampler seeds per image: 0, 1, ..."] = 3
    steps: Annotated[int, "DDIM steps; 0: as trained"] = 0
    eta: Annotated[float, "stochasticity of the sampler; -1: as trained"] = -1.0
    judge: Annotated[str, "quality score shown first"] = "judge"
    judge2: Annotated[str, "independent quality score, never a reward"] = "judge2"
    out: Annotated[str, "folder for table.md, scores.csv and comparison.png"] = "runs/eval"
    device: Annotated[str, "auto, cpu, cuda, cuda:1, mps"] = "auto"
    dtype: Annotated[str, "float32, bfloat16 or float16: the network's arithmetic"] = "float32"


def held_out(task, data, split, count, size, device):
    """The fixed crops of a split: (lq, hq, names), lq and hq (N, 3, size, size). The same for every seed of a run."""
    from data import get_task, grid_crops, photographs
    from utils import generator
    hq, names = grid_crops(photographs(split, data, size), count, size, generator(0, 3))
    return get_task(task)(hq, generator(0, 4))[0].to(device), hq.to(device), names


def compare(restorers, cfg, device):
    """Scores lq, hq and each restorer (name -> restorer) on the held-out crops.

    Returns (rows, images, names): rows[name][metric] (N,), images[name] (N, 3, H, W), names of the crops.
    """
    from tqdm import tqdm

    from reward import load as load_reward
    lq, hq, names = held_out(cfg.task, cfg.data, cfg.split, cfg.count, cfg.size, device)
    judges = {"judge": load_reward(cfg.judge, device), "judge2": load_reward(cfg.judge2, device)}
    rows, images = {}, {}
    for name, restorer in (bar := tqdm({"lq": None, **restorers}.items(), desc="eval", unit="model")):
        bar.set_postfix_str(name)
        settings = restorer.defaults if restorer else {"steps": 0, "eta": 0.0}
        steps, eta = cfg.steps or settings["steps"], cfg.eta if cfg.eta >= 0 else settings["eta"]
        rows[name], images[name] = evaluate(restorer, lq, hq, judges, steps, eta, range(cfg.seeds if restorer else 1))
    rows["hq"] = {name: judge(hq, hq).float().cpu() for name, judge in judges.items()}
    images["hq"] = hq
    return rows, images, names


def main():
    from model import load
    from utils import UserError, parse, pick_device, write_rows
    cfg, folders = parse(Config, description="Compares saved restorers, or sums up runs of rl.py.",
                         positional="folders of saved restorers, or of finished runs of rl.py")
    device = pick_device(cfg.device)
    if cfg.seeds < 1 or cfg.count < 1:
        raise UserError(f"--seeds {cfg.seeds}, --count {cfg.count}: must be at least 1")
    if not folders:
        raise UserError("no model: give one or more folders of saved restorers, e.g. weights/sr")
    if all((Path(folder) / "summary.json").exists() for folder in folders):
        print(aggregate(folders))
        return
    restorers = {folder: load(folder, device, cfg.dtype) for folder in folders}
    cfg.task = cfg.task or restorers[folders[0]].defaults["task"]
    rows, images, names = compare(restorers, cfg, device)

    # tables and picture, the images with the largest judge gap of the first model on top
    table, out = format_table(rows), Path(cfg.out)
    print(table)
    for folder in folders[1:]:
        closed = gap_closed(rows[folder]["judge"].mean(), rows[folders[0]]["judge"].mean(), rows["hq"]["judge"].mean())
        change = rows[folder]["psnr_y"] - rows[folders[0]]["psnr_y"]
        print(f"{folder} against {folders[0]}: judge gap closed {closed:.0%}, "
              "psnr_y {:+.2f} ± {:.2f} dB (paired)".format(*mean_se(change)))
    write_rows(out / "scores.csv", [{"model": name, "image": names[i]} | {k: v[i].item() for k, v in row.items()}
                                    for name, row in rows.items() for i in range(len(names))])
    from utils import atomic
    with atomic(out / "table.md") as temporary:
        temporary.write_text(table + "\n")
    hard = (rows["hq"]["judge"] - rows[folders[0]]["judge"]).argsort(descending=True)[:6]
    save_grid(out / "comparison.png", {name: images[name][hard] for name in images},
              {name: [f"judge {v:.2f}" for v in rows[name]["judge"][hard]] for name in images})
    print(f"wrote {out}/table.md, scores.csv, comparison.png")


if __name__ == "__main__":
    from utils import run_main
    run_main(main)
