"""The claims: statistics against scipy, equal budgets, what rows change; a whole one, stopped."""

import json
import math
import shutil

import claims
import pytest
import torch
import variants
from scipy import stats

import rl
from sample import replay
from sft import add_noise
from utils import UserError

ALL = [f"C{n}" for n in range(1, 9)]


def test_paired_statistics_are_scipys(gen):
    before, after = torch.randn(2, 5, 7, generator=gen, dtype=torch.float64)
    mean, width, p = claims.paired(after - before)
    tests = [stats.ttest_rel(after.mean(i), before.mean(i)) for i in (0, 1)]
    low, high = torch.tensor([test.confidence_interval(0.95) for test in tests]).T
    assert mean == pytest.approx((after - before).mean().item())
    assert width == pytest.approx((high - low).max().item() / 2)
    assert (high - low)[0] != (high - low)[1]
    assert p == pytest.approx(max(test.pvalue for test in tests)) and p != tests[0].pvalue
    mean, width, p = claims.paired((after - before)[:1])  # one seed says nothing about others
    assert width > 0 and math.isnan(p)
    mean, width, p = claims.paired(torch.tensor([[1.0], [3.0]]))  # a score of the set
    assert mean == 2 and math.isnan(p) and width == pytest.approx(12.706, 1e-3)


def test_crops_of_a_photograph_are_averaged_first():
    names = ["a@2x@0,0", "a@3x@0,0", "a@2x@0,64", "a@2x@64,0"]
    values = torch.tensor([0.0, 20, math.nan, 4])
    assert claims.by_photograph(values, names).tolist() == [2, 20]
    assert claims.by_photograph(values[:1], names).tolist() == [0]


def test_a_table_has_differences_of_rows_and_the_gain_beside_the_front():
    def row(psnr_y, lpips):
        return {"psnr_y": torch.tensor(psnr_y), claims.LPIPS: torch.tensor(lpips)}
    base = {"lq": row([[20.0, 20.0]], [[0.5, 0.5]]), "sft": row([[26.0, 28.0]], [[0.2, 0.2]]),
            "sft, 9 steps": row([[25.9, 27.9]], [[0.19, 0.19]]),
            "sft, 16 steps": row([[25.0, 27.0]], [[0.16, 0.16]])}
    models = {"x": row([[25.9, 27.9]] * 2, [[0.17, 0.17]] * 2),
              "y": row([[26.0, 28.0], [26.0, 28.001]], [[0.18, 0.20], [0.18, 0.20]])}
    change, sft, front = claims.changes_of(base, models)
    assert sft["psnr_y"] == 27 and list(front) == ["SFT, 9 steps", "SFT, 16 steps"]
    assert claims.lost_and_gained(front)[1] == pytest.approx((0.1, 0.01), rel=1e-3)
    lines = claims.table_rows(change, sft, front, {"x": [1.0, 2.0], "y": [0, 2.0]})
    assert lines["x"]["minutes"] == "1.5" and "minutes" not in lines["y (1 of 2 kept)"]
    assert list(lines) == ["SFT", "x", "SFT, 9 steps", "y (1 of 2 kept)", "x minus y"]
    assert lines["SFT, 9 steps"][claims.LPIPS] == "-0.0100"
    assert lines["x"]["x front"] == "3.0 (+0.0200 ± 0.0000)"
    assert lines["x minus y"][claims.LPIPS].startswith("-0.02 ± 0.13, p 0.3")
    points = claims.lost_and_gained({"a": {"psnr_y": 0.1, claims.LPIPS: -0.02}})  # better by both
    better = {key: x.new_tensor([[0.0]]) - 0.01 for key, x in change["x"].items()}
    better["psnr_y"] = torch.tensor([[0.05]])
    assert claims.beside_front(better, points) == "0.5 (-0.0100)"
    for psnr_y in (0.2, -0.2):
        better["psnr_y"] = torch.tensor([[psnr_y]])
        assert claims.beside_front(better, points) == "front ends before"


@pytest.mark.parametrize("claim", ALL)
def test_budgets_are_equal_but_where_the_claim_is_about_them(claim):
    cfg = claims.Config(rewards=["judge", "judge:old"], models=["", "other"])
    rows = claims.plan(claim, cfg)  # which refuses unequal budgets, and two rows that share a run
    assert {name for name, row in rows.items() if row.apart} == {x for x in rows if "*" in x}
    assert all(row.method in variants.METHODS and row.cfg.reward != "judge2"
               for row in rows.values())
    assert any(row.apart for row in rows.values()) == (claim == "C7")


def test_unequal_budgets_and_unknown_rows_are_refused(command):
    for claim, changes, message in (
            ("C7", {"inputs": 100}, "budgets differ"), ("C3", {"only": ["x"]}, "adaptive; RL only"),
            ("C5", {"models": []}, "no rows"), ("C5", {"models": ["a/b", "a_b"]}, "one run")):
        with pytest.raises(UserError, match=message):
            claims.plan(claim, claims.Config(**changes))
    for words in (["C9"], ["C1", "C2"], ["C1", "--seeds", "x"], ["C1", "--seeds"],
                  ["C1", "--seeds", "1", "01"], ["C1", "--seeds", "²"]):
        with pytest.raises(UserError, match="give one claim"):
            command(claims, *words)


