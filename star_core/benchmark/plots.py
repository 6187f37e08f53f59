"""Quality against time as a picture."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from ..drawing import COLOURS, GRID, INK, paper, picture_of, ticks


@dataclass(frozen=True, kw_only=True)
class Point:
    """A method's name, its time (above 0) and its quality; drawn unless one is not finite."""

    name: str
    x: float
    y: float


def scatter(
    series: Mapping[str, Sequence[Point]],
    *,
    x_title: str,
    y_title: str,
    width: int = 960,
    height: int = 480,
) -> Tensor:
    """One colour and shape a series, logarithmic in x: a picture (3 h w) in [0, 1].

    At most four series. ValueError if nothing can be drawn, and without Pillow.
    """
    finite = [
        point
        for points in series.values()
        for point in points
        if math.isfinite(point.y) and point.x > 0
    ]
    if not finite:
        raise ValueError("there is no finite value to plot")
    first = math.floor(math.log10(min(point.x for point in finite)))
    last = max(math.ceil(math.log10(max(point.x for point in finite))), first + 1)
    low, high, marks = ticks(min(point.y for point in finite), max(point.y for point in finite))
    left, top, right, bottom = 80, 48, width - 130, height - 56

    def place(x: float, y: float) -> tuple[float, float]:
        across = left + (right - left) * (math.log10(x) - first) / (last - first)
        return across, bottom - (bottom - top) * (y - low) / (high - low)

    image, draw = paper(width, height)
    for value in marks:
        y = place(10**first, value)[1]
        draw.line((left, y, right, y), GRID)
        draw.text((left - 8, y), f"{value:.4g}", INK, anchor="rm")
    for power in range(first, last + 1):
        x = place(10**power, low)[0]
        draw.line((x, top, x, bottom), GRID)
        draw.text((x, bottom + 8), f"{10.0**power:g}", INK, anchor="ma")
    draw.text(((left + right) / 2, bottom + 30), x_title, INK, anchor="ma")
    draw.text((left, 14), y_title, INK)
    labels: list[tuple[tuple[float, float], str]] = []
    key = right
    for (name, points), colour, sides in reversed(
        list(zip(series.items(), COLOURS, (0, 4, 3, 5), strict=False))
    ):
        key -= draw.textlength(name)
        draw.text((key, 14), name, colour)
        key -= 12
        _mark(draw, (key, 22), sides, colour)
        key -= 24
        for point in points:
            if math.isfinite(point.y) and point.x > 0:
                _mark(draw, place(point.x, point.y), sides, colour)
                labels.append((place(point.x, point.y), point.name))
    taken = [(x - 6, y - 6, x + 6, y + 6) for (x, y), _ in labels]
    for spot, text in labels:
        taken.append(_label(draw, spot, text, taken))
    return picture_of(image)


Box = tuple[float, float, float, float]


def _label(draw, place: tuple[float, float], text: str, taken: Sequence[Box]) -> Box:
    """Beside the mark, where no other label or mark is if there is such a place."""
    x, y = place
    places = [(9, 0, "lm"), (-9, 0, "rm"), (0, -9, "mb"), (0, 9, "mt"), (9, -14, "lm")]
    places += [(9, 14, "lm"), (-9, -14, "rm"), (-9, 14, "rm")]
    boxes = [draw.textbbox((x + dx, y + dy), text, anchor=a) for dx, dy, a in places]
    free = (i for i, box in enumerate(boxes) if not any(_overlap(box, other) for other in taken))
    chosen = next(free, 0)
    dx, dy, anchor = places[chosen]
    draw.text((x + dx, y + dy), text, INK, anchor=anchor)
    return boxes[chosen]


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _mark(draw, place: tuple[float, float], sides: int, colour: str) -> None:
    """A disc (0 sides) or a polygon, so that series differ without colours too."""
    if sides:
        draw.regular_polygon((*place, 7), sides, fill=colour)
    else:
        x, y = place
        draw.ellipse((x - 5, y - 5, x + 5, y + 5), fill=colour)
