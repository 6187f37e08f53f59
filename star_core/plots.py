"""Figures for documents and the command line, drawn by matplotlib without pyplot's global state.

Plots that nodes show are drawn by `drawing`, because ComfyUI comes with Pillow alone.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .drawing import COLOURS, GRID, INK

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Places of a label beside its point: offset in pixels, horizontal and vertical alignment.
PLACES = (
    (10, 0, "left", "center"),
    (-10, 0, "right", "center"),
    (0, 9, "center", "bottom"),
    (0, -9, "center", "top"),
    (9, 14, "left", "center"),
    (9, -14, "left", "center"),
    (-9, 14, "right", "center"),
    (-9, -14, "right", "center"),
)


@dataclass(frozen=True, kw_only=True)
class Point:
    """A labelled point of `scatter`; one that is not finite or has x <= 0 is not drawn."""

    name: str
    x: float
    y: float


@dataclass(frozen=True, kw_only=True)
class Panel:
    """Axes of `line_panels`. x, y: their titles. lines: points (x, y) by name of the line."""

    title: str
    x: str
    y: str
    lines: dict[str, list[tuple[float, float]]]


def write_figure(figure: "Figure", path: str | Path) -> None:
    """Writes a figure to a file in the format that its suffix names; text in SVG stays text."""
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "star"}):
        figure.savefig(path, metadata={"Date": None})


def scatter(
    series: Mapping[str, Sequence[Point]],
    *,
    x_title: str,
    y_title: str,
    width: int = 960,
    height: int = 480,
) -> "Figure":
    """Returns a scatter plot with logarithmic x, a colour and a marker for each series.

    series: points by name of the series, at most four. width, height: in pixels. ValueError if no
    point can be drawn or matplotlib is not installed.
    """
    drawn = {
        name: [point for point in points if math.isfinite(point.y) and point.x > 0]
        for name, points in series.items()
    }
    every = [point for points in drawn.values() for point in points]
    if not every:
        raise ValueError("there is no finite value to plot")
    figure, (axes,) = _figure(width, height)
    axes.set_title(y_title, loc="left")
    axes.set_xlabel(x_title)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    first = math.floor(math.log10(min(point.x for point in every)))
    last = max(math.ceil(math.log10(max(point.x for point in every))), first + 1)
    axes.set_xlim(10.0**first, 10.0**last)
    for (name, points), colour, marker in zip(drawn.items(), COLOURS, "os^p", strict=False):
        x, y = [point.x for point in points], [point.y for point in points]
        axes.plot(x, y, marker, color=colour, markersize=8, label=name, clip_on=False)
    axes.legend(
        loc="lower right", bbox_to_anchor=(1, 1), ncols=4, frameon=False, labelcolor="linecolor"
    )
    _label(figure, axes, every)
    return figure


def spreads(values: Mapping[str, Sequence[float]], *, title: str, width: int = 960) -> "Figure":
    """Returns a plot with a row for each name: its values as circles, their mean as a bar.

    width: in pixels. ValueError if matplotlib is not installed.
    """
    figure, (axes,) = _figure(width, 90 + 30 * len(values))
    axes.set_title(title, loc="left")
    axes.grid(visible=False, axis="y")
    axes.set_yticks(range(len(values)), list(values))
    axes.set_ylim(len(values) - 0.5, -0.5)
    for row, numbers in enumerate(values.values()):
        axes.plot(numbers, [row] * len(numbers), "o", color=COLOURS[0], markerfacecolor="none")
        axes.plot(statistics.fmean(numbers), row, "|", color=COLOURS[1], ms=16, mew=3)
    return figure


def line_panels(panels: Sequence[Panel]) -> "Figure":
    """Returns line plots in two columns; both axes start at 0.

    ValueError if matplotlib is not installed.
    """
    rows = math.ceil(len(panels) / 2)
    figure, every = _figure(840, 300 * rows, rows, 2)
    for axes, panel in zip(every, panels, strict=False):
        axes.set_title(panel.title, loc="left", fontweight="bold")
        axes.set_xlabel(panel.x)
        axes.set_ylabel(panel.y)
        for colour, (name, points) in zip(COLOURS, panel.lines.items(), strict=False):
            x, y = zip(*points, strict=True)
            axes.plot(x, y, "o-", color=colour, label=name)
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False, labelcolor="linecolor")
    return figure


def _figure(
    width: int, height: int, rows: int = 1, columns: int = 1
) -> tuple["Figure", list["Axes"]]:
    """Returns an empty figure, with sides in pixels, and its axes in reading order."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("plots need matplotlib: `pip install matplotlib`") from error
    figure = Figure((width / 100, height / 100), dpi=100, layout="constrained")
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in grid:
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0, labelcolor=INK)
        axes.tick_params(which="minor", length=0)
        axes.grid(color=GRID)
        axes.set_axisbelow(True)
    return figure, grid


def _label(figure: "Figure", axes: "Axes", points: Sequence[Point]) -> None:
    """Labels each point in the first place that is free of other labels and points."""
    from matplotlib.transforms import Bbox

    figure.draw_without_rendering()  # lays out the axes
    centres = axes.transData.transform([(point.x, point.y) for point in points])
    occupied = [Bbox.from_extents(x - 6, y - 6, x + 6, y + 6) for x, y in centres]
    for point in points:
        labels = [
            axes.annotate(
                point.name, (point.x, point.y), (dx, dy), textcoords="offset pixels", ha=ha, va=va
            )
            for dx, dy, ha, va in PLACES
        ]
        boxes = [label.get_window_extent() for label in labels]
        free = (i for i, box in enumerate(boxes) if not box.count_overlaps(occupied))
        chosen = next(free, 0)
        occupied.append(boxes[chosen])
        for label in labels[:chosen] + labels[chosen + 1 :]:
            label.remove()