def test_half_of_the_inputs_have_rl():
    distance = torch.tensor([0.1, 0.4, 0.2, 0.3, math.nan])
    hard, easy = (variants.half(x)("baseline", distance, None, distance) for x in (True, False))
    assert hard.tolist() == [0, 1, 0, 1, 0] and easy.tolist() == [1, 0, 1, 0, 0]


def test_the_likelihood_of_hq_is_the_divergence_of_two_gaussians(step_args):
    restorer, reference, cfg, parts = step_args
    path, k = parts["path"], 2
    loss, info = variants.likelihood(restorer, reference, cfg, parts, k)
    a, b = path.alpha_bar[k]
    z_t = add_noise(parts["z0"], parts["eps"], a.expand(3))
    sigma = path.sigma_t[k]
    mean = b.sqrt() * parts["z0"] + (1 - b - sigma ** 2).sqrt() * parts["eps"]
    z = path.z.clone()
    z[k] = z_t
    own = replay(restorer, path._replace(z=z), k, cfg.eta)
    gap = torch.distributions.kl_divergence(torch.distributions.Normal(mean, sigma),
                                            torch.distributions.Normal(own.mean, sigma))
    expected = (1 - parts["weight"]) * 0.3 * gap.flatten(1).mean(1)
    torch.testing.assert_close(info["terms"]["sft"], expected.mean())
    plain, before = rl.step_loss(restorer, reference, cfg, parts, k)
    torch.testing.assert_close(loss, plain - before["terms"]["sft"] + expected.mean())


def test_a_step_counts_by_its_noise_and_the_noisiest_train(step_args):
    *rest, parts = step_args
    sigma, k = parts["path"].sigma_t, 1
    _, info = variants.by_sigma(*rest, parts, k)
    more = parts | {"advantage": parts["advantage"] * sigma[k] / sigma[:4].mean()}
    torch.testing.assert_close(info["terms"]["rl"], rl.step_loss(*rest, more, k)[1]["terms"]["rl"])
    found, rewards = variants.noisiest(2, lambda *args: ([parts], "rewards"))()
    assert found[0]["path"].usable == [0, 1] and parts["path"].usable == [0, 1, 2, 3]
    assert rewards == "rewards" and found[0]["path"].z is parts["path"].z


@pytest.fixture
def call(tmp_path, tiny_restorer, photo_folder, monkeypatch, command):
    """Calls claims.py on a tiny restorer with toy metrics -> its settings of runs that trained."""
    tiny_restorer().save(tmp_path / "start")
    seen, plain = [], rl.train

    def toy(images, refs=None):
        seen.append(len(images))
        return images.mean((1, 2, 3))

    def train(cfg, step_loss):
        trained.append(cfg)
        seen.clear()
        plain(cfg, step_loss)
        if not cfg.resume:  # of at most 64 validation crops, this photograph has 8
            looks = 1 + math.ceil(cfg.iterations / rl.LOOK_EVERY)
            assert sum(seen) == claims.budget(cfg)[1] - (64 - 8) * looks
    trained = []
    monkeypatch.setattr(rl, "load_reward", lambda name, device: toy)
    monkeypatch.setattr(rl, "train", train)
    for module in (claims, variants):
        monkeypatch.setattr(module, "load_metrics", lambda names, device: dict.fromkeys(
            (claims.LPIPS, "judge2"), lambda x, y: (x - y).abs().mean((1, 2, 3))))

    def call(*words):
        trained.clear()
        fixed = "--tiny", "--model", tmp_path / "start", "--data", photo_folder, "--max-drop", 99
        command(claims, *words, *fixed, "--seeds", 170, 171, "--out", tmp_path / "out")
        return list(trained)
    return call


def but_last(table):
    """The lines of a table without its last column, the minutes."""
    return [line.rpartition(" | ")[0] + " |" for line in table.splitlines()]


def test_a_whole_claim_is_run_once_resumed_and_refused_if_changed(call, capsys, tmp_path):
    out, only = tmp_path / "out", ("--only", "adaptive", "half")
    assert len(call("C3", *only)) == 4
    text = capsys.readouterr().out
    assert text.startswith("C3: 4 of 4 runs to do, 16 updates, 672 reward calls, about 0 minutes")
    assert "C3: 3 of 4 runs to do" in text and "(measured)" in text
    table = (out / "C3-test.md").read_text(encoding="utf-8")
    assert table in text and "| adaptive minus half | " in table and (out / "C3-test.png").exists()
    assert call("C3", *only) == []  # the second call trains nothing
    assert (out / "C3-test.md").read_text(encoding="utf-8") == table
    file = out / "default/170/model/unet/diffusion_pytorch_model.safetensors"
    weights = file.read_bytes()
    (out / "default/170/metrics.csv").unlink()
    shutil.rmtree(out / "default/170/model")
    assert call("C3", *only) == []  # its scores are enough
    assert but_last((out / "C3-test.md").read_text(encoding="utf-8")) == but_last(table)
    (out / "default/170/test.json").unlink()  # as a run stopped behind its last checkpoint
    (cfg,) = call("C3", *only)
    assert cfg.resume and cfg.out == str(out / "default/170") and file.read_bytes() == weights
    with pytest.raises(UserError, match="its runs have lr 0.0006, not 0.1$"):
        call("C3", *only, "--lr", 0.1)
    saved = json.loads((out / "settings.json").read_text(encoding="utf-8"))
    (out / "settings.json").write_text(json.dumps(saved | {"weights/": "of another day"}))
    with pytest.raises(UserError, match="weights/ of another day"):
        call("C3", *only)


