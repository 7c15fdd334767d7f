"""The course: tests fail while holes are open, pass with the solutions; the notebook runs."""

import ast
import csv
import dataclasses
import importlib
import json
import re
import shutil

import pytest
from test_scripts import ROOT, run

import rl

COURSE = ROOT / "course"
LESSONS = [f"lesson{number}" for number in range(1, 7)]
README = (COURSE / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def copy(tmp_path):
    """A folder with a copy of the course alone; the scripts are found by PYTHONPATH."""
    shutil.copytree(COURSE, tmp_path / "course", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def test_every_test_of_a_lesson_fails_until_its_holes_are_filled(copy):
    done = run("-m", "pytest", "-q", folder=copy, path=ROOT)
    assert done.returncode == 5  # not collected from above
    done = run("-m", "pytest", "course", "-q", "--tb=line", folder=copy, path=ROOT)
    open_holes = re.findall(r"E   NotImplementedError: hole \d, \w+, is not filled", done.stdout)
    failed = re.findall(r"FAILED course/test_(lesson\d)", done.stdout)
    assert done.stdout.splitlines()[-1].startswith(f"{len(open_holes)} failed in"), done.stdout
    assert set(failed) == set(LESSONS)


@pytest.mark.parametrize("lesson", LESSONS)
def test_a_lesson_finds_the_scripts_by_itself(lesson):
    done = run(f"course/{lesson}.py")
    assert done.returncode == 2 and done.stderr.endswith("is not filled yet\n"), done.stderr


def test_the_solutions_fill_the_holes(copy):
    for lesson in LESSONS:
        path = copy / "course" / f"{lesson}.py"
        answer = (COURSE / "solutions" / f"{lesson}.py").read_text(encoding="utf-8")
        tree = ast.parse(answer)
        imports = [x for x in tree.body if isinstance(x, ast.Import | ast.ImportFrom)]
        assert {x.names[0].name for x in imports} <= {"math", "torch"}  # nothing of the scripts
        text = path.read_text(encoding="utf-8")
        holes = {hole for hole in re.findall(r"hole \d, (\w+), is not", text)}
        assert holes == {x.name for x in tree.body if isinstance(x, ast.FunctionDef)}
        path.write_text(text + answer, encoding="utf-8")  # the later definition counts
    done = run("-m", "pytest", "course", "-q", "-x", folder=copy, path=ROOT)
    assert done.returncode == 0, done.stdout


def test_the_notebook_is_made_of_the_course_and_runs_from_top_to_bottom(tmp_path):
    out = tmp_path / "course.ipynb"
    done = run("course/make_notebook.py", "--crops", "2", "--out", out)
    assert done.returncode == 0, done.stderr
    made, kept = (json.loads(path.read_text(encoding="utf-8"))
                  for path in (out, COURSE / "course.ipynb"))
    for book in (made, kept):
        pictures = [cell.pop("outputs") for cell in book["cells"] if cell.get("outputs")]
        assert len(pictures) == 6  # PNGs, in base64
        assert all(x["data"]["image/png"].startswith("iVBOR") for x, in pictures)
        for cell in book["cells"]:
            cell.pop("outputs", None)
    assert made == kept, "run python course/make_notebook.py"


def test_the_readme_names_what_there_is():
    assert len(README.splitlines()) <= 200
    scripts = "data|difficulty|eval|model|reward|rl|sample|sft"
    for name, attribute in re.findall(rf"`({scripts})\.(?!py`)(\w+)`", README):
        assert hasattr(importlib.import_module(name), attribute), f"{name}.{attribute}"
    columns = set()
    for name in ("sr-154-metrics.csv", "sr-154-scores.csv"):
        with open(ROOT / "results" / name, encoding="utf-8") as file:
            columns |= set(next(csv.reader(file)))
    rows = re.findall(r"(?m)^\| `.*", README.partition("## When a run goes wrong")[2])
    assert len(rows) >= 8
    for row in rows:
        assert set(re.findall(r"`(\w[\w:]*)`", row.split(" | ")[0])) <= columns, row
    flags = {"--" + field.name.replace("_", "-") for field in dataclasses.fields(rl.Config)}
    assert set(re.findall(r"--\w[\w-]*", "".join(rows))) <= flags
