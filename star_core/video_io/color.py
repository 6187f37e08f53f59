"""Converts the code values of video to R'G'B' frames and back.

Y'CbCr follows ITU-R BT.601, BT.709 and BT.2020 (H.273, table 4). Only the matrix is converted: the
pixels keep the primaries and transfer of the source, which the output's tags name.
"""

import math
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
    maximum instead of from 16 to 235 (8 bit). siting: position of the chroma samples in the stored
    frame, see `SITINGS`.
    """

    matrix: str
    primaries: str = "bt709"
    transfer: str = "bt709"
    full_range: bool = False
    siting: tuple[float, float] = SITINGS["left"]

    @property
    def hdr(self) -> str | None:
        """The kind of HDR, None for SDR."""
        return HDR_TRANSFERS.get(self.transfer)


def matrix_by_size(width: int, height: int) -> str:
    """Returns the matrix of video without a tag for it, by the rule of libplacebo and mpv."""
    return "bt709" if width >= 1280 or height > 576 else "smpte170m"


def primaries_by_size(width: int, height: int) -> str:
    """Returns the primaries of video without a tag for them, by the rule of libplacebo and mpv."""
    if width >= 1280:
        return "bt709"
    return {576: "bt470bg", 480: "smpte170m", 486: "smpte170m"}.get(height, "bt709")


def rgb_from_planes(planes: list[Tensor], layout: PlanarFormat, color: Color) -> Tensor:
    """Converts code values, one (h w) per plane, to a frame (c h w) in [0, 1]; c = 4 with alpha.

    layout: the planes' format; a grey plane becomes three equal channels. The luma is overwritten.
    """
    step = 2 ** (layout.bits - 8)
    low, span = (0, layout.peak) if color.full_range else (16 * step, 219 * step)
    count = 1 if layout.family == "gray" else 3
    frame = torch.empty(4 if layout.alpha else 3, *planes[0].shape)
    if layout.alpha:
        torch.div(planes[-1], layout.peak, out=frame[3])
    if layout.family != "yuv":
        for channel, plane in zip((1, 2, 0), planes[:count] * (3 // count), strict=True):
            torch.div(plane - low, span, out=frame[channel])
        return frame.clamp_(0, 1)

    y = planes[0].sub_(low).div_(span)
    cb, cr = (
        _upsample_chroma(plane - 128 * step, y.shape, layout, color.siting) for plane in planes[1:3]
    )
    red, blue = MATRICES[color.matrix]
    scale = 2 / (layout.peak if color.full_range else 224 * step)
    from_cr, from_cb = scale * (1 - red), scale * (1 - blue)
    torch.add(y, cr, alpha=from_cr, out=frame[0])
    torch.add(y, cb, alpha=from_cb, out=frame[2])
    torch.add(y, cr, alpha=-from_cr * red / (1 - red - blue), out=frame[1])
    frame[1].add_(cb, alpha=-from_cb * blue / (1 - red - blue))
    return frame.clamp_(0, 1)


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
    for axis, factor, position in zip((0, 1), layout.subsampling[::-1], siting[::-1], strict=True):
        if factor == 1:
            continue
        count = plane.shape[axis]
        ends = plane.narrow(axis, 0, 1), plane.narrow(axis, count - 1, 1)
        padded = torch.cat([ends[0], ends[0], plane, ends[1], ends[1]], axis)
        phases = [_phase(padded, axis, count, k - position) for k in range(factor)]
        if axis == 0:
            plane = torch.stack(phases, 1).flatten(0, 1)
        else:  # pairs of real and imaginary parts are interleaved far faster than by torch.stack
            plane = torch.view_as_real(torch.complex(*phases)).flatten(1, 2)
        plane = plane.narrow(axis, 0, size[axis])
    return plane


def _phase(padded: Tensor, axis: int, count: int, offset: float) -> Tensor:
    """Interpolates every second sample along an axis.

    padded: the samples with two more at both ends. offset: from each of the `count` samples to the
    one that is interpolated, in halves of their distance.
    """
    first = math.floor(offset / 2)
    f = offset / 2 - first
    weights = (
        ((2 - f) * f - 1) * f / 2,
        ((3 * f - 5) * f * f + 2) / 2,
        ((4 - 3 * f) * f + 1) * f / 2,
        (f - 1) * f * f / 2,
    )
    result = None
    for tap, weight in enumerate(weights):
        samples = padded.narrow(axis, first + 1 + tap, count)
        if result is None:
            result = samples * weight if weight else None
        elif weight:
            result.add_(samples, alpha=weight)
    assert result is not None
    return result


def _downsample_chroma(plane: Tensor, layout: PlanarFormat) -> Tensor:
    across, down = layout.subsampling
    if across == 2:
        # Centred on the even columns: (1 2 1) / 4.
        padded = F.pad(plane[None], (1, 1), mode="replicate")[0]
        plane = ((padded[:, :-2] + 2 * plane + padded[:, 2:]) / 4)[:, ::2]
    if down == 2:
        plane = (plane[::2] + plane[1::2]) / 2
    return plane
