"""Frame sizes: output size, padding to a size that the network takes, cropping, resizing."""

import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Padding(NamedTuple):
    """Numbers of pixels added at each side of a frame, in the order that `F.pad` takes."""

    left: int
    right: int
    top: int
    bottom: int


def output_size(
    width: int,
    height: int,
    scale: float | None = None,
    out_size: tuple[int, int] | None = None,
) -> tuple[int, int]:
    """Returns (width, height) of the result for an input of `width` x `height` pixels.

    scale: each side becomes floor(side * scale + 0.5). out_size: (width, height), returned as is.
    Raises ValueError for a scale below 1, for an `out_size` smaller than the input in either
    direction, and unless exactly one of the two is given.
    """
    if (scale is None) == (out_size is None):
        raise ValueError("give either a scale or an output size, not both and not neither")
    if scale is not None:
        if not (math.isfinite(scale) and scale >= 1):
            raise ValueError(f"scale must be a finite number from 1 up, got {scale:g}")
        return math.floor(width * scale + 0.5), math.floor(height * scale + 0.5)
    assert out_size is not None
    if out_size[0] < width or out_size[1] < height:
        raise ValueError(
            f"output size {out_size[0]}x{out_size[1]} is smaller than the input's "
            f"{width}x{height}: ask for at least {width}x{height}, or shrink the input first"
        )
    return out_size


def reference_padding(height: int, width: int) -> Padding:
    """Returns the padding of the reference for a frame of height x width pixels.

    Frames up to 720x1280 are centred in that size; larger ones are padded at the bottom and the
    right. Those get up to 64 extra pixels even if their size was valid already (specification,
    section 7).
    """
    rows = 720 - height if height <= 720 else (height + 48) // 64 * 64 + 16 - height
    columns = 1280 - width if width <= 1280 else (width // 64 + 1) * 64 - width
    top = rows // 2 if height <= 720 else 0
    left = columns // 2 if width <= 1280 else 0
    return Padding(left, columns - left, top, rows - top)


def minimal_padding(height: int, width: int, *, vae_factor: int, levels: int) -> Padding:
    """Returns the smallest padding that the network takes, centred.

    An odd pixel goes to the right or the bottom. vae_factor: pixels per latent. levels: number n of
    down-samplings in the network. The padded latents have H = 2 mod 2^n rows and W = 0 mod 2^n
    columns (specification, section 2.6: the network treats height asymmetrically).
    """
    step = vae_factor * 2**levels
    rows = (2 * vae_factor - height) % step
    columns = -width % step
    top, left = rows // 2, columns // 2
    return Padding(left, columns - left, top, rows - top)


def pad(video: Tensor, padding: Padding, mode: Literal["white", "replicate"]) -> Tensor:
    """Pads frames (... h w) in [-1, 1] with the value 1 ("white") or by repeating their edges."""
    left, right, top, bottom = padding
    if mode == "white":
        return F.pad(video, padding, value=1.0)
    height, width = video.shape[-2:]
    rows = torch.arange(-top, height + bottom, device=video.device).clamp(0, height - 1)
    columns = torch.arange(-left, width + right, device=video.device).clamp(0, width - 1)
    return video.index_select(-2, rows).index_select(-1, columns)


def crop(video: Tensor, padding: Padding) -> Tensor:
    """Removes the padding of frames (... h w), the inverse of `pad`; returns a view."""
    left, right, top, bottom = padding
    height, width = video.shape[-2:]
    return video[..., top : height - bottom, left : width - right]


def upsample(
    video: Tensor, size: tuple[int, int], mode: Literal["bilinear", "bicubic"] = "bilinear"
) -> Tensor:
    """Resizes frames (... c h w) to `size` = (width, height), without anti-aliasing.

    Pixel centres are aligned (align_corners False). Bicubic may overshoot the range of its input
    at edges; the result is not clamped.
    """
    width, height = size
    frames = video.reshape(-1, *video.shape[-3:])
    frames = F.interpolate(frames, size=(height, width), mode=mode, align_corners=False)
    return frames.reshape(*video.shape[:-2], height, width)


def scaled_bytes(
    video: Tensor, scale: float, mode: Literal["bilinear", "bicubic"] = "bilinear"
) -> Tensor:
    """Resizes frames (f c h w) in [0, 1] by `scale` in 8 bit; sides are rounded down.

    torch rounds to bytes after each direction, and uses the exact scale even if a side is rounded.
    The reference on CogVideoX prepares its input in this way: x4 bicubic below 720 columns, x2/3
    bilinear above.
    """
    frames = (video * 255).round().to(torch.uint8)
    return F.interpolate(frames, scale_factor=scale, mode=mode, align_corners=False) / 255


def shrunk(video: Tensor, factor: float) -> Tensor:
    """Shrinks frames (... c h w) in [0, 1] by `factor` with anti-aliased bicubic resampling.

    factor: at least 1, which returns the frames unchanged. Sides are rounded and at least 1 pixel;
    the result is clamped to [0, 1].
    """
    if factor == 1:
        return video
    height, width = (max(1, round(side / factor)) for side in video.shape[-2:])
    frames = video.reshape(-1, *video.shape[-3:])
    frames = F.interpolate(
        frames, size=(height, width), mode="bicubic", align_corners=False, antialias=True
    )
    return frames.clamp(0, 1).reshape(*video.shape[:-2], height, width)