def test_the_hacking_curve_has_outside_metrics_at_each_look(call, tmp_path):
    assert len(call("C8", "--rewards", "toy", "--only", "toy, with SFT")) == 2
    (folder,) = (tmp_path / "out").glob("curve*/170")
    assert all("val_judge2" in row for row in claims.log(folder) if "val_reward" in row)
    row = claims.Row(None, "curve", folder.parent, False)
    course = claims.looks(row, ["170", "171"])
    steps = [[x["val_judge2"] for x in claims.log(folder.parent / seed) if "val_reward" in x]
             for seed in ("170", "171")]
    expected = [(a - steps[0][0] + b - steps[1][0]) / 2 for a, b in zip(*steps)]
    assert course["val_judge2"] == pytest.approx(expected) and course["val_reward"][0] == 0
    assert (tmp_path / "out/C8-test.png").exists()


@pytest.fixture
def stored(tmp_path, monkeypatch, command):
    """The lines of the table of a claim, words[0], from the published scores in a folder.

    pyiqa has no parameters: what it would measure lies in the scores."""
    monkeypatch.setattr(claims, "load_metrics", lambda names, device: {"judge": 0, "judge2": 0})

    def table(folder, *words):
        shutil.copytree(claims.ROOT / "results/scores" / folder, tmp_path / "out")
        command(claims, *words, "--out", tmp_path / "out")
        return but_last((tmp_path / f"out/{words[0]}-test.md").read_text(encoding="utf-8"))[2:]
    return table


C8 = "C8", "--only", "judge, with SFT", "judge, without"
BROAD = ("C8", "--rewards", "judge", "judge:weights/broad", *C8[1:],
         *(f"judge:weights/broad, {x}" for x in ("with SFT", "without")),
         "--seeds", "170", "171", "172", "173")
C5 = "C5", "--max-drop", "99", "--models", "runs/former/weights/sr", "runs/sft-latent/model"
PUBLISHED = (claims.ROOT / "results/README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("claim", (("C1",), ("C2",), ("C3",), ("C4",), C5, ("C6",), ("C7",), C8,
                                   BROAD))
def test_the_published_table_is_that_of_the_published_scores(claim, stored):
    lines = stored("C5" if claim == C5 else "claims", *claim)
    table = PUBLISHED.partition(f"\n| {claim[0]} | judge")[2].partition("\n\n")[0]
    published = table.splitlines()[2:]
    if claim[0] == "C8":  # the scores of one row are lost
        published = [row.replace(" (four seeds)", "") for row in published
                     if "lost" not in row and ("(four seeds)" in row) == (claim == BROAD)]
    assert len(published) >= (3 if claim == BROAD else 6) and set(published) <= set(lines)
    assert claim == BROAD or {x for x in lines if " minus " not in x} <= set(published)


@pytest.mark.parametrize("task", ("sr2", "deblur", "jpeg", "real"))
def test_the_published_control_is_that_of_the_published_scores(task, stored):
    rows = stored(f"C6-{task}", "C3", "--task", task, "--only", "adaptive", "SFT only")
    for name, published in (("adaptive", f"{task}, RL"), ("SFT only", f"{task}, SFT only"),
                            ("adaptive minus SFT only", "difference")):
        row = next(row for row in rows if row.startswith(f"| {name}"))
        assert but_last(row.replace(name, published))[0] + "\n" in PUBLISHED


def test_the_readme_has_what_the_default_runs_logged():
    runs = (claims.ROOT / "results/scores/claims/default").iterdir()
    rows = [row for folder in runs for row in claims.log(folder)[1:]]
    readme = (claims.ROOT / "README.md").read_text(encoding="utf-8")
    for key in ("spread", "approx_kl", "share_rl", "share_sft"):
        values = [row[key] for row in rows if key in row]
        text = f"{min(values):.1g} to {max(values):.1g}".replace("e-0", "e-")
        assert len(values) in (15, 60) and text in readme, key


def test_scores_of_other_photographs_and_a_run_without_its_model_are_named(tmp_path, stored):
    stored("C5", *C5)
    scores = tmp_path / "out/model=runs_sft-latent_model/170/test.json"
    scores.write_text('{"sft": {"judge": [0.1, 0.2]}}', encoding="utf-8")
    with pytest.raises(UserError, match="170/test.json: has scores of other photographs"):
        claims.main()
    scores.write_text('{"sft": {"judge": [0.1]}}', encoding="utf-8")
    with pytest.raises(UserError, match="170/model: is gone"):
        claims.main()
