"""Chooses an encoder by the file's extension, and rounds frames to its code values."""

import hashlib
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from .color import Color, matrix_by_size, planes_from_rgb
from .planes import PlanarFormat

_LOG = logging.getLogger(__name__)
Rounding = Literal["round", "truncate"]


@dataclass(frozen=True)
class Encoding:
    """The format of the planes sent to ffmpeg, its encoder's arguments, and the container.

    container: in ffmpeg's name.
    """

    layout: PlanarFormat
    arguments: list[str]
    container: str


def choose_encoding(
    path: Path,
    *,
    codec: str | None,
    alpha: bool,
    bits: int,
    width: int,
    height: int,
    hdr: str | None = None,
) -> Encoding:
    """Returns the encoding for a path by its extension.

    codec: "h264" or "h265" for .mp4, else None. bits: the depth of the source's components, which
    is kept where the format has it. hdr: see `Color.hdr`. Raises ValueError for a codec, an alpha
    channel, HDR or a size that the format does not support.
    """
    suffix = path.suffix.lower()
    if codec is not None and (suffix != ".mp4" or codec not in ("h264", "h265")):
        raise ValueError(f"{path.name}: codec {codec} is unavailable; h264 and h265 go into .mp4")
    if (hdr == "linear light") != (suffix == ".exr"):
        raise ValueError(
            f"{path.name}: linear light is written as EXR, and only that: name frames %05d.exr"
            if hdr == "linear light"
            else f"{path.name}: EXR holds linear light, which this video is not: write PNG or .mkv"
        )
    if hdr and codec == "h264":
        raise ValueError(f"{path.name}: HDR ({hdr}) needs 10 bits: choose codec h265, .mov or .mkv")
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
    if suffix == ".exr":
        if alpha:  # stored multiplied with colours, which versions of ffmpeg do or leave undone
            raise ValueError(
                f"{path.name}: EXR is written without transparency: remove it first: "
                "ffmpeg -i %05d.exr -pix_fmt gbrpf32le OPAQUE/%05d.exr"
            )
        return Encoding(PlanarFormat("rgb", 32), ["-c:v", "exr", "-compression", "zip16"], "image2")
    if suffix not in (".mp4", ".webm"):
        depth = 8 if bits == 8 else 16
        stored = ("rgba" if alpha else "rgb") + ("64be" if alpha else "48be") * (depth > 8)
        arguments = ["-c:v", "png", "-pix_fmt", "rgb24" if stored == "rgb" else stored]
        return Encoding(PlanarFormat("rgb", depth, alpha), arguments, "image2")

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
    if suffix == ".mp4" and (codec == "h265" or (codec is None and bits > 8)):
        if min(width, height) < 32:
            raise ValueError(f"{path.name}: H.265 needs at least 32x32, not {width}x{height}")
        # x265 writes past its buffers if a narrow picture is not a multiple of its blocks.
        blocks = ":ctu=16" if width < 64 else ""
        arguments = ["-c:v", "libx265", "-crf", "16", "-tag:v", "hvc1"]
        arguments += ["-x265-params", f"log-level=error{blocks}"]
        return Encoding(PlanarFormat("yuv", 10, False, subsampling), arguments, "mp4")
    layout = PlanarFormat("yuv", 10 if bits > 8 and suffix == ".webm" else 8, False, subsampling)
    if suffix == ".webm":
        # For web pages: every browser plays it, and frequent key frames make seeking fast.
        arguments = ["-c:v", "libvpx-vp9", "-crf", "8", "-b:v", "0", "-g", "12", "-row-mt", "1"]
        arguments += ["-deadline", "good", "-cpu-used", "5"]
        # One packet for each frame: no hidden frames, and none that wait for later ones.
        arguments += ["-auto-alt-ref", "0", "-lag-in-frames", "0"]
        return Encoding(layout, arguments, "webm")
    return Encoding(layout, ["-c:v", "libx264", "-crf", "16"], "mp4")


def stored_color(encoding: Encoding, source: Color | None, width: int, height: int) -> Color:
    """Returns a result's colour tags: a matrix by its size, the source's primaries and transfer.

    source: None without a source. Wide-gamut sources keep their matrix, which players could not
    infer from the size.
    """
    is_rgb = encoding.layout.family == "rgb"
    if is_rgb:
        matrix = "gbr"
    elif source is not None and source.matrix == "bt2020nc":
        matrix = "bt2020nc"
    else:
        matrix = matrix_by_size(width, height)
    tags = source or Color(matrix=matrix)
    primaries, transfer = tags.primaries, tags.transfer
    if encoding.container == "image2" and primaries == transfer == "bt709":
        # Viewers show untagged images as sRGB, like video; tagged as BT.709 they look different.
        primaries = transfer = "unknown"
    return replace(tags, matrix=matrix, primaries=primaries, transfer=transfer, full_range=is_rgb)


def tag_filter(color: Color) -> str:
    """Returns an ffmpeg filter that tags frames with their colours and leaves them unchanged."""
    span = "pc" if color.full_range else "tv"
    return (
        f"setparams=range={span}:colorspace={color.matrix}"
        f":color_primaries={color.primaries}:color_trc={color.transfer}"
    )


def quantize(
    frame: Tensor, layout: PlanarFormat, matrix: str, *, rounding: Rounding, seed: int, index: int
) -> bytes:
    """Rounds a frame (c h w) in [0, 1] to code values and returns the bytes of its planes.

    Floats are neither rounded nor limited.

    layout, matrix: see `color.planes_from_rgb`. rounding: "truncate" first truncates R'G'B' to 8
    bit, as the reference does; "round" dithers 8-bit Y'CbCr with uniform noise before rounding, so
    that smooth areas show no banding and exact values stay exact. seed, index: determine the noise;
    index is the frame's number in the source.
    """
    frame = frame.detach().to("cpu", torch.float32)
    if layout.bits == 32:
        return layout.pack(planes_from_rgb(frame, layout, matrix))
    frame = frame.clamp(0, 1)
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
