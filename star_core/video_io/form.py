"""Determines how the samples of a decoded frame are to be read: layout, colours, turns, aspect."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from .color import MATRICES, SITINGS, Color, matrix_by_size, primaries_by_size, rgb_from_planes
from .decoding import captured_log, filter_graph, filtered
from .planes import PlanarFormat, chroma_step, has_alpha, padded, planar_format

if TYPE_CHECKING:
    from av import VideoFrame, VideoStream

_HDR_METADATA = ("MASTERING_DISPLAY_METADATA", "CONTENT_LIGHT_LEVEL")
_UNTAGGED = ("unknown", "unspecified", "reserved")


@dataclass(frozen=True)
class Form:
    """How the samples of a frame are to be read.

    size: width and height of the upright frame, in stored pixels. aspect: the width of a stored
    pixel by its height. transposed, flipped: the frame (c h w) becomes upright if h and w are
    exchanged and then the axes `flipped` are reversed.
    """

    pixel_format: str
    size: tuple[int, int]
    aspect: Fraction
    transposed: bool
    flipped: tuple[int, ...]
    color: Color

    def displayed(self, size: tuple[int, int]) -> tuple[int, int]:
        """Returns width and height in square pixels of a part of the upright frame.

        The number of stored lines stays, their length changes.
        """
        width, height = size
        half = Fraction(1, 2)
        if self.transposed:
            return width, max(1, int(height * self.aspect + half))
        return max(1, int(width * self.aspect + half)), height

    def is_transparent(self, frame: "VideoFrame") -> bool:
        """Tests whether some pixel of a frame is not opaque."""
        layout = planar_format(self.pixel_format, alpha=has_alpha(self.pixel_format))
        return layout.alpha and bool((layout.planes(frame)[-1] < layout.peak).any())

    def upright(
        self, frames: "Iterable[VideoFrame]", *, alpha: bool, deinterlace: bool
    ) -> Iterator[Tensor]:
        """Yields the R'G'B' (c h w) in [0, 1] of consecutive frames, upright; c = 4 if `alpha`.

        deinterlace: makes whole frames of those that are marked as two fields.
        """
        layout = planar_format(self.pixel_format, alpha=alpha and has_alpha(self.pixel_format))
        is_yuv = layout.family == "yuv"
        if deinterlace:
            whole = frames if is_yuv else map(layout.converted, frames)
            frames = filtered(whole, ("bwdif", "mode=send_frame:deint=interlaced"))
        step = 2 ** (layout.bits - 8)
        black, white, opaque, above = 0, layout.peak, layout.peak, 0
        if not self.color.full_range:
            black, white = (0, 255 * step) if is_yuv else (16 * step, 235 * step)
        if is_yuv:  # libswscale widens codes of fewer bits without changing what they mean
            black, white, opaque = (
                code * 2 ** (16 - layout.bits) for code in (black, white, opaque)
            )
            across, down = chroma_step(self.pixel_format)
            scaling = ("scale", _conversion(self.color, (across, down)))
            layout = PlanarFormat("rgb", 16, layout.alpha)
            # libswscale stretches the chroma of odd sizes, and weighs it wrongly about the first
            # lines if it has fewer lines than luma.
            above = 2 * down if down > 1 else 0
            larger = (padded(frame, above) for frame in frames)
            frames = filtered(larger, scaling, ("format", layout.name))
        width, height = self.size[::-1] if self.transposed else self.size
        for frame in frames:
            planes = [plane[above : above + height, :width] for plane in layout.planes(frame)]
            rgb = rgb_from_planes(planes, layout, black, white, opaque)
            if alpha and not layout.alpha:
                rgb = F.pad(rgb, (0, 0, 0, 0, 0, 1), value=1.0)
            rgb = rgb.transpose(1, 2) if self.transposed else rgb
            turned = self.flipped or self.transposed
            yield rgb.flip(self.flipped).contiguous() if turned else rgb


class FormReader:
    """Returns the form of each frame of a stream.

    stream: is decoded meanwhile, not in threads of whole frames.
    """

    def __init__(self, stream: "VideoStream") -> None:
        self._context, stated = stream.codec_context, stream.sample_aspect_ratio
        # An aspect that only the container states holds for all frames.
        self._aspect = stated if stated != self._context.sample_aspect_ratio else None
        self._seen: tuple[object, ...] = ()
        self._form: Form | None = None
        self._graph: Any = None

    def __call__(self, frame: "VideoFrame") -> Form:
        """Returns the form of a frame; frames must come in order."""
        shape = (frame.format.name, frame.width, frame.height)
        seen = (*shape, frame.colorspace, frame.color_range, frame.rotation)
        if self._graph is None or shape != self._seen[:3]:
            self._graph = _inspection(frame)
        # What PyAV does not show can change at key frames only.
        if self._form is None or frame.key_frame or seen != self._seen:
            form = self._inspected(frame)
            if form != self._form:
                self._form = form
        self._seen = seen
        assert self._form is not None
        return self._form

    def _inspected(self, frame: "VideoFrame") -> Form:
        with captured_log() as log:
            self._graph.vpush(frame)
            side_data = self._graph.vpull().side_data
            about = [side_data.get(name) for name in _HDR_METADATA]
        shown = dict(re.findall(r"(\w+): *(\S+)", "".join(text for _, _, text in log)))
        turn = side_data.get("DISPLAYMATRIX")
        # x' = a x + c y, y' = b x + d y
        a, b, _, c, d = (1, 0, 0, 0, 1) if turn is None else map(int, np.frombuffer(turn, "i4")[:5])
        transposed = abs(b) + abs(c) > abs(a) + abs(d)
        across, down = (c, b) if transposed else (a, d)
        width, height = frame.width, frame.height
        return Form(
            pixel_format=frame.format.name,
            size=(height, width) if transposed else (width, height),
            aspect=Fraction(self._aspect or self._context.sample_aspect_ratio or 1),
            transposed=transposed,
            flipped=(1,) * (down < 0) + (2,) * (across < 0),
            color=replace(_color(frame, shown), **_hdr_metadata(*about)),
        )


def _inspection(frame: "VideoFrame") -> Any:
    """Returns a filter graph whose log tells what PyAV does not.

    PyAV 18 does not tell where a frame's chroma lies, PyAV 14 neither its primaries and transfer.
    """
    # PyAV 18 shows no side data at all if it does not know some, as these of FFmpeg 8, EXIF last;
    # the name of an ICC profile (15) it frees twice.
    unwanted = [("sidedata", f"mode=delete:type={n}") for n in (15, *range(28, 32))]
    return filter_graph(frame, *unwanted, ("showinfo", "checksum=0"))


def _conversion(color: Color, step: tuple[int, int]) -> str:
    """Returns the options of ffmpeg's scaler for Y'CbCr of these colours.

    Chroma is interpolated with Catmull-Rom at its true position.
    """
    matrix = color.matrix.removesuffix("bg").removesuffix("nc")
    across, down = (
        int(256 * position) if factor > 1 else 0
        for position, factor in zip(color.siting, step, strict=True)
    )
    return (
        f"flags=bicubic:param0=0:param1=0.5:in_h_chr_pos={across}:in_v_chr_pos={down}"
        f":in_color_matrix={matrix}:in_range={'pc' if color.full_range else 'tv'}"
    )


def _hdr_metadata(mastering: Any, light_level: Any) -> dict[str, Any]:
    """Returns fields of `Color` from libavutil's structures for them."""
    found: dict[str, Any] = {}
    if mastering is not None:  # ten fractions, then which of them are known
        values = np.frombuffer(mastering, "i4")
        if values[20] and values[21]:
            found["mastering"] = tuple((values[:20:2] / values[1:20:2]).tolist())
    if light_level is not None:
        found["light_level"] = tuple(np.frombuffer(light_level, "u4")[:2].tolist())
    return found


