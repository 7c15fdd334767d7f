"""One table of every task: the SFT restorer, its own sampler's front, and RL by the paper's loss.

Runs nothing but the measurement: the models are those that rl.py left in RUNS/TASK-SEED/model.

    for t in sr sr2 denoise deblur jpeg derain dehaze lowlight real; do
        for s in 154 155 156; do python rl.py --task $t --seed $s; done; done
    python results/tasks.py --out runs/tasks                                  # laptop, 25 minutes
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data import get_task, held_out, open_split  # noqa: E402
from eval import (FRONT, cell, compare, gain_on_front, in_batches, load_metrics,  # noqa: E402
                  markdown, mean_error, write_scores)
from model import load  # noqa: E402
from utils import UserError, atomic, new_run, option, parse, pick_device, run_main  # noqa: E402

TASKS = ("sr", "sr2", "denoise", "deblur", "jpeg", "derain", "dehaze", "lowlight", "real")
METRICS = ["judge", "judge2", "pyiqa:lpips", "pyiqa:lpips-vgg", "pyiqa:brisque"]
LPIPS = "pyiqa:lpips ↓"


def table_rows(task, rows, models):
    """{first cell: {column: text}} of one task, of the rows of eval.compare.

    SFT: mean. The other two: the difference from it, of the setting of the front whose PSNR-Y is
    nearest to RL's, and the mean over the runs ± its standard error. "x front": the gain of LPIPS
    over that of the front at the same PSNR-Y.
    """
    means = {name: {key: x.nanmean().item() for key, x in row.items()}
             for name, row in rows.items()}
    sft = means["sft"]
    change = {name: {key: row[key] - sft[key] for key in sft} for name, row in means.items()
              if name not in ("lq", "hq", "sft")}
    runs = {key: torch.tensor([change[name][key] for name in models]) for key in sft}
    front = [name for name in change if name not in models]
    points = [(-change[name]["psnr_y"], -change[name][LPIPS]) for name in front]
    at_rl = [gain_on_front(points, -change[name]["psnr_y"]) for name in models]
    near = min(front, key=lambda name: abs(change[name]["psnr_y"] - runs["psnr_y"].mean()))
    gain, own = -runs[LPIPS].mean().item(), sum(at_rl) / len(at_rl)
    times = f"{gain / own:.1f}" if own > 0.0005 else "front: none"
    return {
        f"{task}, SFT": {key: cell(value, float("nan")) for key, value in sft.items()},
        f"{task}, {near.removeprefix('sft, ')}": {
            key: cell(value, float("nan"), "+") for key, value in change[near].items()},
        f"{task}, RL": {key: cell(*mean_error(x), "+") for key, x in runs.items()}
        | {"x front": times}}


@dataclass
class Config:
    """One table of every task."""
    runs: str = option("runs", "folder that holds TASK-SEED/model")
    tasks: list = option(list(TASKS), "tasks, see data.py")
    seeds: list = option(["154", "155", "156"], "seeds of the runs")
    split: str = option("test", "of the photographs", ["test", "val"])
    metrics: list = option(METRICS, "besides psnr_y, psnr, ssim and color_step")
    out: str = option("runs/tasks", "folder for table.md and scores of each task")


def main():
    cfg, device, lines = parse(Config), pick_device(), {}
    missing = [f"{cfg.runs}/{task}-{seed}/model" for task in cfg.tasks for seed in cfg.seeds
               if not Path(cfg.runs, f"{task}-{seed}", "model").is_dir()]
    if missing:
        raise UserError(f"{missing[0]}: missing; run rl.py first, or name --tasks and --seeds")
    out, metrics = new_run(cfg.out), load_metrics(cfg.metrics, device)
    for task in cfg.tasks:
        source = open_split(SimpleNamespace(data="", lq="", hq=""), cfg.split)
        lq, hq, names = held_out(source, get_task(task), 64, 128)
        models = {seed: f"{cfg.runs}/{task}-{seed}/model" for seed in cfg.seeds}
        restorers = {name: load(folder, task, device)
                     for name, folder in {"sft": "", **models}.items()}
        rows = compare(restorers, in_batches(lq, hq, device), metrics, front=FRONT)
        write_scores(out / f"{task}.csv", rows, names)
        lines |= table_rows(task, rows, cfg.seeds)
        text = markdown("", [*rows["sft"], "x front"], lines)
        with atomic(out / "table.md") as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    run_main(main)
