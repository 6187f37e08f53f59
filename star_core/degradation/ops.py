"""Blur, resizing and noise of real-world degradation (Real-ESRGAN, Wang et al. 2021), in torch.

All functions work on frames (f c h w) in [0, 1]. A parameter is one number for the clip or a tensor
(f,) with one value per frame, so that it can drift in time.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

KernelKind = Literal["gaussian", "generalized", "plateau"]
ResizeMode = Literal["area", "bilinear", "bicubic"]


def per_frame(value: float | Tensor, video: Tensor) -> Tensor:
    """Returns a parameter, one number or (f,), as (f 1 1 1) in the type of frames (f c h w)."""
    value = torch.as_tensor(value, dtype=video.dtype, device=video.device)
    return value.expand(video.shape[0]).view(-1, 1, 1, 1)


def blur_kernel(
    size: int,
    sigma: float | Sequence[float],
    theta: float = 0.0,
    *,
    kind: KernelKind = "gaussian",
    beta: float = 1.0,
) -> Tensor:
    """Returns a normalised blur kernel (size size), float64, centred on its middle pixel.

    size: an odd number. sigma: one width in pixels, or two along the axes of an ellipse that is
    turned by `theta` radians. kind: with q = x^T S^-1 x, "gaussian" is exp(-q/2), "generalized"
    exp(-q^beta/2), "plateau" 1/(1 + q^beta). Raises ValueError for another size or sigma.
    """
    _check_size(size)
    sigma_x, sigma_y = (sigma, sigma) if isinstance(sigma, int | float) else sigma
    if min(sigma_x, sigma_y) <= 0:
        raise ValueError(f"sigma must be above 0, got {sigma}: to not blur, leave the blur out")
    rotation = torch.tensor(
        [[math.cos(theta), -math.sin(theta)], [math.sin(theta), math.cos(theta)]],
        dtype=torch.float64,
    )
    inverse = rotation @ torch.diag(torch.tensor([sigma_x, sigma_y]).double() ** -2) @ rotation.T
    axis = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    xy = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), dim=-1)  # (h w 2), x first
    q = torch.einsum("hwi,ij,hwj->hw", xy, inverse, xy)
    match kind:
        case "gaussian":
            kernel = torch.exp(-0.5 * q)
        case "generalized":
            kernel = torch.exp(-0.5 * q**beta)
        case "plateau":
            kernel = 1 / (1 + q**beta)
    return kernel / kernel.sum()


def sinc_kernel(size: int, cutoff: float) -> Tensor:
    """Returns a normalised circular low-pass kernel (size size), float64, which causes ringing.

    size: an odd number. cutoff: radians per pixel, in (0, pi]. Raises ValueError for others.
    """
    _check_size(size)
    if not 0 < cutoff <= math.pi:
        raise ValueError(f"cutoff must be in (0, pi] radians per pixel, got {cutoff}")
    axis = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    radius = torch.hypot(axis[:, None], axis[None, :])
    centre = radius == 0
    safe = radius.masked_fill(centre, 1.0)
    kernel = cutoff * torch.special.bessel_j1(cutoff * safe) / (2 * math.pi * safe)
    kernel[centre] = cutoff**2 / (4 * math.pi)
    return kernel / kernel.sum()


def _check_size(size: int) -> None:
    if size < 1 or size % 2 == 0:
        raise ValueError(f"a kernel's size must be odd and at least 1, got {size}")


def reflect_pad(video: Tensor, radius: int) -> Tensor:
    """Pads (... h w) by `radius` pixels, mirrored at the edges without repeating these."""
    while radius > 0:
        # F.pad mirrors at most side - 1 pixels at once, and a side of one pixel can only repeat.
        step = min(radius, max(min(video.shape[-2:]) - 1, 1))
        mode = "reflect" if min(video.shape[-2:]) > 1 else "replicate"
        video = F.pad(video, (step, step, step, step), mode=mode)
        radius -= step
    return video


def blur(video: Tensor, kernel: Tensor) -> Tensor:
    """Filters frames (f c h w) with one kernel (k k) or one each (f k k); edges are mirrored."""
    f, c = video.shape[:2]
    kernel = kernel.to(video).expand(f, *kernel.shape[-2:]).repeat_interleave(c, dim=0)
    padded = rearrange(reflect_pad(video, kernel.shape[-1] // 2), "f c h w -> 1 (f c) h w")
    return rearrange(F.conv2d(padded, kernel[:, None], groups=f * c), "1 (f c) h w -> f c h w", f=f)


def gaussian_blur(video: Tensor, sigma: float | Tensor) -> Tensor:
    """Blurs frames (f c h w) with an isotropic Gaussian, cut at 4 sigma; edges are mirrored.

    sigma: in pixels, one number or (f,). Raises ValueError unless it is above 0.
    """
    sigma = per_frame(sigma, video).flatten()
    if (sigma <= 0).any():
        lowest = sigma.min()
        raise ValueError(f"sigma must be above 0, got {lowest:g}: to not blur, leave the blur out")
    return _separable_blur(video, sigma, math.ceil(4 * sigma.max().item()))


def _separable_blur(video: Tensor, sigma: Tensor, radius: int) -> Tensor:
    """Blurs with isotropic Gaussians (f,) cut at `radius`, along rows and columns in turn."""
    f, c = video.shape[:2]
    axis = torch.arange(-radius, radius + 1, dtype=video.dtype, device=video.device)
    kernel = torch.softmax(-0.5 * (axis / sigma[:, None]) ** 2, dim=1).repeat_interleave(c, dim=0)
    x = rearrange(reflect_pad(video, radius), "f c h w -> 1 (f c) h w")
    x = F.conv2d(x, kernel[:, None, :, None], groups=f * c)
    x = F.conv2d(x, kernel[:, None, None, :], groups=f * c)
    return rearrange(x, "1 (f c) h w -> f c h w", f=f)


def usm_sharpen(
    video: Tensor, *, weight: float = 0.5, size: int = 51, threshold: float = 10 / 255
) -> Tensor:
    """Sharpens frames (f c h w) in [0, 1] with an unsharp mask, as Real-ESRGAN does.

    weight: of the sharpened detail. size: of the Gaussian, an odd number. threshold: only detail
    above it is sharpened, with soft transitions. Raises ValueError for an even size.
    """
    _check_size(size)
    sigma = per_frame(0.3 * ((size - 1) * 0.5 - 1) + 0.8, video).flatten()
    residual = video - _separable_blur(video, sigma, size // 2)
    mask = _separable_blur((residual.abs() > threshold).to(video), sigma, size // 2)
    sharp = (video + weight * residual).clamp(0, 1)
    return mask * sharp + (1 - mask) * video


def resize(video: Tensor, size: tuple[int, int], mode: ResizeMode) -> Tensor:
    """Resizes frames (f c h w) to `size` (h, w), without antialiasing except that of mode "area".

    Raises ValueError for a size below one pixel.
    """
    if min(size) < 1:
        raise ValueError(f"cannot resize to {size[1]}x{size[0]}: use a larger input or scale")
    if mode == "area":
        return F.interpolate(video, size=size, mode="area")
    return F.interpolate(video, size=size, mode=mode, align_corners=False)


def gaussian_noise(
    video: Tensor, sigma: float | Tensor, *, generator: torch.Generator, grey: bool = False
) -> Tensor:
    """Adds white noise to frames (f c h w) and clips them to [0, 1].

    sigma: standard deviation in units of the range, one number or (f,). grey: whether all channels
    share the noise.
    """
    f, c, h, w = video.shape
    noise = torch.randn((f, 1 if grey else c, h, w), generator=generator, device=generator.device)
    return (video + noise.to(video) * per_frame(sigma, video)).clamp(0, 1)


def poisson_noise(
    video: Tensor, scale: float | Tensor, *, generator: torch.Generator, grey: bool = False
) -> Tensor:
    """Adds a sensor's photon noise to frames (f c h w) in [0, 1] and clips them.

    The sensor's full well is the number of levels in a frame, rounded up to a power of two. scale:
    a factor of the noise, one number or (f,). grey: whether all channels share the noise of the red
    channel, as in the reference.
    """
    image = (video.clamp(0, 1) * 255).round() / 255
    levels = torch.tensor([len(frame.unique()) for frame in image], device=video.device)
    full_well = per_frame(2 ** levels.float().log2().ceil(), video)
    image = image[:, :1] if grey else image
    counts = torch.poisson((image * full_well).to(generator.device), generator=generator)
    noise = counts.to(video) / full_well - image
    return (video + noise * per_frame(scale, video)).clamp(0, 1)
