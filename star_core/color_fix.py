"""Colour transfer: the result takes the colours of the input, frame by frame.

All fixes take and return frames (... c h w) in [0, 1], with any leading dimensions. Each frame is
fixed on its own; only `fix_colors` can smooth the reference's statistics over time first.
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
    """Gives every frame and channel the mean and standard deviation of the reference's.

    AdaIN (Huang and Belongie 2017) over the pixels of a frame; specification, section 7.
    video: (... c h w) in [0, 1]. reference: the same shape except for height and width.
    statistics: used in place of the reference's own. Returns frames like `video`.
    """
    mean, std = pixel_statistics(video)
    reference_mean, reference_std = statistics or pixel_statistics(reference)
    return ((video - mean) / std * reference_std + reference_mean).clamp(0, 1)


def pixel_statistics(frames: Tensor) -> Statistics:
    """Returns mean and standard deviation of frames (... c h w); 1e-5 is added to the variance."""
    unbiased = frames.shape[-2] * frames.shape[-1] > 1  # one pixel has no unbiased variance
    variance = frames.var(dim=(-2, -1), keepdim=True, correction=int(unbiased))
    return Statistics(frames.mean(dim=(-2, -1), keepdim=True), (variance + 1e-5).sqrt())


def wavelet_color_fix(
    video: Tensor, reference: Tensor, statistics: Statistics | None = None
) -> Tensor:
    """Combines the detail of `video` with the coarse colours of `reference`.

    Five levels of an a-trous wavelet transform; specification, section 7.
    video, reference: (... c h w) in [0, 1], of one shape; ValueError otherwise.
    statistics: their mean is used in place of the reference's own. Their deviation is ignored,
    because noise changes the deviation of a frame but not its low band.
    Returns frames like `video`.
    """
    # The high bands sum to the frame minus its last low band, which is linear in the frame. So one
    # pass over the difference suffices.
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
    """Filters rows and columns with [1 2 1] / 4, taps `spacing` pixels apart, edges repeated."""
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
    """Returns `video` unchanged except for clamping to [0, 1]; other arguments are ignored."""
    return video.clamp(0, 1)


COLOR_FIXES = {"adain": adain_color_fix, "wavelet": wavelet_color_fix, "none": no_color_fix}


def steady_statistics(
    statistics: Statistics, smoothing: float, similar: float = 0.05
) -> Statistics:
    """Smooths statistics (f c 1 1) of a clip over time, removing flicker from noise or compression.

    A bilateral filter (Tomasi and Manduchi 1998): each frame takes a weighted mean of its
    neighbours. The weights are a Gaussian of the distance in frames, with standard deviation
    `smoothing`, times a Gaussian of the distance between the statistics, with standard deviation
    `similar`. So cuts, flashes and fades are preserved.
    """
    values = torch.cat(statistics, dim=1)  # (f 2c 1 1)
    frames = torch.arange(len(values), device=values.device)
    reach = math.ceil(3 * smoothing)
    steady = []
    for i in range(len(values)):
        near = slice(max(i - reach, 0), i + reach + 1)
        time_distance = (frames[near] - i) / smoothing
        value_distance = (values[near] - values[i]).flatten(1).norm(dim=1) / similar
        weights = (-0.5 * (time_distance**2 + value_distance**2)).exp()
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
    """Yields the frames (c h w) of a clip with the colours of a reference.

    video: (f c h w) in [0, 1]; a fourth channel (alpha) is not changed.
    reference: the same number of frames; other sizes are resized bilinearly first.
    method: a key of COLOR_FIXES. strength: from 0 (unchanged) to 1 (the full fix).
    smoothing: frames over which the reference's statistics are smoothed, see `steady_statistics`;
    0 treats each frame on its own, as the reference implementation does.
    Raises ValueError for an argument outside these ranges.
    """
    if method not in COLOR_FIXES:
        raise ValueError(f"color fix must be one of {', '.join(COLOR_FIXES)}, got {method!r}")
    if not 0 <= strength <= 1:
        raise ValueError(f"strength must be from 0 to 1, got {strength}")
    if not (math.isfinite(smoothing) and smoothing >= 0):
        raise ValueError(f"smoothing must be a number of frames from 0 up, got {smoothing}")
    if len(video) != len(reference):
        raise ValueError(
            f"the video has {len(video)} frames and the reference {len(reference)}: use the same "
            "frames, before and after upscaling"
        )
    fix, (height, width) = COLOR_FIXES[method], video.shape[-2:]

    def reference_frame(i: int) -> Tensor:
        colors = reference[i, :3]
        if colors.shape[-2:] == (height, width):
            return colors
        return upsample(colors, (width, height), "bilinear").clamp(0, 1)

    steady = None
    if smoothing:
        per_frame = [pixel_statistics(reference_frame(i)) for i in range(len(reference))]
        mean, std = (torch.stack(values) for values in zip(*per_frame, strict=True))
        steady = steady_statistics(Statistics(mean, std), smoothing)
    for i, frame in enumerate(video):
        statistics = Statistics(steady.mean[i], steady.std[i]) if steady else None
        fixed = torch.lerp(frame[:3], fix(frame[:3], reference_frame(i), statistics), strength)
        yield torch.cat([fixed, frame[3:]])
