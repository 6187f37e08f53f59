"""Draws how memory and compute grow with the length of a clip and with its size."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ..plots import Panel, line_panels
from .plan import Task
from .predict import fitting, predict

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GIB, PETA = 2**30, 10**15
FRAMES = (1, 16, 32, 64, 96, 128, 192, 256)
SIZES = ((854, 480), (1280, 720), (1920, 1080), (2560, 1440), (3840, 2160))


def growth(task: Task, memory: int) -> "Figure":
    """Returns plots of peak memory and FLOPs by frames and by megapixels. Takes minutes.

    task: what is varied. memory: bytes on the device; a line without a limit is drawn beside that
    of the plans that fit. ValueError if matplotlib is not installed.
    """
    by_frames = [(n, replace(task, frames=n)) for n in FRAMES]
    by_size = [(w * h / 1e6, replace(task, size=(w, h))) for w, h in SIZES]
    return line_panels(
        [
            *_panels("frames", by_frames, memory),
            *_panels("megapixels of the result", by_size, memory),
        ]
    )


def _panels(x: str, points: Sequence[tuple[float, Task]], memory: int) -> tuple[Panel, Panel]:
    """Returns the panels of memory and of compute over x."""
    lines: dict[str, dict[str, list[tuple[float, float]]]] = {"bytes": {}, "flops": {}}
    for name, limit in (
        ("without a memory limit", None),
        (f"fitted into {memory / GIB:g} GiB", memory),
    ):
        for at, task in points:
            prediction = predict(fitting(task, limit))
            flops = sum(prediction.flops.values()) / PETA
            lines["bytes"].setdefault(name, []).append((at, prediction.peak / GIB))
            lines["flops"].setdefault(name, []).append((at, flops))
    return (
        Panel(title=f"memory by {x}", x=x, y="GiB on the device", lines=lines["bytes"]),
        Panel(title=f"compute by {x}", x=x, y="PFLOP", lines=lines["flops"]),
    )
