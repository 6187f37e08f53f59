"""Colour transfer: the result takes the colours of the input, frame by frame.

The fixes take and give frames in [0, 1], (... c h w) with any leading dimensions, for example
(b c f h w) or (f c h w). Nothing crosses frames, so one frame at a time gives the same result,
unless the reference's statistics are steadied over time first: `fix_colors` does.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .windows.geometry import upsample


class Statistics(NamedTuple):
    """Mean and standard deviation of each frame and channel over its pixels, (... c 1 1)."""

    mean: Tensor
    std: Tensor


def adain_color_fix(
    video: Tensor, reference: Tensor, statistics: Statistics | None = None
) -> Tensor:
    """Give every frame and channel the mean and the standard deviation of the reference's.

    AdaIN (Huang and Belongie 2017) over the pixels of a frame; specification, section 7. The
    reference may have any size, the same leading dimensions otherwise. statistics: what the
    reference counts with, None for its own.
    """
    mean, std = pixel_statistics(video)
    reference_mean, reference_std = statistics or pixel_statistics(reference)
    return ((video - mean) / std * reference_std + reference_mean).clamp(0, 1)


def pixel_statistics(frames: Tensor) -> Statistics:
    """Of (... c h w); the variance is at least 1e-5."""
    unbiased = frames.shape[-2] * frames.shape[-1] > 1  # one pixel has no unbiased variance
    variance = frames.var(dim=(-2, -1), keepdim=True, correction=int(unbiased))
    return Statistics(frames.mean(dim=(-2, -1), keepdim=True), (variance + 1e-5).sqrt())


def wavelet_color_fix(
    video: Tensor, reference: Tensor, statistics: Statistics | None = None
) -> Tensor:
    """Keep the detail of `video` and take the coarse colours of `reference`, of the same size.

    Five levels of an a-trous wavelet transform; specification, section 7. The sum of the high
    bands is the frame minus its last low band, and the low band is linear, so one pass suffices.
    statistics: what the reference counts with, None for its own. Only the mean does: noise adds to
    the deviation, but not to the low band.
    """
    if video.shape != reference.shape:
        raise ValueError(
            f"the wavelet colour fix needs frames of one size, got {tuple(video.shape)} and "
            f"{tuple(reference.shape)}: upsample the reference first, or use adain"
        )
    low = reference - video
    if statistics:
        low = low + (statistics.mean - reference.mean(dim=(-2, -1), keepdim=True))
    for level in range(5):
        low = _a_trous_low(low, 2**level)
    return (video + low).clamp(0, 1)


def _a_trous_low(frames: Tensor, spacing: int) -> Tensor:
    """Filter rows and columns with [1 2 1] / 4, taps `spacing` pixels apart, edges repeated."""
    for dim in (-2, -1):
        size = frames.shape[dim]
        taps = torch.arange(-spacing, size + spacing, device=frames.device).clamp(0, size - 1)
        before, here, after = (
            frames.index_select(dim, taps[start : start + size])
            for start in (0, spacing, 2 * spacing)
        )
        frames = (before + 2 * here + after) / 4
    return frames


def no_color_fix(video: Tensor, reference: Tensor, statistics: Statistics | None = None) -> Tensor:
    """The result as it is, in [0, 1]."""
    return video.clamp(0, 1)


COLOR_FIXES = {"adain": adain_color_fix, "wavelet": wavelet_color_fix, "none": no_color_fix}


def steady_statistics(
    statistics: Statistics, smoothing: float, similar: float = 0.05
) -> Statistics:
    """Statistics of a clip (f c 1 1) without the flicker that noise and compression give them.

    A bilateral filter over time (Tomasi and Manduchi 1998): each frame takes the mean of those
    around it, weighted by a Gaussian of `smoothing` frames and by how alike their statistics are,
    a Gaussian of `similar`. So cuts, flashes and fades stay, and frames that have nothing to do
    with each other are left alone.
    """
    values = torch.cat(statistics, dim=1)  # (f 2c 1 1)
    frames = torch.arange(len(values), device=values.device)
    reach = math.ceil(3 * smoothing)
    steady = []
    for i in range(len(values)):
        near = slice(max(i - reach, 0), i + reach + 1)
        apart = (frames[near] - i) / smoothing
        unlike = (values[near] - values[i]).flatten(1).norm(dim=1) / similar
        weights = (-0.5 * (apart**2 + unlike**2)).exp()
        steady.append(torch.einsum("f,fchw->chw", weights / weights.sum(), values[near]))
    return Statistics(*torch.stack(steady).chunk(2, dim=1))


def fix_colors(
    video: Tensor,
    reference: Tensor,
    *,
    method: str = "adain",
    strength: float = 1.0,
    smoothing: float = 0.0,
) -> Iterator[Tensor]:
    """Fixes a clip (f c h w) in [0, 1], yields frame by frame; a fourth channel is left alone.

    reference: as many frames; those of another size are enlarged first, as STAR enlarges its input.
    method: a key of COLOR_FIXES. strength: 0 for the video as it is, 1 for the whole fix.
    smoothing: frames over which the reference's statistics are steadied; 0 takes each frame alone,
    as the reference implementation does. ValueError for anything else.
    """
    if method not in COLOR_FIXES:
        raise ValueError(f"color fix must be one of {', '.join(COLOR_FIXES)}, got {method!r}")
    if not 0 <= strength <= 1:
        raise ValueError(f"strength must be from 0 to 1, got {strength}")
    if not (math.isfinite(smoothing) and smoothing >= 0):
        raise ValueError(f"smoothing must be a number of frames from 0 up, got {smoothing}")
    if len(video) != len(reference):
        raise ValueError(
            f"there are {len(video)} frames and {len(reference)} of the reference: give the same "
            "frames, before and after"
        )
    fix, (height, width) = COLOR_FIXES[method], video.shape[-2:]

    def source(i: int) -> Tensor:
        colors = reference[i, :3]
        if colors.shape[-2:] == (height, width):
            return colors
        return upsample(colors, (width, height), "bilinear").clamp(0, 1)

    steady = None
    if smoothing:
        each = [pixel_statistics(source(i)) for i in range(len(reference))]
        mean, std = (torch.stack(values) for values in zip(*each, strict=True))
        steady = steady_statistics(Statistics(mean, std), smoothing)
    for i, frame in enumerate(video):
        statistics = Statistics(steady.mean[i], steady.std[i]) if steady else None
        fixed = torch.lerp(frame[:3], fix(frame[:3], source(i), statistics), strength)
        yield torch.cat([fixed, frame[3:]])
