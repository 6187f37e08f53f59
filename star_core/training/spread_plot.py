"""How far repeated measurements scatter, as a picture."""

import statistics
from collections.abc import Mapping, Sequence

from torch import Tensor

from ..drawing import COLOURS, GRID, INK, paper, picture_of, ticks

ROW = 30


def spreads(values: Mapping[str, Sequence[float]], *, title: str, width: int = 960) -> Tensor:
    """A row a name, its values as dots and their mean as a line: a picture (3 h w) in [0, 1].

    ValueError without Pillow.
    """
    every = [value for row in values.values() for value in row]
    low, high, marks = ticks(min(every), max(every))
    left, top, right = 260, 50, width - 30
    bottom = top + ROW * len(values)
    image, draw = paper(width, bottom + 40)
    draw.text((left, 14), title, INK)

    def across(value: float) -> float:
        return left + (right - left) * (value - low) / (high - low)

    for mark in marks:
        draw.line((across(mark), top, across(mark), bottom), GRID)
        draw.text((across(mark), bottom + 8), f"{mark:.4g}", INK, anchor="ma")
    for number, (name, row) in enumerate(values.items()):
        y, mean = top + ROW * (number + 0.5), across(statistics.fmean(row))
        draw.text((left - 12, y), name, INK, anchor="rm")
        for x in map(across, row):
            draw.ellipse((x - 4, y - 4, x + 4, y + 4), outline=COLOURS[0], width=2)
        draw.line((mean, y - 10, mean, y + 10), COLOURS[1], 3)
    return picture_of(image)
