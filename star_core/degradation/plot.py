"""What `estimate` found, as a picture."""

from torch import Tensor

from ..drawing import COLOURS, GRID, INK, paper, picture_of
from .estimate import Degradation

WIDTH, ROW, TOP, LEFT, RIGHT = 480, 32, 44, 108, 300


def plot(degradation: Degradation) -> Tensor:
    """A bar for each figure, with its name and value: a picture (3 h w) in [0, 1].

    A full bar is very bad. ValueError without Pillow.
    """
    found = degradation
    bars = (
        ("blur", 1 - found.resolution, f"effective resolution {found.resolution:.0%}"),
        ("noise", found.noise / 20, f"{found.noise:.1f} levels"),
        ("blockiness", found.blockiness / 8, f"{found.blockiness:.1f} levels"),
        ("ringing", found.ringing / 2, f"{found.ringing:.1f} levels"),
        ("compression", 1 - found.quality / 100, f"JPEG quality {found.quality:.0f}"),
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
