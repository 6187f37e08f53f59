"""Draws curves of per-frame values."""

import math
from collections.abc import Mapping, Sequence

from torch import Tensor

from ..drawing import COLOURS, GRID, INK, paper, picture_of, ticks


def curves(
    values: Mapping[str, Sequence[float]],
    *,
    title: str,
    width: int = 960,
    height: int = 360,
) -> Tensor:
    """Draws a curve over frame numbers for each name; returns a picture (3 h w) in [0, 1].

    values: by name, at most six curves; nan and inf leave a gap. width, height: in pixels, at least
    200. ValueError for anything else, or if Pillow is not installed.
    """
    if not 1 <= len(values) <= len(COLOURS):
        raise ValueError(f"one to {len(COLOURS)} curves can be drawn, got {len(values)}")
    if min(width, height) < 200:
        raise ValueError(f"a plot needs at least 200x200 pixels, got {width}x{height}")
    image, draw = paper(width, height)
    finite = [v for curve in values.values() for v in curve if math.isfinite(v)]
    low, high, marks = ticks(min(finite, default=0.0), max(finite, default=1.0))
    last = max(max((len(curve) for curve in values.values()), default=1) - 1, 1)
    left, top, right, bottom = 80, 44, width - 24, height - 52

    def pixel(frame: float, value: float) -> tuple[float, float]:
        x = left + (right - left) * frame / last
        return x, bottom - (bottom - top) * (value - low) / (high - low)

    for tick in marks:
        y = pixel(0, tick)[1]
        draw.line((left, y, right, y), GRID)
        draw.text((left - 8, y), f"{tick:.6g}", INK, anchor="rm")
    for frame in ticks(0, last)[2]:
        if frame <= last and frame == int(frame):
            x = pixel(frame, low)[0]
            draw.line((x, bottom, x, bottom + 4), INK)
            draw.text((x, bottom + 8), f"{frame:.0f}", INK, anchor="ma")
    draw.line((left, bottom, right, bottom), INK)
    draw.text(((left + right) // 2, bottom + 28), "frame", INK, anchor="ma")
    draw.text((left, 14), title, INK)
    x = right
    for colour, (name, curve) in reversed(list(zip(COLOURS, values.items(), strict=False))):
        x -= math.ceil(draw.textlength(name))
        draw.text((x, 14), name, colour)
        x -= 30
        draw.line((x, 22, x + 22, 22), colour, 3)
        x -= 16
        for run in _runs(curve):
            points = [pixel(frame, curve[frame]) for frame in run]
            if len(points) > 1:
                draw.line(points, colour, 2, joint="curve")
            for px, py in points if len(points) < 3 else ():
                draw.ellipse((px - 2, py - 2, px + 2, py + 2), colour)
    return picture_of(image)


def _runs(curve: Sequence[float]) -> list[list[int]]:
    """Returns the runs of successive frames that have a finite value."""
    runs: list[list[int]] = [[]]
    for frame, value in enumerate(curve):
        if math.isfinite(value):
            runs[-1].append(frame)
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]
