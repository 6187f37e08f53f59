"""Curves of per-frame values as a picture."""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

# Told apart by people who do not see all colours too (Okabe and Ito 2008).
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
INK, GRID, PAPER = "#333333", "#dddddd", "#ffffff"


def curves(
    values: Mapping[str, Sequence[float]],
    *,
    title: str,
    width: int = 960,
    height: int = 360,
) -> Tensor:
    """Draw one curve a name over frame numbers: a picture (3 h w) in [0, 1].

    values: nan and inf leave a gap. Six names at most, sides of at least 200 pixels.
    """
    if not 1 <= len(values) <= len(COLOURS):
        raise ValueError(f"one to {len(COLOURS)} curves can be drawn, got {len(values)}")
    if min(width, height) < 200:
        raise ValueError(f"a plot needs at least 200x200 pixels, got {width}x{height}")
    try:
        from PIL import Image, ImageDraw, ImageFont
    except ImportError as error:
        raise ValueError("plots need Pillow: `pip install pillow`") from error
    finite = [v for curve in values.values() for v in curve if math.isfinite(v)]
    low, high, marks = ticks(min(finite, default=0.0), max(finite, default=1.0))
    last = max(max((len(curve) for curve in values.values()), default=1) - 1, 1)
    left, top, right, bottom = 80, 44, width - 24, height - 40

    def place(frame: float, value: float) -> tuple[float, float]:
        x = left + (right - left) * frame / last
        return x, bottom - (bottom - top) * (value - low) / (high - low)

    image = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(14)
    for tick in marks:
        y = place(0, tick)[1]
        draw.line((left, y, right, y), GRID)
        draw.text((left - 8, y), f"{tick:.6g}", INK, font, anchor="rm")
    for frame in ticks(0, last)[2]:
        if frame <= last and frame == int(frame):
            x = place(frame, low)[0]
            draw.line((x, bottom, x, bottom + 4), INK)
            draw.text((x, bottom + 8), f"{frame:.0f}", INK, font, anchor="ma")
    draw.line((left, bottom, right, bottom), INK)
    draw.text((left, 14), title, INK, font)
    x = right
    for colour, (name, curve) in reversed(list(zip(COLOURS, values.items(), strict=False))):
        x -= draw.textlength(name, font)
        draw.text((x, 14), name, colour, font)
        x -= 30
        draw.line((x, 22, x + 22, 22), colour, 3)
        x -= 16
        for run in _runs(curve):
            points = [place(frame, curve[frame]) for frame in run]
            if len(points) > 1:
                draw.line(points, colour, 2, joint="curve")
            for px, py in points if len(points) < 3 else ():
                draw.ellipse((px - 2, py - 2, px + 2, py + 2), colour)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def write_png(picture: Tensor, path: Path) -> None:
    """Store a picture (3 h w) in [0, 1]."""
    from PIL import Image

    pixels = (picture.clamp(0, 1) * 255).round().byte().permute(1, 2, 0)
    part = path.with_name(f".{path.name}.part")
    Image.fromarray(pixels.numpy()).save(part, format="PNG")
    os.replace(part, path)


def ticks(low: float, high: float) -> tuple[float, float, list[float]]:
    """Round bounds around two values, and four to eight round numbers from one to the other."""
    scale = max(abs(low), abs(high), 1e-9)
    span = high - low if high - low > 1e-6 * scale else scale
    step = 10 ** math.floor(math.log10(span / 4))
    step *= next(factor for factor in (1, 2, 5, 10) if span / (factor * step) <= 6)
    first, last = math.floor(low / step), math.ceil(high / step)
    if first == last:
        last += 1
    return first * step, last * step, [n * step for n in range(first, last + 1)]


def _runs(curve: Sequence[float]) -> list[list[int]]:
    """Frames with a value, cut where one has none."""
    runs: list[list[int]] = [[]]
    for frame, value in enumerate(curve):
        if math.isfinite(value):
            runs[-1].append(frame)
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]
