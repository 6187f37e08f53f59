"""Draws the result of `estimate` as a picture."""

from torch import Tensor

from ..drawing import COLOURS, GRID, INK, paper, picture_of
from .estimate import Degradation

WIDTH, ROW, TOP, LEFT, RIGHT = 480, 32, 44, 108, 300


def plot(degradation: Degradation) -> Tensor:
    """Returns a picture (3 h w) in [0, 1] with a bar, a name and a value for each figure.

    A full bar means very bad. Raises ValueError without Pillow.
    """
    d = degradation
    bars = (
        ("blur", 1 - d.resolution, f"effective resolution {d.resolution:.0%}"),
        ("noise", d.noise / 20, f"{d.noise:.1f} levels"),
        ("blockiness", d.blockiness / 8, f"{d.blockiness:.1f} levels"),
        ("ringing", d.ringing / 2, f"{d.ringing:.1f} levels"),
        ("compression", 1 - d.quality / 100, f"JPEG quality {d.quality:.0f}"),
    )
    image, draw = paper(WIDTH, TOP + ROW * len(bars) + 8)
    draw.text((12, 14), "Longer is worse. Levels: of 255.", INK)
    for row, (name, share, value) in enumerate(bars):
        middle = TOP + ROW * row + ROW // 2
        top, bottom = middle - 9, middle + 9
        draw.text((12, middle), name, INK, anchor="lm")
        draw.rectangle((LEFT, top, RIGHT, bottom), GRID)
        draw.rectangle((LEFT, top, RIGHT, bottom), outline=INK)
        length = round((RIGHT - LEFT) * min(max(share, 0.0), 1.0))
        if length:
            draw.rectangle((LEFT, top, LEFT + length, bottom), COLOURS[1])
        draw.text((RIGHT + 12, middle), value, INK, anchor="lm")
    return picture_of(image)
