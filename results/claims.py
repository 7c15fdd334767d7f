"""One claim of the paper, tested by one command: its runs, its table, its figure.

  C1 which reward                    C2 where RL is applied, by difficulty
  C3 RL, SFT, both                   C4 the adaptive weight against fixed ones, whole fronts
  C5 every restorer of --models      C6 every task with a restorer in weights/
  C7 what reviewers ask              C8 the hacking curve, for each of --rewards

Each row of a table (results/variants.py) is rl.py with a few settings changed, once for each seed,
measured on the photographs of --split. Claims share their runs: OUT/SETTINGS/SEED is made once. A
call that was stopped is given again: finished runs are kept, another goes on from its checkpoint.
Of a finished run its scores are enough (of C8 metrics.csv, too): copy results/scores/claims to OUT
for the tables of C1 to C4, C6, C7 and C8 (there without "w 0.5"; of weights/broad 170 to 173).
Several processes may work in one OUT, each with --seeds of its own (a thread each, or one card);
the call with all seeds then makes the table.

How to read a table
 1. "SFT": means. Other rows: minus SFT, or minus another row of the same seed, ± half of the 95 %
    interval by Student's t, the wider of two: over photographs, after the mean over seeds, and over
    seeds, after the mean over photographs. (Crops of a photograph are no independent witnesses:
    they are averaged first.) "(2 of 5 kept)": in the other seeds RL gained nothing within
    --max-drop, the SFT restorer was kept, and the changes are 0.
 2. p, of the first row against another, is the larger one of two paired t-tests, over photographs
    and over seeds. Of twenty such tests one is below 0.05 by chance, and a table has more: LPIPS
    decides, the rest describes.
 3. brisque is of all crops together: its interval is over seeds.
 4. "x front": LPIPS gained, over what the SFT restorer gains by other steps and eta at that PSNR-Y;
    in brackets the mean over seeds of gain minus front, ± over seeds, on these photographs.
 5. All rows of a claim have the same updates and reward calls, but for those marked *: their
    claim is about the length, or (judge's gradient) the loss itself calls the judge.
 6. Tune with --split val. The test photographs are for what is settled.
With pairs (--lq, --hq) each crop counts as a photograph, and intervals are too narrow.

    python results/claims.py C3                                  # laptop, an hour: it says how long
    python results/claims.py C8 --rewards judge judge:OLD        # before and after hardening
    python results/claims.py C1 --tiny --out runs/tiny           # a minute: is all well?
    python results/claims.py C1 --data DIR --size 256 --model FOLDER --out runs/large       # GPU
"""

import csv
import hashlib
import math
import re
import statistics
import sys
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "results")]

from variants import METHODS, claims  # noqa: E402

import rl  # noqa: E402
from data import get_task, held_out, open_split  # noqa: E402
from eval import (FIDELITY, FRONT, INSTRUMENTS, cell, compare, evaluate,  # noqa: E402
                  gain_on_front, in_batches, interval, load_metrics, markdown, save_figure)
from model import load, read_json  # noqa: E402
from utils import UserError, atomic, option, parse, pick_device, run_main, write_json  # noqa: E402

SECONDS = 11.0  # of an iteration with 128 restorations, two cores; until a run is measured
EXTRA = 6       # iterations' worth of a run's baseline, validation and measurement
LPIPS = "pyiqa:lpips ↓"
OUTSIDE = ("val_psnr_y", "val_color_step", "val_judge2", "val_pyiqa:lpips", "val_pyiqa:brisque")
TINY = {"iterations": 2, "inputs": 8, "pool": 8, "size": 32, "views": 1, "steps": 4}
FREE = ("out", "seed", "seeds", "resume", "split", "only", "models", "rewards")  # not of the runs


# ---- the runs ----

class Row(NamedTuple):
    cfg: rl.Config
    method: str
    folder: Path  # holds a run for each seed
    apart: bool


