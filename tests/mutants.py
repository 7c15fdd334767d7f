"""Breaks one line after the other and asks whether a test notices. Not part of the test suite.

    python tests/mutants.py              # all of them, in a copy of the repository: half an hour
    python tests/mutants.py rl.py        # of one file

What a formula says is not broken here: the tests compare those with others' or with a plain loop.
Each mutant: (text that stands once in the file, what takes its place). The exit code is the number
of survivors.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
MUTANTS = {
    "sample.py": [
        (".clamp(max=last)", ""),
        ("previous[-1] = -1", "pass"),
        ('tile or max(256, restorer.defaults["size"])', "tile or 256"),
        ("*restorer.latent_shape(lq), generator=generator",
         "1, *restorer.latent_shape(lq)[1:], generator=generator).expand(-1, len(lq), -1, -1, -1"),
        ("z, steps = [noise[0]], []", "z, steps = [noise[1]], []"),
        ("noise=noise[k + 1], clip_x0=clip", "noise=noise[1], clip_x0=clip"),
        ("(z[k], t[k].expand(count", "(z[k], t[0].expand(count"),
        ("path.z[k + 1].detach()", "path.z[k].detach()"),
        ("(z_t, path.t[k].expand(", "(z_t, path.t[0].expand("),
        ("> 0.1 * self.sigma_t.max()", "> 0"),
        ("path.z[k].detach(), ", "path.z[k], "),
        ("weight[own] += window", "weight[own] += 1"),
        ("if target in files or target.exists():", "if target.exists():"),
        ("if target in files or target.exists():", "if target in files:"),
    ],
    "sft.py": [
        ("slices = torch.randperm(count, generator=generator)", "slices = torch.arange(count)"),
        ("(slices + torch.rand(count, generator=generator)) / count",
         "torch.rand(count, generator=generator)"),
        ("state_dict().values()), 1 - decay)", "state_dict().values()), decay)"),
        ('restorer.load_state_dict(state["weights"])', "pass"),
        ('average.load_state_dict(state["average"])', "pass"),
        ('load_optimizer(optimizer, state["optimizer"])', "pass"),
        ("total - done), done)", "total - done), 0)"),
        ("gen = generator(cfg.seed, 2, i)", "gen = generator(cfg.seed, 2, i - start)"),
        ("t[own].to(lq.device), eps[own]", "t[:len(lq)].to(lq.device), eps[:len(lq)]"),
        ('average.save(out / "model")', 'restorer.save(out / "model")'),
        ('optimizer.param_groups[0]["lr"] = learning_rate', "_ = learning_rate"),
        ("new_run(out, cfg.resume)", "new_run(out, True)"),
    ],
    "rl.py": [
        ("len(own), int(own[0]))", "len(own))"),
        ('batch["t"], batch["eps"])\n    with', 'batch["t"] * 0, batch["eps"])\n    with'),
        ("= [*path.x0[1:], path.z[", "= [*path.x0, path.z[-1]][:cfg.steps - 1] + [path.z["),
        ("judge(restorer.decode(clean[k], y), x)", "judge(restorer.decode(clean[k], x), x)"),
        ("z0 = restorer.encode(x, y)", "z0 = restorer.encode(x.flip(0), y)"),
        ("noise[:, part]))", "noise[:, :len(part)]))"),
        ("if rewards.isnan().all():", "if False:"),
        ("[torch.randperm(len(usable), generator=gen)].tolist()", ".tolist() * 2"),
        ('batch["own"]].to(accelerator', ':len(batch["own"])].to(accelerator'),
        ("draw_noise(restorer, lq, gen", "draw_noise(restorer, lq, generator(0)"),
        ("part * len(batches)\n", "1\n"),
        ("accelerator.sync_gradients:\n                update_average",
         "True:\n                update_average"),
        ("accelerator.clip_grad_norm_(restorer.weights(), CLIP_NORM", "torch.ones(()"),
        ("optimizer.zero_grad()", "pass"),
        ('gather(logs[0]["ratio_error"])', 'gather(logs[-1]["ratio_error"])'),
        ("accelerator.gather(x).mean()", "x.mean()"),
        ("        if keep:\n", "        if True:\n"),
        ("not task.startswith(kinds)", "True"),
        ('if not math.isfinite(row["grad_norm"]):', "if False:"),
        ('if cfg.cap == "hq" else rewards', 'if cfg.cap == "none" else rewards'),
        ('for key in ("val_psnr_y", "val_psnr"))', 'for key in ("val_psnr_y",))'),
        ('kept and row["val_reward"] > best["val_reward"]', "kept"),
        ('kept and row["val_reward', 'row["val_reward'),
        ("cfg.inputs % processes == cfg.pool % processes == 0", "True"),
        ('), open_split(cfg, "test', '), open_split(cfg, "train'),
        ('(cfg, "val"), open_split', '(cfg, "train"), open_split'),
        (', open_split(cfg, "train', ', open_split(cfg, "test'),
        ("restorer.train_only(cfg.trainable)  # FSDP", "pass  # FSDP"),
        (", restorer.frozen_copy()", ", restorer"),
        ("= restorer.frozen_copy()", "= restorer"),
        ("judge = views(scorer, cfg.views)", "judge = scorer"),
        ('average"), (memory, "memory")', 'average")'),
        (', (average, "average"), (', ", ("),
        ('load_optimizer(optimizer, state["optimizer"])', "pass"),
        ('start, rows, chosen = info["iteration"]', 'start, rows, chosen = info["iteration"] - 1'),
        ("gen = generator(cfg.seed, 20, n)", "gen = generator(cfg.seed, 20)"),
        ("memory.push(torch.arange(cfg.pool), counted(rewards, reward_hq, cfg))", "pass"),
        ("generator(cfg.seed, 21, iteration)\n", "generator(cfg.seed, 21)\n"),
        ("[ids], hq[ids], gen, cfg", "[ids], hq[ids.flip(0)], gen, cfg"),
        ("(rewards, reward_hq[ids]", "(rewards, reward_hq[:len(ids)]"),
        ("advantages(gains, known[ids])", "advantages(gains, known[:len(ids)])"),
        ("advantages(gains, known[ids])", "advantages(rewards, known[ids])"),
        ("        memory.push(ids, gains)\n", ""),
        ("(known[:, -1], reward_hq", "(known[:, 0], reward_hq"),
        ("cfg.weight, distance[ids", "cfg.weight, distance[:len(ids)"),
        (", distance_sft, distance", ", distance, distance"),
        ('= advantage[batch["own"]', '= advantage[:len(batch["own"])'),
        ('batch["weight"] = weight[batch["own"]]', 'batch["weight"] = weight[:len(batch["own"])]'),
        ('optimizer.param_groups[0]["lr"] = rate', "pass"),
        ("{name: x.clone() for name, x in average.state_dict().items()}\n            chosen",
         "average.state_dict()\n            chosen"),
        ("chosen = iteration + 1\n        state", "chosen = 0\n        state"),
        ("    average.load_state_dict(best)\n    if main", "    if main"),
        ('average.save(out / "model")', 'restorer.save(out / "model")'),
        ("reference, average, scorer", "average, reference, scorer"),
        ("average, scorer, test_source", "average, scorer, val_source"),
        ('("task", "steps", "eta", "size")', '("task", "eta", "size")'),
    ],
    "eval.py": [
        ("-metric(images, refs)", "metric(images, refs)"),
        ("to_uint8(x).float() / 127.5 - 1 for x in images", "x for x in images"),
        ("if small and name in OF_SETS:", "if False:"),
        ("elif name in FIDELITY and border:", "elif False:"),
        ("generator(seed, 8, number)", "generator(0, 8, number)"),
        ("generator(seed, 8, number)", "generator(seed, 8)"),
        ("round(share * count), other * noise", "round(share * count), other"),
        ("values = values[~values.isnan()]", "pass"),
        ("values - others)\n    count", "others - values)\n    count"),
        ("front = [(0.0, 0.0), *points]", "front = [(0.0, 0.0), *(x for x in points if x[0] > 0)]"),
        ("if drop <= psnr_drop]", "]"),
        ("return min(8 * top, lq.", "return min(top, lq."),
        ('if score > best else ""', 'if score < best else ""'),
        ("degrade, size, cfg.count", "degrade, size, 4"),
        ("for i in range(count)]", "for i in range(count)][:1] * count"),
        ('defaults["size"] or 64', "64"),
    ],
    "data.py": [
        ("as_posix().endswith(FOLDERS[3])", "name in FOLDERS[3]"),
        ("F.avg_pool2d(hq, 2) if large else hq", "hq"),
        ("bad.append(str(error))", "raise"),
        ('unicodedata.normalize("NFC", name)', "name"),
        ('return "test" if share < 0.1', 'return "test" if share < 0.3'),
        ('split in (part, "all")', "True"),
        ("alone = sorted({*lq_images.values(), *hq_images.values()} - used)", "alone = []"),
        ("(width // factor, height // factor) != (w, h)", "height // factor != h"),
        ("(width // factor, height // factor) != (w, h)", "width // factor != w"),
        ("utils.generator(self.seed, 5, self.start + item)", "utils.generator(self.seed, 5, item)"),
        ("utils.generator(self.seed, 6, self.start + item)", "utils.generator(self.seed, 6)"),
        ("if crops[-1].mean(0).std() / 255 >= 0.04:", "if True:"),
        ("= [], utils.generator(0,", "= [], utils.generator(1,"),
        ("if fine_detail(crop) >= 0.03:", "if True:"),
        (", utils.generator(0, 4))", ", utils.generator(0, 5))"),
        ("torch.where(is_color, noise, noise[:, :1])", "noise"),
    ],
    "model.py": [
        ('(steps or self.defaults["steps"], ', '(self.defaults["steps"], '),
        ('self.defaults["eta"] if eta < 0 else eta', 'eta if eta < 0 else self.defaults["eta"]'),
        ("image = (c + 1) / 2", "image = c"),
        ("parameter.requires_grad_(name in self.trainable)", "parameter.requires_grad_(True)"),
        ('"modulation": ("norm", "time_emb", "controlnet_")', '"modulation": ("",)'),
        ("{id(x): x for x in shared}", "{}"),
        ("other.bare_net.requires_grad_(False)", "pass"),
        ("network.requires_grad_(False).eval()", "network.eval()"),
        ('if info["missing_keys"]:', "if False:"),
        ('self.settings["residual_scale"] * (hq - lq)', 'self.settings["residual_scale"] * hq'),
        ('lq + z / self.settings["residual_scale"]', "lq + z"),
    ],
    "reward.py": [
        ("scores.where(scores.isfinite(), math.nan).nanmean(0)", "scores.nanmean(0)"),
        ("scores.where(scores.isfinite(), math.nan).nanmean(0)", "scores.mean(0)"),
        ("return self.sign * scores", "return scores"),
        ("self.metric.net(*pair)", "self.metric(*pair)"),
        ("1 <= float(found[0]) <= 5", "True"),
        ("self.mean_score(to_uint8(images))", "self.mean_score((images + 1) * 127.5)"),
        ("torch.linspace(1, 0, len(levels)", "torch.linspace(0, 1, len(levels)"),
    ],
    "utils.py": [
        ("for part in stream:", "for part in stream[:1]:"),
        ("file.chmod(0o666 & ~umask)", "pass"),
        ("and any(file.name[0]", "and any(file.stem"),
        ("if key not in free and", "if key in free and"),
        ('if info["photographs"] != photographs:', "if False:"),
        ("int(x) if x.isdigit() else x", "x"),
        ("if least is not None and not value >= least:", "if least is not None and value < least:"),
        ("os.replace(temporary, path)", 'os.replace(temporary, path.with_suffix(".x"))'),
    ],
}
TESTS = {"sft.py": ["test_sft.py", "test_rl.py"]}  # else those of its own name


def survives(copy, file, old, new):
    """Whether the tests of `file` pass although `old` was replaced by `new` in a copy."""
    text = (ROOT / file).read_text(encoding="utf-8")
    assert text.count(old) == 1 or old == new, f"{file}: {text.count(old)} times: {old}"
    (copy / file).write_text(text.replace(old, new), encoding="utf-8")
    tests = [str(copy / "tests" / name) for name in TESTS.get(file, [f"test_{file}"])]
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", *tests], cwd=copy,
                          capture_output=True)
    (copy / file).write_text(text, encoding="utf-8")
    return done.returncode == 0


def main():
    chosen, survivors = sys.argv[1:] or list(MUTANTS), 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", "runs", "__pycache__"))
        for file in chosen:
            assert survives(copy, file, "import", "import"), f"{file}: its tests fail unbroken"
            for old, new in MUTANTS[file]:
                alive = survives(copy, file, old, new)
                print(f"{file}: {'SURVIVES' if alive else 'dies'}: {new}", flush=True)
                survivors += alive
    print(f"{survivors} survive")
    sys.exit(survivors)


if __name__ == "__main__":
    main()
