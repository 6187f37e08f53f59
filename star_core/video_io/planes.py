"""Planar pixel formats, in which all frames are exchanged with ffmpeg and PyAV."""

import functools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from torch import Tensor

if TYPE_CHECKING:
    from av import VideoFrame

_PACKED_RGB = re.compile(r"(rgba|bgra|argb|abgr|rgb0|bgr0|0rgb|0bgr|rgb|bgr)(24)?")
SUBSAMPLINGS = {"444": (1, 1), "422": (2, 1), "420": (2, 2)}


@dataclass(frozen=True)
class PlanarFormat:
    """A format of planes Y; Y Cb Cr; or G B R, stored row by row, little-endian above 8 bit.

    bits: of each sample, 32 for floats. alpha: whether a plane of alpha comes last. subsampling:
    luma samples for each chroma sample, across and down.
    """

    family: Literal["gray", "rgb", "yuv"]
    bits: int = 8
    alpha: bool = False
    subsampling: tuple[int, int] = (1, 1)

    @property
    def name(self) -> str:
        """ffmpeg's name of the format."""
        depth = {8: "", 32: "f32le"}.get(self.bits, f"{self.bits}le")
        if self.family == "gray":
            return f"gray{depth}"
        alpha = "a" if self.alpha else ""
        if self.family == "rgb":
            return f"gbr{alpha}p{depth}"
        chroma = {factors: name for name, factors in SUBSAMPLINGS.items()}[self.subsampling]
        return f"yuv{alpha}{chroma}p{depth}"

    @property
    def peak(self) -> int:
        """The code value of white in full range."""
        return 1 if self.bits == 32 else 2**self.bits - 1

    @property
    def dtype(self) -> np.dtype[Any]:
        """NumPy's type of a sample."""
        return np.dtype({8: np.uint8, 32: "<f4"}.get(self.bits, "<u2"))

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
        return samples * self.dtype.itemsize

    def converted(self, frame: "VideoFrame") -> "VideoFrame":
        """Returns a decoded frame in this format, its code values in the same range."""
        if frame.format.name.replace("yuvj", "yuv") == self.name:
            return frame
        same_range = {"src_color_range": 2, "dst_color_range": 2}
        try:
            return frame.reformat(format=self.name, threads=1, **same_range)
        except TypeError:  # PyAV 14 uses one thread. Those of FFmpeg 8 damage each other's lines.
            return frame.reformat(format=self.name, **same_range)

    def planes(self, frame: "VideoFrame") -> list[np.ndarray]:
        """Returns views of the code values of a decoded frame, one (h w) per plane."""
        packed = _PACKED_RGB.fullmatch(frame.format.name)
        if not packed:
            frame = self.converted(frame)
        h, w = frame.height, frame.width
        rows = []
        for plane in frame.planes:
            buffer: Any = plane
            shape = plane.height, plane.line_size // self.dtype.itemsize
            rows.append(np.frombuffer(buffer, self.dtype, math.prod(shape)).reshape(shape))
        if packed:  # exactly, which libswscale of FFmpeg 7 does not do
            pixels = rows[0][:h, : w * len(packed[1])].reshape(h, w, len(packed[1]))
            rows = [pixels[..., packed[1].index(c)] for c in "gbra"[: 3 + self.alpha]]
        return [row[:h, :w] for row, (h, w) in zip(rows, self.shapes(w, h), strict=True)]

    def pack(self, planes: Sequence[Tensor]) -> bytes:
        """Returns the bytes of a frame from integer code values, one (h w) per plane."""
        return b"".join(plane.numpy().astype(self.dtype).tobytes() for plane in planes)


def padded(frame: "VideoFrame", above: int) -> "VideoFrame":
    """Returns a frame with as much luma as its chroma covers, and its first line repeated above it.

    above: lines of luma to be added, a multiple of those for one line of chroma.
    """
    from av import VideoFrame

    across, down = chroma_step(frame.format.name)
    width, height = -(-frame.width // across) * across, -(-frame.height // down) * down
    if (width, height + above) == (frame.width, frame.height):
        return frame
    larger = VideoFrame(width, height + above, frame.format.name)
    for plane, target in zip(frame.planes, larger.planes, strict=True):
        buffers: Any = plane, target
        source, copy = (
            np.frombuffer(buffer, np.uint8).reshape(buffer.height, buffer.line_size)
            for buffer in buffers
        )
        length = min(plane.line_size, target.line_size)
        first = above if plane.height == frame.height else above // down
        copy[:first, :length] = source[0, :length]
        copy[first : first + plane.height, :length] = source[:, :length]
    return larger


def chroma_step(pixel_format: str) -> tuple[int, int]:
    """Returns how many luma samples there are for one of chroma, across and down."""
    from av import VideoFormat

    kind = VideoFormat(pixel_format)
    return 4 // kind.chroma_width(4), 4 // kind.chroma_height(4)


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
        chroma = chroma_step(pixel_format)
        # ffmpeg's scaler converts the rare others, 4:1:1 and 4:4:0, to 4:4:4.
        subsampling = chroma if chroma in SUBSAMPLINGS.values() else (1, 1)
    depth = max(8, *(component.bits for component in kind.components))
    layout = PlanarFormat(family, depth, alpha and family != "gray", subsampling)
    try:
        VideoFormat(layout.name)
    except ValueError:
        return PlanarFormat(family, 16, layout.alpha, subsampling)
    return layout
