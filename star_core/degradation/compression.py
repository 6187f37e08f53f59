"""Compresses video: JPEG as torch operations, and real codecs by the bundled ffmpeg."""

import functools
import subprocess
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from .ops import per_frame

VideoCodec = Literal["libx264", "libx265", "mpeg4"]

# ITU-T T.81 Annex K.1. The reference transposes the luma table; its chroma table is symmetric.
_LUMA = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
_CHROMA_CORNER = ((17, 18, 24, 47), (18, 21, 26, 66), (24, 26, 56, 99), (47, 66, 99, 99))
# JFIF: full-range BT.601.
_YCBCR = (
    (0.299, 0.587, 0.114),
    (-0.168736, -0.331264, 0.5),
    (0.5, -0.418688, -0.081312),
)
_RGB = ((1.0, 0.0, 1.402), (1.0, -0.344136, -0.714136), (1.0, 1.772, 0.0))


def jpeg(video: Tensor, quality: float | Tensor) -> Tensor:
    """Compresses every frame as a 4:2:0 JPEG picture, without the lossless entropy coding.

    video: (f 3 h w) in [0, 1] of any size, like the result. quality: in [1, 100], one number or
    (f,). Quantisation rounds, so the gradient is zero. Raises ValueError for another quality.
    """
    quality = per_frame(quality, video)
    if (quality < 1).any() or (quality > 100).any():
        raise ValueError(f"JPEG quality must be in [1, 100], got {quality.flatten().tolist()}")
    factor = _table_factor(quality)
    h, w = video.shape[-2:]
    x = F.pad(video * 255, (0, -w % 16, 0, -h % 16))
    y, chroma = _matrix(_YCBCR, x).split((1, 2), dim=1)  # chroma around 0: its offset cancels
    y = _quantize(y - 128, torch.tensor(_LUMA).T, factor) + 128
    table = torch.full((8, 8), 99)
    table[:4, :4] = torch.tensor(_CHROMA_CORNER)
    chroma = _quantize(F.avg_pool2d(chroma, 2), table, factor)
    chroma = F.interpolate(chroma, scale_factor=2, mode="nearest")
    x = _matrix(_RGB, torch.cat((y, chroma), dim=1))
    return x[..., :h, :w].clamp(0, 255) / 255


def luma_steps(quality: Tensor) -> Tensor:
    """Returns the steps (... 8 8) of JPEG's luma quantiser, in 8-bit levels.

    quality: (...) in [1, 100].
    """
    table = torch.tensor(_LUMA, dtype=quality.dtype, device=quality.device).T
    return table * _table_factor(quality)[..., None, None]


