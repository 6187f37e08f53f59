"""Finds words in the pictures that `star_core.drawing` makes."""

import torch
import torch.nn.functional as F
from torch import Tensor

from star_core.drawing import INK, paper, picture_of


def places_of(words: str, picture: Tensor, colour: str = INK) -> list[tuple[int, int]]:
    """Column and row of the upper left corner of each place where words of that colour stand."""
    image, draw = paper(len(words) * 20 + 40, 40)
    draw.text((10, 10), words, colour)
    drawn, ink = 1 - picture_of(image), 1 - picture
    rows, columns = drawn.amax((0, 2)).nonzero(), drawn.amax((0, 1)).nonzero()
    sought = drawn[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    squares = F.conv2d(ink[None] ** 2, torch.ones_like(sought)[None])
    apart = squares - 2 * F.conv2d(ink[None], sought[None]) + (sought**2).sum()
    # One letter of 20 that differs makes several hundredths.
    found = (apart[0, 0] < 0.01 * (sought**2).sum()).nonzero()
    return [(int(column), int(row)) for row, column in found]
