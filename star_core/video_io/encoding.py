"""How results are stored: encoders by extension, and frames rounded to what they take."""

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from .color import Color, matrix_by_size, planes_from_rgb
from .planes import PlanarFormat

_LOG = logging.getLogger(__name__)
Rounding = Literal["round", "truncate"]
_RGB = PlanarFormat("rgb")
_RGBA = PlanarFormat("rgb", alpha=True)


@dataclass(frozen=True)
class Encoding:
    """Planes handed to ffmpeg, its encoder's arguments, and the container (ffmpeg's name)."""

    layout: PlanarFormat
    arguments: list[str]
    container: str


def choose_encoding(
    path: Path, *, codec: str | None, alpha: bool, bits: int, width: int, height: int
) -> Encoding:
    """Encoding by the extension of `path`; `codec`, "h264" or "h265", is a choice for .mp4.

    bits: of the source's components, as many as which .mkv keeps; others have a depth of their own.
    """
    suffix = path.suffix.lower()
    if codec is not None and (suffix != ".mp4" or codec not in ("h264", "h265")):
        raise ValueError(f"{path.name}: codec {codec} is not to be had; h264 and h265 go into .mp4")
    if suffix == ".mkv":
        bits = next(depth for depth in (8, 10, 12, 16) if bits <= depth)
        layout = PlanarFormat("rgb", bits, alpha)
        stored = layout.name if bits > 8 else "bgra" if alpha else "bgr0"
        level = "3" if width > 1 else "1"  # 3 cuts the picture into slices
        arguments = ["-c:v", "ffv1", "-level", level, "-g", "1", "-pix_fmt", stored]
        return Encoding(layout, arguments, "matroska")
    if suffix == ".mov":
        profile = "4444" if alpha else "hq"
        layout = PlanarFormat("yuv", 10, alpha, (1, 1) if alpha else (2, 1))
        arguments = ["-c:v", "prores_ks", "-profile:v", profile, "-vendor", "apl0"]
        return Encoding(layout, arguments, "mov")
    if suffix not in (".mp4", ".webm"):
        arguments = ["-c:v", "png", "-pix_fmt", "rgba" if alpha else "rgb24"]
        return Encoding(_RGBA if alpha else _RGB, arguments, "image2")

    if alpha:
        raise ValueError(f"{path.name}: {suffix} cannot carry alpha; write .mkv, .mov or a folder")
    subsampling = (2, 2)
    if width % 2 or height % 2:
        _LOG.warning(
            "%s: %dx%d is odd, so chroma is stored in full (yuv444p), which some players refuse",
            path.name,
            width,
            height,
        )
        subsampling = (1, 1)
    if codec == "h265":
        if min(width, height) < 32:
            raise ValueError(f"{path.name}: H.265 takes 32x32 and more, not {width}x{height}")
        # x265 writes past its buffers where a narrow picture is no multiple of its blocks.
        blocks = ":ctu=16" if width < 64 else ""
        arguments = ["-c:v", "libx265", "-crf", "16", "-tag:v", "hvc1"]
        arguments += ["-x265-params", f"log-level=error{blocks}"]
        return Encoding(PlanarFormat("yuv", 10, False, subsampling), arguments, "mp4")
    layout = PlanarFormat("yuv", 8, False, subsampling)
    if suffix == ".webm":
        # For pages: every browser plays it, and key frames close together make seeking quick.
        arguments = ["-c:v", "libvpx-vp9", "-crf", "8", "-b:v", "0", "-g", "12", "-row-mt", "1"]
        arguments += ["-deadline", "good", "-cpu-used", "5"]
        # A packet is a frame: none is hidden, none waits for later ones.
        arguments += ["-auto-alt-ref", "0", "-lag-in-frames", "0"]
        return Encoding(layout, arguments, "webm")
    return Encoding(layout, ["-c:v", "libx264", "-crf", "16"], "mp4")


def stored_color(encoding: Encoding, source: Color | None, width: int, height: int) -> Color:
    """Colour of the result: matrix by its size, primaries and transfer of the source.

    Wide-gamut sources keep their matrix, which no player would guess from the size.
    """
    is_rgb = encoding.layout.family == "rgb"
    if is_rgb:
        matrix = "gbr"
    elif source is not None and source.matrix == "bt2020nc":
        matrix = "bt2020nc"
    else:
        matrix = matrix_by_size(width, height)
    kept = source or Color(matrix=matrix)
    primaries, transfer = kept.primaries, kept.transfer
    if encoding.container == "image2" and primaries == transfer == "bt709":
        # Without tags an image is sRGB, as which video is shown; BT.709 by name looks different.
        primaries = transfer = "unknown"
    return Color(matrix=matrix, primaries=primaries, transfer=transfer, full_range=is_rgb)


def tag_filter(color: Color) -> str:
    """ffmpeg filter that names the colours of frames without touching them."""
    span = "pc" if color.full_range else "tv"
    return (
        f"setparams=range={span}:colorspace={color.matrix}"
        f":color_primaries={color.primaries}:color_trc={color.transfer}"
    )


def quantize(
    frame: Tensor, layout: PlanarFormat, matrix: str, *, rounding: Rounding, seed: int, index: int
) -> bytes:
    """(c h w) in [0, 1] -> bytes of the planes.

    "truncate" cuts R'G'B' to 8 bit first, as the reference does. Otherwise 8-bit Y'CbCr is dithered
    by uniform noise before rounding: smooth areas get no bands, and exact values stay exact. The
    noise depends on `seed` and `index`, the frame's number in the source, and nothing else.
    """
    frame = frame.detach().to("cpu", torch.float32).clamp(0, 1)
    if rounding == "truncate":
        frame = (frame * 255).floor() / 255
    planes = planes_from_rgb(frame, layout, matrix)
    if rounding == "round" and layout.family == "yuv" and layout.bits == 8:
        digest = hashlib.blake2b(f"{seed} {index}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
        noise = [torch.rand(plane.shape, generator=generator) for plane in planes]
    else:
        noise = [torch.tensor(0.5)] * len(planes)
    return layout.pack(
        [(p + n).floor().clamp(0, layout.peak) for p, n in zip(planes, noise, strict=True)]
    )
