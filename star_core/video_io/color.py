"""Converts the code values of video to R'G'B' frames and back.

Y'CbCr follows ITU-R BT.601, BT.709 and BT.2020 (H.273, table 4). Only the matrix is converted: the
pixels keep the primaries and transfer of the source, which the output's tags name.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .planes import PlanarFormat

# The luma weights of red and blue.
MATRICES = {
    "bt709": (0.2126, 0.0722),
    "smpte170m": (0.299, 0.114),
    "bt470bg": (0.299, 0.114),
    "fcc": (0.30, 0.11),
    "smpte240m": (0.212, 0.087),
    "bt2020nc": (0.2627, 0.0593),
}
HDR_TRANSFERS = {"smpte2084": "PQ", "arib-std-b67": "HLG"}
# A chroma sample's position among its luma samples, across and down: 0 the first, 1 the second.
SITINGS = {
    "left": (0.0, 0.5),
    "center": (0.5, 0.5),
    "topleft": (0.0, 0.0),
    "top": (0.5, 0.0),
    "bottomleft": (0.0, 1.0),
    "bottom": (0.5, 1.0),
}


@dataclass(frozen=True, kw_only=True)
class Color:
    """The meaning of code values, in ffmpeg's names.

    matrix: a key of `MATRICES`, or "gbr" for R'G'B'. full_range: whether codes reach from 0 to the
    maximum instead of from 16 to 235 (8 bit). siting: position of the chroma samples in the upright
    frame, see `SITINGS`.
    """

    matrix: str
    primaries: str = "bt709"
    transfer: str = "bt709"
    full_range: bool = False
    siting: tuple[float, float] = SITINGS["left"]


def matrix_by_size(width: int, height: int) -> str:
    """Returns the matrix of video without a tag for it, by the rule of libplacebo and mpv."""
    return "bt709" if width >= 1280 or height > 576 else "smpte170m"


def primaries_by_size(width: int, height: int) -> str:
    """Returns the primaries of video without a tag for them, by the rule of libplacebo and mpv."""
    if width >= 1280:
        return "bt709"
    return {576: "bt470bg", 480: "smpte170m", 486: "smpte170m"}.get(height, "bt709")


def turned_siting(
    siting: tuple[float, float], quarters: int, width: int, height: int
) -> tuple[float, float]:
    """Returns the siting after a frame is turned counter-clockwise.

    siting, width, height: of the frame before it is turned. quarters: the number of quarter turns.
    """
    across, down = siting
    for _ in range(quarters):
        # The last column becomes the first row; it has no partner where the width is odd.
        across, down = down, 1 - width % 2 - across
        width, height = height, width
    return across, down


def rgb_from_planes(planes: list[Tensor], layout: PlanarFormat, color: Color) -> Tensor:
    """Converts code values, one (h w) per plane, to a frame (c h w) in [0, 1]; c = 4 with alpha.

    layout: the planes' format; a grey plane becomes three equal channels.
    """
    step = 2 ** (layout.bits - 8)
    alpha = [planes[-1] / layout.peak] if layout.alpha else []
    if color.full_range:
        colors = [plane / layout.peak for plane in planes[:3]]
    else:
        colors = [(plane / step - 16) / 219 for plane in planes[:3]]
    if layout.family == "gray":
        return torch.stack(colors * 3).clamp(0, 1)
    if layout.family == "rgb":
        green, blue, red = colors
        return torch.stack([red, green, blue, *alpha]).clamp(0, 1)

    y = colors[0]
    chroma_span = layout.peak if color.full_range else 224 * step
    cb, cr = (
        _upsample_chroma((plane - 128 * step) / chroma_span, y.shape, layout, color.siting)
        for plane in planes[1:3]
    )
    red_weight, blue_weight = MATRICES[color.matrix]
    red = y + 2 * (1 - red_weight) * cr
    blue = y + 2 * (1 - blue_weight) * cb
    green = (y - red_weight * red - blue_weight * blue) / (1 - red_weight - blue_weight)
    return torch.stack([red, green, blue, *alpha]).clamp(0, 1)


def planes_from_rgb(frame: Tensor, layout: PlanarFormat, matrix: str) -> list[Tensor]:
    """Converts a frame (c h w) in [0, 1] to unrounded code values, one (h w) per plane.

    layout: R'G'B' is written in full range; Y'CbCr in limited range with chroma sited left, as
    H.264 assumes. matrix: a key of `MATRICES`; unused for R'G'B'.
    """
    alpha = [frame[3] * layout.peak] if layout.alpha else []
    red, green, blue = frame[:3]
    if layout.family == "rgb":
        return [green * layout.peak, blue * layout.peak, red * layout.peak, *alpha]
    step = 2 ** (layout.bits - 8)
    red_weight, blue_weight = MATRICES[matrix]
    y = red_weight * red + (1 - red_weight - blue_weight) * green + blue_weight * blue
    cb = _downsample_chroma((blue - y) / (2 * (1 - blue_weight)), layout)
    cr = _downsample_chroma((red - y) / (2 * (1 - red_weight)), layout)
    return [step * (16 + 219 * y), step * (128 + 224 * cb), step * (128 + 224 * cr), *alpha]


def _upsample_chroma(
    plane: Tensor, size: torch.Size, layout: PlanarFormat, siting: tuple[float, float]
) -> Tensor:
    """Interpolates with Catmull-Rom at the true positions; ffmpeg would stretch odd sizes."""
    for axis, factor, position in zip((1, 0), layout.subsampling, siting, strict=True):
        if factor == 1:
            continue
        x = (torch.arange(size[axis]) - position * (factor - 1)) / factor
        first = x.floor()
        f = x - first
        weights = (
            ((2 - f) * f - 1) * f / 2,
            ((3 * f - 5) * f * f + 2) / 2,
            ((4 - 3 * f) * f + 1) * f / 2,
            (f - 1) * f * f / 2,
        )
        taps = []
        for offset, weight in enumerate(weights, start=-1):
            index = (first.long() + offset).clamp(0, plane.shape[axis] - 1)
            taps.append(plane.index_select(axis, index) * (weight if axis else weight[:, None]))
        plane = taps[0] + taps[1] + taps[2] + taps[3]
    return plane


def _downsample_chroma(plane: Tensor, layout: PlanarFormat) -> Tensor:
    across, down = layout.subsampling
    if across == 2:
        # Centred on the even columns: (1 2 1) / 4.
        padded = F.pad(plane[None], (1, 1), mode="replicate")[0]
        plane = ((padded[:, :-2] + 2 * plane + padded[:, 2:]) / 4)[:, ::2]
    if down == 2:
        plane = (plane[::2] + plane[1::2]) / 2
    return plane
