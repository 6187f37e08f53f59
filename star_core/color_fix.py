"""Colour transfer: the result takes the colours of the input, frame by frame.

All functions take and give frames in [0, 1], (... c h w) with any leading dimensions, for example
(b c f h w) or (f c h w). Nothing crosses frames, so one frame at a time gives the same result.
"""

import torch
from torch import Tensor


def adain_color_fix(video: Tensor, reference: Tensor) -> Tensor:
    """Give every frame and channel the mean and the standard deviation of the reference's.

    AdaIN (Huang and Belongie 2017) over the pixels of a frame; specification, section 7. The
    reference may have any size, the same leading dimensions otherwise.
    """
    mean, std = _pixel_statistics(video)
    reference_mean, reference_std = _pixel_statistics(reference)
    return ((video - mean) / std * reference_std + reference_mean).clamp(0, 1)


def _pixel_statistics(frames: Tensor) -> tuple[Tensor, Tensor]:
    unbiased = frames.shape[-2] * frames.shape[-1] > 1  # one pixel has no unbiased variance
    variance = frames.var(dim=(-2, -1), keepdim=True, correction=int(unbiased))
    return frames.mean(dim=(-2, -1), keepdim=True), (variance + 1e-5).sqrt()


def wavelet_color_fix(video: Tensor, reference: Tensor) -> Tensor:
    """Keep the detail of `video` and take the coarse colours of `reference`, of the same size.

    Five levels of an a-trous wavelet transform; specification, section 7. The sum of the high
    bands is the frame minus its last low band, and the low band is linear, so one pass suffices.
    """
    if video.shape != reference.shape:
        raise ValueError(
            f"the wavelet colour fix needs frames of one size, got {tuple(video.shape)} and "
            f"{tuple(reference.shape)}: upsample the reference first, or use adain"
        )
    low = reference - video
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


def no_color_fix(video: Tensor, reference: Tensor) -> Tensor:
    """The result as it is, in [0, 1]."""
    return video.clamp(0, 1)


COLOR_FIXES = {"adain": adain_color_fix, "wavelet": wavelet_color_fix, "none": no_color_fix}
