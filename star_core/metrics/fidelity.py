"""Compares a frame with its ground truth pixel by pixel: PSNR, SSIM, MS-SSIM.

Frames are (c h w) in [0, 1], c = 3 or 4; alpha is not compared.
"""

import math

import torch
import torch.nn.functional as F
from einops import reduce
from torch import Tensor


def psnr(restored: Tensor, reference: Tensor) -> float:
    """Returns the peak signal-to-noise ratio of frames (c h w) in [0, 1], in dB.

    The peak is 1, the mean is over pixels and colours, and equal frames have inf.
    """
    mse = F.mse_loss(restored[:3], reference[:3]).item()
    return -10 * math.log10(mse) if mse else math.inf


def psnr_y(restored: Tensor, reference: Tensor) -> float:
    """Returns the PSNR in dB of the luma of frames (c h w) in [0, 1], as usual in super-resolution.

    The peak is 255 although white is 235, so a grey error has 1.32 dB more than in `psnr`.
    """
    return psnr(luma(restored), luma(reference))


def luma(frame: Tensor) -> Tensor:
    """Returns the BT.601 luma (1 h w) in [16/255, 235/255] of a frame (c h w) in [0, 1].

    It equals MATLAB's rgb2ycbcr without rounding.
    """
    weights = torch.tensor((65.481, 128.553, 24.966), dtype=frame.dtype, device=frame.device)
    return ((weights[:, None, None] * frame[:3]).sum(0, keepdim=True) + 16) / 255


def ssim(restored: Tensor, reference: Tensor) -> float:
    """Returns the structural similarity in [-1, 1] of frames (c h w) in [0, 1].

    Wang et al. 2004: Gaussian window of 11x11 and sigma 1.5, K1 = 0.01, K2 = 0.03, population
    variances; the mean over the three colours and all windows inside the frame. Raises ValueError
    for sides below 11.
    """
    _at_least(11, "SSIM", restored)
    luminance, structure = _similarity(restored[:3], reference[:3])
    return (luminance * structure).mean().item()


# The weights of the scales, the finest first, from a study with viewers (Wang et al. 2003).
_SCALES = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)


def ms_ssim(restored: Tensor, reference: Tensor) -> float:
    """Returns the multi-scale structural similarity in [0, 1] of frames (c h w) in [0, 1].

    Wang et al. 2003: five scales, each the 2x2 means of the previous one; the structure of every
    scale and the luminance of the coarsest, multiplied with the paper's exponents; the mean over
    the three colours, of which one with negative structure at some scale has 0. Raises ValueError
    for sides below 176.
    """
    _at_least(176, "MS-SSIM", restored)
    x, y = restored[:3], reference[:3]
    product = torch.ones(3, dtype=torch.float64)
    for scale, weight in enumerate(_SCALES, start=1):
        luminance, structure = _similarity(x, y)
        if scale == len(_SCALES):
            structure = luminance * structure
        product = product * reduce(structure, "c h w -> c", "mean").clamp(min=0) ** weight
        x, y = F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)
    return product.mean().item()


def _similarity(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Returns SSIM's luminance and structure at each pixel: (c h w) -> (c h-10 w-10)."""
    # In float64 on the CPU: variances are small differences, and not every device has float64.
    x, y = x.cpu().double(), y.cpu().double()
    moments = _gaussian_means(torch.stack((x, y, x * x, y * y, x * y)))
    mean_x, mean_y = moments[:2]
    var_x, var_y, cov = moments[2:] - torch.stack((mean_x**2, mean_y**2, mean_x * mean_y))
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    return luminance, (2 * cov + c2) / (var_x + var_y + c2)


def _at_least(side: int, metric: str, frame: Tensor) -> None:
    if min(frame.shape[-2:]) < side:
        raise ValueError(
            f"{metric} needs frames of at least {side}x{side}, got {size_of(frame)}: leave it out "
            "of `metrics`"
        )


def _gaussian_means(maps: Tensor) -> Tensor:
    """Returns means over SSIM's window: (n c h w) -> (n c h-10 w-10)."""
    offsets = torch.arange(-5, 6, dtype=torch.float64)
    window = torch.exp(-(offsets**2) / (2 * 1.5**2))
    weights = (window / window.sum()).tolist()

    # Eleven additions are faster on a CPU than a convolution of single channels.
    def along(dim: int, x: Tensor) -> Tensor:
        length = x.shape[dim] - 10
        means = x.narrow(dim, 0, length) * weights[0]
        for place, weight in enumerate(weights[1:], start=1):
            means.add_(x.narrow(dim, place, length), alpha=weight)
        return means

    return along(-1, along(-2, maps))


def size_of(frame: Tensor) -> str:
    """Returns "WIDTHxHEIGHT" of a frame (c h w), for messages."""
    return f"{frame.shape[-1]}x{frame.shape[-2]}"
