"""How far repeated measurements scatter, as a picture."""

import statistics
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from ..curves import COLOURS, GRID, INK, PAPER, ticks

ROW = 30


def spreads(values: Mapping[str, Sequence[float]], *, title: str, width: int = 960) -> Tensor:
    """A row a name, its values as dots and their mean as a line: a picture (3 h w) in [0, 1].

    ValueError without Pillow.
    """
    try:
        from PIL import Image, ImageDraw, ImageFont
    except ImportError as error:
        raise ValueError("plots need Pillow: `pip install pillow`") from error
    every = [value for row in values.values() for value in row]
    low, high, marks = ticks(min(every), max(every))
    left, top, right = 260, 50, width - 30
    bottom = top + ROW * len(values)
    image = Image.new("RGB", (width, bottom + 40), PAPER)
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(14)
    draw.text((left, 14), title, INK, font)

    def across(value: float) -> float:
        return left + (right - left) * (value - low) / (high - low)

    for mark in marks:
        draw.line((across(mark), top, across(mark), bottom), GRID)
        draw.text((across(mark), bottom + 8), f"{mark:.4g}", INK, font, anchor="ma")
    for number, (name, row) in enumerate(values.items()):
        y, mean = top + ROW * (number + 0.5), across(statistics.fmean(row))
        draw.text((left - 12, y), name, INK, font, anchor="rm")
        for x in map(across, row):
            draw.ellipse((x - 4, y - 4, x + 4, y + 4), outline=COLOURS[0], width=2)
        draw.line((mean, y - 10, mean, y + 10), COLOURS[1], 3)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
