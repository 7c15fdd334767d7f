"""Makes course.ipynb from README.md, the lessons and their solutions, and runs it for its pictures.

A lesson is its part of the README, its file with the holes, its solution (folded), its picture.

    python course/make_notebook.py
"""

import base64
import json
import re
from dataclasses import dataclass
from pathlib import Path

import kit  # noqa: F401  (the scripts of the folder above)
from utils import atomic, option, parse, run_main

HERE = Path(__file__).parent
START = """# ruff: noqa: E402, F811  (a lesson's functions are there twice)
import kit  # puts the scripts of the folder above on the path

CROPS = 16  # to look at"""
ANSWER = "# The solution. To see what your own does, leave this cell out.\n"


def lesson_cells(number):
    """[(kind, source)] of lesson `number`, without what only runs it as a script."""
    lesson = (HERE / f"lesson{number}.py").read_text(encoding="utf-8")
    solution = (HERE / f"solutions/lesson{number}.py").read_text(encoding="utf-8")
    return [("code", lesson.partition("\n\n\nif __name__")[0]),
            ("code", ANSWER + solution.partition("\n\n")[2].strip()), ("code", "show(CROPS)")]


def cells():
    """[(kind, source)] of the whole notebook; kind: markdown or code."""
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    intro, *sections = re.split(r"(?m)^(?=## )", readme)
    found = [("markdown", intro.strip()), ("code", START)]
    for section in sections:
        found.append(("markdown", section.strip()))
        if section[3].isdigit():
            found += lesson_cells(section[3])
    return found


def run(found, crops):
    """Runs the code in one namespace, as a notebook does -> the PNG or None of each cell."""
    space, pictures = {"__name__": "notebook"}, []
    for kind, source in found:
        if source == "show(CROPS)":
            pictures.append(eval(source, space | {"CROPS": crops}).png)
            continue
        pictures.append(None)
        if kind == "code":
            exec(source, space)
    return pictures


def notebook(found, pictures):
    """The file as nbformat 4.5 wants it."""
    entries = []
    for number, ((kind, source), png) in enumerate(zip(found, pictures)):
        entry = {"cell_type": kind, "id": f"cell-{number}", "metadata": {},
                 "source": source.splitlines(True)}
        if kind == "code":
            image = {"image/png": base64.b64encode(png).decode()} if png else {}
            outputs = [{"output_type": "display_data", "data": image, "metadata": {}}] * bool(png)
            entry |= {"execution_count": None, "outputs": outputs}
        if source.startswith(ANSWER):
            entry["metadata"] = {"jupyter": {"source_hidden": True}}
        entries.append(entry)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {"cells": entries, "metadata": {"kernelspec": kernel}, "nbformat": 4,
            "nbformat_minor": 5}


@dataclass
class Config:
    """Makes the notebook of the course."""
    out: str = option(str(HERE / "course.ipynb"), "the file to write")
    crops: int = option(16, "crops that a picture looks at", least=2)


def main():
    cfg, found = parse(Config), cells()
    text = json.dumps(notebook(found, run(found, cfg.crops)), indent=1, ensure_ascii=False)
    with atomic(cfg.out) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
    print(f"wrote {cfg.out}")


if __name__ == "__main__":
    run_main(main)
