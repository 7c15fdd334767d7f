"""What the lessons share: the scripts of the folder above on the path, photographs, pictures."""

import functools
import io
import sys
from pathlib import Path

from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parent.parent))

from data import TASKS, held_out, shipped  # noqa: E402
from utils import UserError, atomic, run_main, to_uint8  # noqa: E402


@functools.cache
def crops(count):
    """(lq, hq) of x4 super-resolution, (count, 3, 64, 64) in [-1, 1], of validation photographs."""
    return held_out(shipped("val"), TASKS["sr"], 64, count)[:2]


def panels(rows, columns, width, height):
    """A figure and its axes (rows, columns), each of width x height inches."""
    figure = Figure((width * columns, height * rows), dpi=80, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def draw(axis, image, title=""):
    """An image (3, H, W) in [-1, 1] on an axis."""
    axis.imshow(to_uint8(image).permute(1, 2, 0).numpy(), interpolation="nearest")
    axis.set_title(title, fontsize=8)
    axis.set(xticks=[], yticks=[])


class Picture:
    """A figure as PNG, which a notebook shows by itself."""

    def __init__(self, figure):
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
        self.png = buffer.getvalue()

    def _repr_png_(self):
        return self.png


def main(show):
    """Writes the picture of a lesson; where a hole is open, one line and exit code 2."""
    lesson = Path(sys.argv[0]).stem

    def write():
        try:
            picture = show()
        except NotImplementedError as hole:
            raise UserError(f"{lesson}.py: {hole}") from None
        path = Path("runs/course", f"{lesson}.png")
        with atomic(path) as temporary:
            temporary.write_bytes(picture.png)
        print(f"wrote {path}")
    run_main(write)
