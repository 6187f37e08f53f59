"""Converts the code values of video to R'G'B' frames and back.

Y'CbCr follows ITU-R BT.601, BT.709 and BT.2020 (H.273, table 4). Only the matrix is converted: the
pixels keep the primaries and transfer of the source, which the output's tags name.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
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
HDR_TRANSFERS = {"smpte2084": "PQ", "arib-std-b67": "HLG", "linear": "linear light"}
# A chroma sample's position among its luma samples, across and down: 0 the first, 1 the second.
SITINGS = {
    "left": (0.0, 0.5),
    "center": (0.5, 0.5),
    "topleft": (0.0, 0.0),
    "top": (0.5, 0.0),
    "bottomleft": (0.0, 1.0),
    "bottom": (0.5, 1.0),
}

_ROWS = 64  # so many of them stay in a core's cache


@dataclass(frozen=True, kw_only=True)
class Color:
    """The meaning of code values, in ffmpeg's names.

    matrix: a key of `MATRICES`, or "gbr" for R'G'B'. full_range: whether codes reach from 0 to the
    maximum instead of from 16 to 235 (8 bit). siting: position of the chroma samples in the stored
    frame, see `SITINGS`. mastering: the display on which HDR was graded: x and y of red, green,
    blue and white, least and greatest cd/m2. light_level: MaxCLL and MaxFALL in cd/m2.
    """

    matrix: str
    primaries: str = "bt709"
    transfer: str = "bt709"
    full_range: bool = False
    siting: tuple[float, float] = SITINGS["left"]
    mastering: tuple[float, ...] | None = None
    light_level: tuple[int, int] | None = None

    @property
    def hdr(self) -> str | None:
        """The kind of HDR, None for SDR."""
        return HDR_TRANSFERS.get(self.transfer)

    @property
    def image_suffix(self) -> str:
        """The extension of images that hold such code values."""
        return ".exr" if self.transfer == "linear" else ".png"


def matrix_by_size(width: int, height: int) -> str:
    """Returns the matrix of video without a tag for it, by the rule of libplacebo and mpv."""
    return "bt709" if width >= 1280 or height > 576 else "smpte170m"


def primaries_by_size(width: int, height: int) -> str:
    """Returns the primaries of video without a tag for them, by the rule of libplacebo and mpv."""
    if width >= 1280:
        return "bt709"
    return {576: "bt470bg", 480: "smpte170m", 486: "smpte170m"}.get(height, "bt709")


def rgb_from_planes(
    planes: Sequence[np.ndarray], layout: PlanarFormat, black: int, white: int, opaque: int
) -> Tensor:
    """Converts code values, one (h w) per plane, to a frame (c h w); c = 4 with alpha.

    layout: R'G'B' or grey, which becomes three equal channels. black, white: codes that become 0
    and 1; others are clipped unless they are floats. opaque: the code of alpha 1.
    """
    order = {"gray": (0, 0, 0), "rgb": (2, 0, 1)}[layout.family] + (-1,) * layout.alpha
    # NumPy asks the system for large pages: touching torch's small ones takes as long as decoding.
    frame = torch.from_numpy(np.empty((len(order), *planes[0].shape), np.float32))
    for channel, place in zip(frame, order, strict=True):
        low, span = (0, opaque) if place < 0 else (black, white - black)
        codes = torch.from_numpy(planes[place])
        for rows, part in zip(channel.split(_ROWS), codes.split(_ROWS), strict=True):
            rows.copy_(part)
            if low:
                rows.sub_(low)
            rows.div_(span)
            if layout.bits < 32:
                rows.clamp_(0, 1)
    return frame


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


def _downsample_chroma(plane: Tensor, layout: PlanarFormat) -> Tensor:
    across, down = layout.subsampling
    if across == 2:
        # Centred on the even columns: (1 2 1) / 4.
        padded = F.pad(plane[None], (1, 1), mode="replicate")[0]
        plane = ((padded[:, :-2] + 2 * plane + padded[:, 2:]) / 4)[:, ::2]
    if down == 2:
        plane = (plane[::2] + plane[1::2]) / 2
    return plane