def budget(cfg):
    """(updates, calls of the reward by one view of one image) of a run; 64 validation crops."""
    looks = 1 + -(-cfg.iterations // rl.LOOK_EVERY)
    judged = cfg.steps if cfg.reward_mode == "step" else 1
    restored = (2 * cfg.pool + cfg.iterations * cfg.inputs * cfg.samples) * judged
    return cfg.iterations * rl.UPDATES, cfg.views * (cfg.pool + restored + 64 * looks)


def plan(claim, cfg):
    """{name: Row} of a claim; UserError if rows that should cost the same do not."""
    rows, own = {}, {field.name: getattr(cfg, field.name) for field in fields(rl.Config)}
    for name, changes in claims(cfg)[claim].items():
        method, apart = changes.get("method", ""), changes.get("apart", False)
        new = {key: x for key, x in changes.items() if key in own and x != own[key]}
        words = [method, *(f"{key}={value}" for key, value in new.items())]
        folder = re.sub(r"[^\w.=+-]", "_", "-".join(filter(None, words))) or "default"
        rows[name] = Row(rl.Config(**own | new), method, Path(cfg.out, folder), apart)
    if len({budget(row.cfg) for row in rows.values() if not row.apart}) != 1:
        raise UserError(f"{claim}: no rows, or budgets differ; --inputs must be a multiple of 8")
    if not set(cfg.only) <= set(rows):
        raise UserError(f"--only: the rows of {claim} are: {'; '.join(rows)}")
    rows = {name: rows[name] for name in cfg.only or rows}
    if len({row.folder for row in rows.values()}) < len(rows):
        raise UserError(f"{claim}: two rows are one run; change the flag, or rename a model")
    return rows


def check_settings(cfg):
    """Raises UserError if the runs in cfg.out were made with other settings or shipped weights."""
    digest = hashlib.sha1()
    for file in sorted((ROOT / "weights").rglob("*.safetensors")):
        digest.update(file.read_bytes())
    now = {key: x for key, x in asdict(cfg).items() if key not in FREE}
    now["weights/"] = digest.hexdigest()
    file = Path(cfg.out, "settings.json")
    before = read_json(file) or now
    for key, value in now.items():
        if before.get(key) != value:
            raise UserError(f"--out {cfg.out}: its runs have {key} {before.get(key)}, not {value}")
    write_json(file, now)


def done(folder, split):
    """Whether a run is measured, or waits for it: its model is written last."""
    return (folder / f"{split}.json").exists() or (folder / "model").is_dir()


def log(folder):
    """metrics.csv as a list of {column: float}; [] of a run of which only the scores are there."""
    if not (folder / "metrics.csv").exists():
        return []
    with open(folder / "metrics.csv", encoding="utf-8") as file:
        return [{key: float(x) for key, x in row.items() if x} for row in csv.DictReader(file)]


def cost(claim, runs, split):
    """A line: what is left to do, and how long it takes. runs: [(Row, folder)]."""
    left = [row.cfg for row, folder in runs if not done(folder, split)]
    seen = [x["seconds"] for _, folder in runs if done(folder, split) for x in log(folder)[1:]]
    updates, calls = (sum(part) for part in zip((0, 0), *map(budget, left)))
    samples = runs[0][0].cfg.inputs * runs[0][0].cfg.samples
    seconds = statistics.mean(seen or [SECONDS * samples / 128])
    minutes = sum(cfg.iterations + EXTRA for cfg in left) * seconds / 60
    return (f"{claim}: {len(left)} of {len(runs)} runs to do, {updates} updates, {calls} reward "
            f"calls, about {minutes:.0f} minutes at {seconds:.1f} s an iteration "
            f"({'measured' if seen else 'a guess'})")


def train(row, folder):
    """One run, from its start or its last checkpoint; the name of its folder is its seed."""
    resume = (folder / "checkpoint.safetensors").exists()
    cfg = replace(row.cfg, seed=int(folder.name), out=str(folder), resume=resume)
    parts = METHODS[row.method](cfg)
    step_loss = parts.pop("step_loss", rl.step_loss)
    with patch.multiple(rl, report=lambda *args: None, **parts):  # measured below, all alike
        rl.train(cfg, step_loss)


# ---- measurement ----

def by_photograph(values, names):
    """(N,) of crops "PHOTOGRAPH@y,x" -> (photographs,), means; a score of the set stays (1,)."""
    owners = [name.rsplit("@", 1)[0] for name in names]
    if len(values) != len(owners):
        return values
    return torch.stack([values[[owner == one for owner in owners]].nanmean()
                        for one in dict.fromkeys(owners)])


def stored(file, keys, names, make):
    """make() -> {row: {metric: (N,)}}, N crops; its means over photographs (1, P), kept in a JSON
    file unless a metric of `keys` is new. A crop without a score is missing in one mean only."""
    known = read_json(file) or {"sft": {}}
    photographs = len({name.rsplit("@", 1)[0] for name in names})
    if not {len(x) for scores in known.values() for x in scores.values()} <= {1, photographs}:
        raise UserError(f"{file}: has scores of other photographs; remove it")
    if not set(keys) <= set(known["sft"]):
        known = {row: {key: [round(x, 6) for x in by_photograph(values, names).tolist()]
                       for key, values in scores.items()} for row, scores in make().items()}
        write_json(file, known)
    return {row: {key: torch.tensor([x]) for key, x in scores.items()}
            for row, scores in known.items()}


def measure(cfg, rows):
    """-> {(task, model): (rows of eval.compare: {metric: (1, P)}, {row: {metric: (S, P)}})}, of S
    seeds and P photographs; P is 1 for a score of the set."""
    device, found = pick_device(), {}
    metrics = load_metrics(INSTRUMENTS, device)
    keys = [*metrics, *FIDELITY, "color_step ↓"]
    count, turns, front = (8, 1, FRONT[:2]) if cfg.tiny else (128, 3, FRONT)
    for name, (own, _, folder, _) in rows.items():
        lq, hq, names = held_out(open_split(own, cfg.split), get_task(own.task), own.size, count)
        batches = in_batches(lq, hq, device)

        def base():
            restorers = {"sft": load(own.model, own.task, device)}
            return compare(restorers, batches, metrics, own.steps, own.eta, turns, front=front)

        def run(model):
            if not model.is_dir():
                raise UserError(f"{model}: is gone, and its scores lack a metric; copy it back")
            restorer = load(str(model), device=device)
            return {"sft": evaluate(restorer, batches, metrics, own.steps, own.eta, turns)[0]}
        key = own.task, own.model
        if key not in found:
            file = re.sub(r"[^\w.+-]", "_", f"sft-{'-'.join(key)}-{cfg.split}.json")
            found[key] = stored(Path(cfg.out, file), keys, names, base), {}
        seeds = [stored(folder / seed / f"{cfg.split}.json", keys, names,
                        lambda: run(folder / seed / "model"))["sft"] for seed in cfg.seeds]
        found[key][1][name] = {x: torch.cat([one[x] for one in seeds]) for x in seeds[0]
                               if all(x in one for one in [found[key][0]["sft"], *seeds])}
    return found


# ---- statistics, table, figure ----

def paired(change):
    """Changes (seeds, photographs) -> (mean, half of its 95 % interval, p of a paired t-test): the
    wider and the larger of those over photographs and over seeds. p: NaN if one cannot be had."""
    from scipy.stats import ttest_1samp
    widths, ps = [], []
    for values in (change.nanmean(0), change.nanmean(1)):
        values = values[~values.isnan()]
        widths.append(interval(values, 0 * values)[1])
        ps.append(ttest_1samp(values, 0).pvalue if len(values) > 1 else math.nan)
    width = max((x for x in widths if not math.isnan(x)), default=math.nan)
    return change.nanmean().item(), width, torch.tensor(ps).max().item()


def changes_of(rows, models):
    """-> ({row: {metric: (S, P)}} minus SFT, {metric: mean of SFT}, its own front:
    {"SFT, steps, eta": {metric: mean minus SFT}})."""
    sft = rows["sft"]
    change = {name: {key: x - sft[key] for key, x in scores.items()}
              for name, scores in models.items()}
    front = {name.replace("sft", "SFT"): {key: (x - sft[key]).nanmean().item()
                                          for key, x in scores.items()}
             for name, scores in rows.items() if name.startswith("sft, ")}
    return change, {key: x.nanmean().item() for key, x in sft.items()}, front


def lost_and_gained(front):
    """[(loss of PSNR-Y, gain of LPIPS)] of a front, with (0, 0) first."""
    return [(0.0, 0.0), *((-row["psnr_y"], -row[LPIPS]) for row in front.values() if LPIPS in row)]


def beside_front(row, points):
    """A cell: gain of LPIPS over the front's, and beyond it by how much, ± over seeds."""
    gains, drops = (-row[key].nanmean(1) for key in (LPIPS, "psnr_y"))
    own = torch.tensor([gain_on_front(points, drop) for drop in drops.tolist()])
    if own.isnan().any():
        return "front ends before"
    at_mean = gain_on_front(points, drops.mean().item())
    times = f"{gains.mean().item() / at_mean:.1f} " if at_mean > 5e-4 else ""
    mean, width = interval(gains, own)
    return f"{times}({mean:+.4f}" + (")" if math.isnan(width) else f" ± {width:.4f})")


def table_rows(change, sft, front, minutes):
    """{first cell: {column: text}}: SFT, each row minus it, the settings of the front that are
    nearest to them in PSNR-Y, the first row minus each other."""
    lines = {"SFT": {key: cell(x, math.nan) for key, x in sft.items()}}
    for name, row in change.items():
        kept = row["psnr_y"].any(1)  # a seed in which nothing changed kept the SFT restorer
        line = name if kept.all() else f"{name} ({int(kept.sum())} of {len(kept)} kept)"
        lines[line] = {key: cell(*paired(x)[:2], "+") for key, x in row.items()}
        if all(minutes[name]):  # else of some runs only the scores are there
            lines[line]["minutes"] = f"{statistics.mean(minutes[name]):.1f}"
        if LPIPS in row:
            lines[line]["x front"] = beside_front(row, lost_and_gained(front))
            drop = -row["psnr_y"].nanmean().item()
            near = min(front, key=lambda setting: abs(front[setting]["psnr_y"] + drop))
            lines[near] = {key: cell(x, math.nan, "+") for key, x in front[near].items()}
    first, *others = change
    for name in others:
        line = lines[f"{first} minus {name}"] = {}
        for key in change[first].keys() & change[name].keys():
            mean, width, p = paired(change[first][key] - change[name][key])
            line[key] = cell(mean, width, "+") + ("" if math.isnan(p) else f", p {p:.2g}")
    return lines


def looks(row, seeds):
    """{column: changes since the SFT restorer (looks,)} of the validation columns, over seeds."""
    runs = [[x for x in log(row.folder / seed) if "val_reward" in x] for seed in seeds]
    keys = [key for key in runs[0][0] if key[:4] == "val_" and all(key in run[0] for run in runs)]
    return {key: [statistics.mean(run[i][key] - run[0][key] for run in runs)
                  for i in range(min(map(len, runs)))] for key in keys}


def draw(path, groups, courses):
    """groups: [(change, front)] of the plane; courses: {row: looks}, for C8 only."""
    from matplotlib.figure import Figure
    columns = [key for key in OUTSIDE if courses and all(key in x for x in courses.values())]
    figure = Figure((7 + 3.2 * len(columns), 5), dpi=100, layout="constrained")
    plane, *axes = figure.subplots(1, 1 + len(columns), squeeze=False)[0]
    means = [(0.0, 0.0)]
    for number, (change, front) in enumerate(groups):
        color = f"C{number}" if len(groups) > 1 else None  # of a task and its front
        points = lost_and_gained(front)
        ends = min(points)[0], max(points)[0]
        drops = torch.linspace(*ends, 60, dtype=torch.float64)
        gains = torch.tensor([gain_on_front(points, drop) for drop in drops.tolist()])
        plane.plot(-drops, -gains, "--", color=color or "grey", linewidth=1,
                   label="" if color else "front of SFT")
        plane.plot(*zip(*[(-x, -y) for x, y in points]), ".", color=color or "grey")
        lines = {}
        for name, row in change.items():
            (x, wide, _), (y, high, _) = (paired(row[key]) for key in ("psnr_y", LPIPS))
            lines.setdefault(name.partition(", ")[0], []).append((x, y, wide, high))
            means.append((x, y))
        for name, line in lines.items():
            x, y, wide, high = torch.tensor(sorted(line)).nan_to_num(0.0).T.tolist()
            plane.errorbar(x, y, high, wide, color=color, elinewidth=0.6, marker="o",
                           markersize=4, label=name)
    low, high = torch.tensor(means).aminmax(dim=0)
    edge = 0.3 * (high - low) + 1e-3  # cuts long bars and the far front: the rows are what counts
    (left, bottom), (right, top) = (low - edge).tolist(), (high + edge).tolist()
    plane.set(xlabel="PSNR-Y minus SFT, dB", ylabel="LPIPS minus SFT (lower is better)",
              title="bars: 95 %, dashed: the front of SFT", xlim=(left, right), ylim=(bottom, top))
    plane.legend(fontsize=7)
    for axis, key in zip(axes, columns):
        for name, course in courses.items():
            axis.plot(course["val_reward"], course[key], marker=".", label=name)
        axis.set(xlabel="reward minus SFT", title=f"{key[4:]} minus SFT, validation")
        axis.legend(fontsize=7)
    save_figure(path, figure)


@dataclass
class Config(rl.Config):
    """Tests a claim of the paper, C1 to C8. --seed and --resume are set by it."""
    out: str = option("runs/claims", "folder of all runs, tables and figures")
    seeds: list = option(["170", "171", "172", "173", "174"], "of the runs, five or more")
    split: str = option("test", "photographs that are measured; val: to tune", ["test", "val"])
    only: list = option([], "rows of the claim; empty: all")
    models: list = option([""], "SFT restorers of C5; empty: the shipped one")
    rewards: list = option(["judge"], "of C8, as NAME:FOLDER for other weights of a judge")
    tiny: bool = option(False, "two iterations, small crops: is all well?")


def main():
    cfg, words = parse(Config, positional="one of C1 to C8")
    known = all(map(str.isdecimal, cfg.seeds)) and len(set(map(int, cfg.seeds))) == len(cfg.seeds)
    if len(words) != 1 or words[0] not in claims(cfg) or not known or not cfg.seeds:
        raise UserError("give one claim, C1 to C8, and --seeds that are different whole numbers")
    cfg, claim = replace(cfg, **TINY) if cfg.tiny else cfg, words[0]
    rows = plan(claim, cfg)
    check_settings(cfg)
    runs = [(row, row.folder / seed) for seed in cfg.seeds for row in rows.values()]
    print(cost(claim, runs, cfg.split), flush=True)
    for row, folder in runs:
        if not done(folder, cfg.split):
            train(row, folder)
            print(cost(claim, runs, cfg.split), flush=True)

    found, columns, lines, groups = measure(cfg, rows), {}, {}, []
    minutes = {name: [sum(x.get("seconds", 0) for x in log(row.folder / seed)) / 60
                      for seed in cfg.seeds] for name, row in rows.items()}
    for key, (base, models) in found.items():
        label = " ".join(["", *filter(None, key)]) if len(found) > 1 else ""
        change, sft, front = changes_of(base, models)
        part = table_rows(change, sft, front, minutes)
        columns |= sft
        lines |= {name.replace("SFT", f"SFT{label}") if name in ("SFT", *front) else name: x
                  for name, x in part.items()}
        groups.append((change, front))
    text, name = markdown(claim, [*columns, "x front", "minutes"], lines), f"{claim}-{cfg.split}"
    with atomic(Path(cfg.out, f"{name}.md")) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
    print(text)
    if all(LPIPS in row for change, _ in groups for row in change.values()):
        courses = {name: looks(row, cfg.seeds) for name, row in rows.items()
                   if claim == "C8" and all(log(row.folder / seed) for seed in cfg.seeds)}
        draw(Path(cfg.out, f"{name}.png"), groups, courses)


if __name__ == "__main__":
    run_main(main)
