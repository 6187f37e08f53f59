"""Planar pixel formats, in which all frames are exchanged with ffmpeg."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from .ffmpeg import pixel_formats

SUBSAMPLINGS = {"444": (1, 1), "422": (2, 1), "420": (2, 2)}
_ALPHA = re.compile(r"yuva|gbrap|rgba|bgra|argb|abgr|ya\d|pal8|ayuv|vuya")
_PACKED_420 = re.compile(r"nv12|nv21|p01\d")
_PACKED_422 = re.compile(r"nv16|nv20|yuyv422|uyvy422|yvyu422|y21\d|p21\d")


@dataclass(frozen=True)
class PlanarFormat:
    """A format of planes Y; Y Cb Cr; or G B R, stored row by row, little-endian above 8 bit.

    bits: of each sample. alpha: whether a plane of alpha comes last. subsampling: luma samples for
    each chroma sample, across and down.
    """

    family: Literal["gray", "rgb", "yuv"]
    bits: int = 8
    alpha: bool = False
    subsampling: tuple[int, int] = (1, 1)

    @property
    def name(self) -> str:
        """ffmpeg's name of the format."""
        depth = "" if self.bits == 8 else f"{self.bits}le"
        if self.family == "gray":
            return f"gray{depth}"
        alpha = "a" if self.alpha else ""
        if self.family == "rgb":
            return f"gbr{alpha}p{depth}"
        chroma = {factors: name for name, factors in SUBSAMPLINGS.items()}[self.subsampling]
        return f"yuv{alpha}{chroma}p{depth}"

    @property
    def peak(self) -> int:
        """The greatest code value."""
        return 2**self.bits - 1

    def shapes(self, width: int, height: int) -> list[tuple[int, int]]:
        """Returns (h, w) of each plane for a frame's size. Chroma of odd sizes is rounded up."""
        across, down = self.subsampling
        chroma = (-(-height // down), -(-width // across))
        colors = {"gray": 1, "rgb": 3, "yuv": 3}[self.family]
        full = (height, width)
        return [full, chroma, chroma][:colors] + [full] * self.alpha

    def frame_bytes(self, width: int, height: int) -> int:
        """Returns the number of bytes of a frame."""
        samples = sum(h * w for h, w in self.shapes(width, height))
        return samples * (1 if self.bits == 8 else 2)

    def unpack(self, data: bytes, width: int, height: int) -> list[Tensor]:
        """Returns the code values of a frame's bytes, one float32 (h w) per plane."""
        codes = np.frombuffer(data, np.uint8 if self.bits == 8 else np.dtype("<u2"))
        samples = torch.from_numpy(codes.astype(np.float32))
        shapes = self.shapes(width, height)
        parts = samples.split([h * w for h, w in shapes])
        return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]

    def pack(self, planes: Sequence[Tensor]) -> bytes:
        """Returns the bytes of a frame from integer code values, one (h w) per plane."""
        kind = np.uint8 if self.bits == 8 else np.dtype("<u2")
        return b"".join(plane.numpy().astype(kind).tobytes() for plane in planes)


def has_alpha(pixel_format: str) -> bool:
    """Tests whether a pixel format, in ffmpeg's name, has alpha."""
    return _ALPHA.match(pixel_format) is not None


def planar_format(pixel_format: str, *, alpha: bool) -> PlanarFormat:
    """Returns the planar format that can store all of `pixel_format`, in ffmpeg's name.

    alpha: whether to store its alpha too.
    """
    depths = pixel_formats()
    if re.match(r"gray|mono", pixel_format):
        family, subsampling = "gray", (1, 1)
    elif re.match(r"yuv|nv\d|yuyv|[py]\d\d\d|uyvy|yvyu|uyyv|ayuv|vuy|xv|v30x", pixel_format):
        named = re.match(r"yuv[aj]?(4\d\d)p", pixel_format)
        chroma = named[1] if named else "444"
        if _PACKED_420.match(pixel_format):
            chroma = "420"
        elif _PACKED_422.match(pixel_format):
            chroma = "422"
        # ffmpeg's scaler converts the rare others, 4:1:1 and 4:4:0, to 4:4:4.
        family, subsampling = "yuv", SUBSAMPLINGS.get(chroma, (1, 1))
    else:
        family, subsampling = "rgb", (1, 1)
    depth = max(8, depths.get(pixel_format, 8))
    layout = PlanarFormat(family, depth, alpha and family != "gray", subsampling)
    return layout if layout.name in depths else PlanarFormat(family, 16, layout.alpha, subsampling)