def block_dct(plane: Tensor) -> Tensor:
    """Returns the orthonormal DCT of 8x8 blocks: (... h w) -> (... h/8 w/8 8 8).

    Rows and columns that do not fill a block are left out.
    """
    h, w = (side // 8 * 8 for side in plane.shape[-2:])
    dct = _dct_matrix().to(plane)
    return dct @ rearrange(plane[..., :h, :w], "... (h y) (w x) -> ... h w y x", y=8, x=8) @ dct.T


def _table_factor(quality: Tensor) -> Tensor:
    # 100 would divide by zero: 99.75 leaves all table entries below a half level.
    quality = quality.clamp(max=99.75)
    return torch.where(quality < 50, 50 / quality, 2 - quality / 50)


def _matrix(matrix: tuple[tuple[float, ...], ...], x: Tensor) -> Tensor:
    return torch.einsum("ij,fjhw->fihw", torch.tensor(matrix, dtype=x.dtype, device=x.device), x)


def _quantize(plane: Tensor, table: Tensor, factor: Tensor) -> Tensor:
    """Rounds the DCT of 8x8 blocks of (f c h w) to multiples of factor (f 1 1 1) * table (8 8)."""
    h, w = plane.shape[-2:]
    dct = _dct_matrix().to(plane)
    step = table.to(plane) * factor  # (f 1 8 8)
    step = rearrange(step, "f 1 u v -> f 1 1 1 u v")
    blocks = dct.T @ ((block_dct(plane) / step).round() * step) @ dct
    return rearrange(blocks, "f c h w y x -> f c (h y) (w x)", h=h // 8, w=w // 8)


@functools.cache
def _dct_matrix() -> Tensor:
    """Returns the orthonormal DCT-II (frequency, sample), 8x8."""
    k = torch.arange(8, dtype=torch.float64)
    matrix = torch.cos((2 * k[None, :] + 1) * k[:, None] * torch.pi / 16) / 2
    matrix[0] /= 2**0.5
    return matrix


def codec_round_trip(
    video: Tensor,
    codec: VideoCodec,
    *,
    crf: float | None = None,
    qscale: float | None = None,
    bitrate: float | None = None,
    fps: float = 25.0,
    preset: str = "medium",
) -> Tensor:
    """Encodes a clip as 8-bit 4:2:0 video and decodes it: (f 3 h w) in [0, 1] -> the same.

    Exactly one of three must be set: crf (libx264, libx265), qscale (mpeg4; 1 best to 31), or
    bitrate in bit/s at `fps`. preset: of libx264 and libx265. Equal input gives equal output (one
    thread). Raises ValueError for another choice of rate control, RuntimeError if ffmpeg fails.
    """
    rate = [
        (option, value)
        for option, value in (("-crf", crf), ("-q:v", qscale), ("-b:v", bitrate))
        if value is not None
    ]
    if len(rate) != 1:
        raise ValueError("choose exactly one of crf, qscale and bitrate")
    (option, value), is_mpeg4 = rate[0], codec == "mpeg4"
    if (option == "-crf" and is_mpeg4) or (option == "-q:v" and not is_mpeg4):
        raise ValueError(f"{codec} has no such rate control: use {'qscale' if is_mpeg4 else 'crf'}")

    f, _, h, w = video.shape
    # Chroma needs even sides, and x265 at least one 32x32 block: the edge is repeated, later cut.
    height, width = max(h + h % 2, 32), max(w + w % 2, 32)
    x = F.pad(video, (0, width - w, 0, height - h), mode="replicate")
    frames = rearrange((x.clamp(0, 1) * 255).round().byte(), "f c h w -> f h w c").cpu()

    raw = ["-f", "rawvideo", "-pix_fmt", "rgb24"]
    encoder = ["-c:v", codec, option, f"{value:g}", "-pix_fmt", "yuv420p", "-threads", "1"]
    if not is_mpeg4:
        encoder += ["-preset", preset]
    elif bitrate is not None:  # the default tolerance is 4 Mbit/s, more than the rates used here
        limit = f"{bitrate:g}"
        encoder += ["-bt", limit, "-maxrate", limit, "-bufsize", f"{2 * bitrate:g}"]
    if codec == "libx265":
        encoder += ["-x265-params", "log-level=error:pools=none:frame-threads=1"]
    source = [*raw, "-s", f"{width}x{height}", "-r", f"{fps:g}", "-i", "-"]
    stream = _ffmpeg([*source, *encoder, "-f", "matroska", "-"], frames.numpy().tobytes())
    # Matroska rounds timestamps to 1 ms: passthrough decodes every frame once at any rate.
    data = _ffmpeg(["-i", "-", "-fps_mode", "passthrough", *raw, "-"], stream)
    if len(data) != frames.numel():
        raise RuntimeError(f"{codec} returned {len(data)} bytes for {frames.numel()}")
    decoded = torch.from_numpy(np.frombuffer(data, np.uint8).copy()).view(f, height, width, 3)
    decoded = rearrange(decoded[:, :h, :w], "f h w c -> f c h w")
    return decoded.to(video) / 255


def _ffmpeg(arguments: list[str], data: bytes) -> bytes:
    import imageio_ffmpeg

    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-nostdin", *arguments]
    result = subprocess.run(command, input=data, capture_output=True, check=False)
    if result.returncode:
        raise RuntimeError(f"ffmpeg failed: {result.stderr.decode(errors='replace').strip()}")
    return result.stdout
