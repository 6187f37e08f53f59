"""Planar pixel formats, in which all frames are exchanged with ffmpeg and PyAV."""

import functools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from av import VideoFrame

_PACKED_RGB = re.compile(r"(rgba|bgra|argb|abgr|rgb0|bgr0|0rgb|0bgr|rgb|bgr)(24)?")
SUBSAMPLINGS = {"444": (1, 1), "422": (2, 1), "420": (2, 2)}


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

    def converted(self, frame: "VideoFrame") -> "VideoFrame":
        """Returns a decoded frame in this format, its code values in the same range."""
        if frame.format.name.replace("yuvj", "yuv") == self.name:
            return frame
        return frame.reformat(format=self.name, src_color_range=2, dst_color_range=2)

    def planes(self, frame: "VideoFrame") -> list[Tensor]:
        """Returns the code values of a decoded frame, one float32 (h w) per plane."""
        kind: Any = np.dtype(np.uint8 if self.bits == 8 else "<u2")
        packed = _PACKED_RGB.fullmatch(frame.format.name)
        if not packed:
            frame = self.converted(frame)
        h, w = frame.height, frame.width
        rows = []
        for plane in frame.planes:
            buffer: Any = plane
            shape = plane.height, plane.line_size // kind.itemsize
            rows.append(np.frombuffer(buffer, kind, math.prod(shape)).reshape(shape))
        if packed:  # exactly, which libswscale of FFmpeg 7 does not do
            pixels = rows[0][:h, : w * len(packed[1])].reshape(h, w, len(packed[1]))
            rows = [pixels[..., packed[1].index(c)] for c in "gbra"[: 3 + self.alpha]]
        shapes = self.shapes(w, h)
        parts = [row[:h, :w].astype(np.float32) for row, (h, w) in zip(rows, shapes, strict=True)]
        return [torch.from_numpy(part) for part in parts]

    def pack(self, planes: Sequence[Tensor]) -> bytes:
        """Returns the bytes of a frame from integer code values, one (h w) per plane."""
        kind = np.uint8 if self.bits == 8 else np.dtype("<u2")
        return b"".join(plane.numpy().astype(kind).tobytes() for plane in planes)


@functools.cache
def has_alpha(pixel_format: str) -> bool:
    """Tests whether a pixel format, in ffmpeg's name, has alpha."""
    from av import VideoFormat

    kind = VideoFormat(pixel_format)
    return kind.has_palette or any(component.is_alpha for component in kind.components)


@functools.cache
def planar_format(pixel_format: str, *, alpha: bool) -> PlanarFormat:
    """Returns the planar format that can store all of `pixel_format`, in ffmpeg's name.

    alpha: whether to store its alpha too.
    """
    from av import VideoFormat

    kind = VideoFormat(pixel_format)
    family, subsampling = "yuv", (1, 1)
    if kind.is_rgb or kind.has_palette or len(kind.components) == 2 or "xyz" in pixel_format:
        family = "rgb"
    elif len(kind.components) == 1:
        family = "gray"
    else:
        chroma = (4 // kind.chroma_width(4), 4 // kind.chroma_height(4))
        # ffmpeg's scaler converts the rare others, 4:1:1 and 4:4:0, to 4:4:4.
        subsampling = chroma if chroma in SUBSAMPLINGS.values() else (1, 1)
    depth = max(8, *(component.bits for component in kind.components))
    layout = PlanarFormat(family, depth, alpha and family != "gray", subsampling)
    try:
        VideoFormat(layout.name)
    except ValueError:
        return PlanarFormat(family, 16, layout.alpha, subsampling)
    return layout
