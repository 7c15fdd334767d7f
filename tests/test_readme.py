"""The README says what the code does: line counts, logged columns, flags."""

import dataclasses
import re

import pytest
from conftest import ROOT

README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("name", sorted(f.name for f in ROOT.glob("*.py")))
def test_line_counts_are_true(name):
    row = re.search(rf"^\| `{name}` \| (\d+) \|", README, re.MULTILINE)
    assert row, f"{name} is not in the table of files"
    assert int(row[1]) == len((ROOT / name).read_text().splitlines())


def test_every_flag_in_the_readme_exists():
    import data
    import eval
    import model
    import reward
    import rl
    import sample
    import sft
    configs = [rl.Config, sft.Config, eval.Config, sample.Config, data.Config, data.BenchConfig, model.Config,
               reward.TrainConfig, reward.CheckConfig, reward.ScoreConfig]
    known = {"--" + f.name.replace("_", "-") for c in configs for f in dataclasses.fields(c)} | {"--help"}
    known |= {"--no-" + f.name.replace("_", "-") for c in configs for f in dataclasses.fields(c) if f.default is True}
    used = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+(?!\w)", README))
    assert used and used <= known, used - known


def test_stated_defaults_are_true():
    import rl
    rows = re.findall(r"^\| `--([a-z-]+)` \| ([^|]+) \|", README, re.MULTILINE)
    assert len(rows) >= 8
    for flag, value in rows:
        assert str(getattr(rl.Config(), flag.replace("-", "_"))) == value.strip().strip("`"), flag
