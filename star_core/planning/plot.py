"""How memory and compute grow with the length of a clip and with its size, as a picture (SVG)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape

from ..drawing import COLOURS
from .plan import Task
from .predict import fitting, predict

GIB, PETA = 2**30, 10**15
FRAMES = (1, 16, 32, 64, 96, 128, 192, 256)
SIZES = ((854, 480), (1280, 720), (1920, 1080), (2560, 1440), (3840, 2160))

WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 420, 300, 56, 40, 16, 48


@dataclass(frozen=True, kw_only=True)
class Panel:
    """Lines of (x, y) by name. y starts at 0."""

    title: str
    x: str
    y: str
    lines: dict[str, list[tuple[float, float]]]


def growth(task: Task, memory: int) -> str:
    """SVG: whole frames on the device, and what fits into `memory` bytes. Takes minutes."""
    panels = [
        _panels("frames", [(n, replace(task, frames=n)) for n in FRAMES], memory),
        _panels(
            "megapixels of the result",
            [(w * h / 1e6, replace(task, size=(w, h))) for w, h in SIZES],
            memory,
        ),
    ]
    return drawing([panel for pair in panels for panel in pair])


def _panels(x: str, points: Sequence[tuple[float, Task]], memory: int) -> tuple[Panel, Panel]:
    lines: dict[str, dict[str, list[tuple[float, float]]]] = {"bytes": {}, "flops": {}}
    for name, limit in (("uncurtailed", None), (f"fitted into {memory / GIB:g} GiB", memory)):
        for at, task in points:
            prediction = predict(fitting(task, limit))
            flops = sum(prediction.flops.values()) / PETA
            lines["bytes"].setdefault(name, []).append((at, prediction.peak / GIB))
            lines["flops"].setdefault(name, []).append((at, flops))
    return (
        Panel(title=f"memory by {x}", x=x, y="GiB on the device", lines=lines["bytes"]),
        Panel(title=f"compute by {x}", x=x, y="PFLOP", lines=lines["flops"]),
    )


def drawing(panels: Sequence[Panel]) -> str:
    """Panels in two columns."""
    rows = math.ceil(len(panels) / 2)
    parts = [
        f'<g transform="translate({i % 2 * WIDTH} {i // 2 * HEIGHT})">{_drawn(panel)}</g>'
        for i, panel in enumerate(panels)
    ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {2 * WIDTH} {rows * HEIGHT}" '
        f'font-family="sans-serif" font-size="12" fill="#333">'
        f'<rect width="100%" height="100%" fill="#fff"/>{"".join(parts)}</svg>\n'
    )


def _drawn(panel: Panel) -> str:
    points = [point for line in panel.lines.values() for point in line]
    steps = [_step(max(values)) for values in zip(*points, strict=True)]
    most = [
        math.ceil(max(v) / s) * s for v, s in zip(zip(*points, strict=True), steps, strict=True)
    ]

    def place(x: float, y: float) -> tuple[float, float]:
        across, up = x / most[0], y / most[1]
        return (
            round(LEFT + across * (WIDTH - LEFT - RIGHT), 1),
            round(HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM), 1),
        )

    def text(x: float, y: float, words: str, anchor: str = "middle", more: str = "") -> str:
        return f'<text x="{x}" y="{y}" text-anchor="{anchor}" {more}>{escape(words)}</text>'

    title = f"{panel.title}, {panel.y}"
    parts = [text(LEFT, 16, title, "start", 'font-weight="bold"')]
    (left, bottom), (right, _) = place(0, 0), place(most[0], 0)
    for i in range(int(most[1] / steps[1]) + 1):
        y = place(0, i * steps[1])[1]
        parts.append(f'<path d="M{left} {y}H{right}" stroke="#ddd"/>')
        parts.append(text(left - 6, y + 4, f"{i * steps[1]:g}", "end"))
    for i in range(int(most[0] / steps[0]) + 1):
        parts.append(text(place(i * steps[0], 0)[0], bottom + 16, f"{i * steps[0]:g}"))
    parts.append(text((left + right) / 2, HEIGHT - 12, panel.x))
    for i, (colour, (name, line)) in enumerate(zip(COLOURS, panel.lines.items(), strict=False)):
        placed = [place(*point) for point in line]
        path = "L".join(f"{x} {y}" for x, y in placed)
        parts.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x}" cy="{y}" r="3" fill="{colour}"/>' for x, y in placed]
        parts.append(text(LEFT + 110 * i, 32, name, "start", f'style="fill:{colour}"'))
    return "".join(parts)


def _step(most: float) -> float:
    """Between ticks: 1, 2 or 5 of a power of ten, so that there are four to ten."""
    power = 10.0 ** math.floor(math.log10(most / 4)) if most > 0 else 1.0
    return next(power * n for n in (5, 2, 1) if most / (power * n) >= 4 or n == 1)