def _color(frame: "VideoFrame", shown: dict[str, str]) -> Color:
    matrix, primaries = shown["color_space"], shown["color_primaries"]
    layout = planar_format(frame.format.name, alpha=False)
    full_by_convention = layout.family != "yuv" or frame.format.name.startswith("yuvj")
    if layout.family != "yuv":
        matrix = "gbr"
    elif matrix in (*_UNTAGGED, "gbr"):
        matrix = matrix_by_size(frame.width, frame.height)
    elif matrix not in MATRICES:
        raise ValueError(
            f"uses the colour matrix {matrix}, which is not supported. Convert it first: "
            "ffmpeg -i INPUT -vf zscale=m=bt709 -c:v ffv1 -c:a copy OUTPUT.mkv"
        )
    value_range = shown["color_range"]
    full_range = value_range == "pc" or (value_range != "tv" and full_by_convention)
    if primaries in _UNTAGGED:
        # Full range comes from computers and cameras for stills, not from television.
        primaries = "bt709" if full_range else primaries_by_size(frame.width, frame.height)
    transfer = shown["color_trc"]
    return Color(
        matrix=matrix,
        primaries=primaries,
        transfer="bt709" if transfer in _UNTAGGED else transfer,
        full_range=full_range,
        siting=SITINGS.get(shown.get("cl", ""), SITINGS["left"]),
    )
