"""Compares a frame with its ground truth pixel by pixel: PSNR, SSIM, MS-SSIM.

Frames are (c h w) in [0, 1], c = 3 or 4; alpha is not compared.
"""

import math

import torch
import torch.nn.functional as F
from einops import reduce
from torch import Tensor

from .gaussian import gaussian_window, local_mean


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
    red, green, blue = frame[:3, None]
    y = red * 65.481 + green * 128.553
    return y.add_(blue * 24.966).add_(16).div_(255)


def ssim(restored: Tensor, reference: Tensor) -> float:
    """Returns the structural similarity in [-1, 1] of frames (c h w) in [0, 1].

    Wang et al. 2004: Gaussian window of 11x11 and sigma 1.5, K1 = 0.01, K2 = 0.03, population
    variances; the mean over the three colours and all windows inside the frame. Raises ValueError
    for sides below 11.
    """
    _at_least(11, "SSIM", restored)
    return _similarity(restored[:3], reference[:3])[0].mean().item()


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
        similarity, structure = _similarity(x, y)
        if scale == len(_SCALES):
            structure = similarity
        product = product * structure.clamp(min=0) ** weight
        x, y = F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)
    return product.mean().item()


_LINE = gaussian_window(11, 1.5).sum(0)
_STRIP = 16  # rows whose moments fit into the cache of a CPU


def _similarity(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the means of SSIM, and of its factor structure: (c h w) -> (c), (c).

    Moments are those of sum and difference: four maps instead of the five of x and y.
    """
    # In float64 on the CPU: variances are small differences, and not every device has float64.
    x, y = x.cpu().double(), y.cpu().double()
    both = torch.stack((x + y, x - y))
    c1, c2 = 2 * 0.01**2, 2 * 0.03**2
    total = torch.zeros(2, len(x), dtype=torch.float64)
    rows = x.shape[-2] - len(_LINE) + 1
    for top in range(0, rows, _STRIP):
        strip = both[..., top : top + _STRIP + len(_LINE) - 1, :]
        maps = local_mean(torch.stack((strip, strip**2)), _LINE[:, None])
        means, squares = local_mean(maps, _LINE[None])
        of_sum, of_difference = means**2
        var_sum, var_difference = squares - means**2
        luminance = (of_sum - of_difference + c1) / (of_sum + of_difference + c1)
        structure = (var_sum - var_difference + c2) / (var_sum + var_difference + c2)
        total += reduce(torch.stack((luminance * structure, structure)), "k c h w -> k c", "sum")
    similarity, structure = total / (rows * (x.shape[-1] - len(_LINE) + 1))
    return similarity, structure


def _at_least(side: int, metric: str, frame: Tensor) -> None:
    if min(frame.shape[-2:]) < side:
        raise ValueError(
            f"{metric} needs frames of at least {side}x{side}, got {size_of(frame)}: leave it out "
            "of `metrics`"
        )


def size_of(frame: Tensor) -> str:
    """Returns "WIDTHxHEIGHT" of a frame (c h w), for messages."""
    return f"{frame.shape[-1]}x{frame.shape[-2]}"
