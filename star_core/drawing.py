"""Shared parts of plots: an empty picture to draw on with Pillow, colours, ticks, PNG files."""

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw

# Distinguishable with colour vision deficiencies too (Okabe and Ito 2008).
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
INK, GRID, PAPER = "#333333", "#dddddd", "#ffffff"


def paper(width: int, height: int) -> tuple["Image", "ImageDraw"]:
    """Returns an empty picture of a size in pixels, and an object that draws on it.

    Text has the font of all plots. Raises ValueError without Pillow.
    """
    try:
        from PIL import Image, ImageDraw, ImageFont
    except ImportError as error:
        raise ValueError("plots need Pillow: `pip install pillow`") from error
    image = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(image)
    draw.font = ImageFont.load_default(14)
    return image, draw


def picture_of(image: "Image") -> Tensor:
    """Returns an image as a tensor (3 h w) in [0, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def write_png(picture: Tensor, path: Path) -> None:
    """Writes a picture (3 h w) in [0, 1] to a PNG file, which appears once it is complete."""
    from PIL import Image

    pixels = (picture.clamp(0, 1) * 255).round().byte().permute(1, 2, 0)
    part = path.with_name(f".{path.name}.part")
    Image.fromarray(pixels.numpy()).save(part, format="PNG")
    os.replace(part, path)


def ticks(low: float, high: float) -> tuple[float, float, list[float]]:
    """Returns round lower and upper bounds of two values, and four to eight round numbers between.

    The numbers include both bounds, and two equal values get a range around them.
    """
    scale = max(abs(low), abs(high), 1e-9)
    span = high - low if high - low > 1e-6 * scale else scale
    step = 10 ** math.floor(math.log10(span / 4))
    step *= next(factor for factor in (1, 2, 5, 10) if span / (factor * step) <= 6)
    first, last = math.floor(low / step), math.ceil(high / step)
    if first == last:
        last += 1
    return first * step, last * step, [n * step for n in range(first, last + 1)]
