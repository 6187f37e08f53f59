"""How close a frame is to its ground truth, pixel by pixel: PSNR, SSIM, MS-SSIM.

Frames are (c h w) in [0, 1], c = 3 or 4: alpha is not compared.
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor


def psnr(restored: Tensor, reference: Tensor) -> float:
    """Peak signal-to-noise ratio over pixels and colours in dB, peak 1; inf for equal frames."""
    mse = F.mse_loss(restored[:3], reference[:3]).item()
    return -10 * math.log10(mse) if mse else math.inf


def psnr_y(restored: Tensor, reference: Tensor) -> float:
    """PSNR of the luma in dB with peak 255 where white is 235, as super-resolution reports it.

    So a grey error has 1.32 dB more than by `psnr`.
    """
    return psnr(luma(restored), luma(reference))


def luma(frame: Tensor) -> Tensor:
    """BT.601 luma (1 h w) in [16/255, 235/255], MATLAB's rgb2ycbcr unrounded."""
    weights = torch.tensor((65.481, 128.553, 24.966), dtype=frame.dtype, device=frame.device)
    return ((weights[:, None, None] * frame[:3]).sum(0, keepdim=True) + 16) / 255


def ssim(restored: Tensor, reference: Tensor) -> float:
    """Structural similarity in [-1, 1], the mean over pixels and the three colours.

    Wang et al. 2004: Gaussian window of 11x11 and sigma 1.5, K1 = 0.01, K2 = 0.03, population
    variances; only windows that lie inside the frame count, so sides are at least 11.
    """
    if min(restored.shape[-2:]) < 11:
        raise ValueError(
            f"SSIM needs frames of at least 11x11, got {size_of(restored)}: leave it out of "
            "`metrics`"
        )
    x, y = restored[:3], reference[:3]
    moments = _gaussian_means(torch.stack((x, y, x * x, y * y, x * y)))
    mean_x, mean_y = moments[:2]
    var_x, var_y, cov = moments[2:] - torch.stack((mean_x**2, mean_y**2, mean_x * mean_y))
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * cov + c2) / (var_x + var_y + c2)
    return (luminance * structure).mean().item()


def _gaussian_means(maps: Tensor) -> Tensor:
    """Means over SSIM's window: (n c h w) -> (n c h-10 w-10)."""
    offsets = torch.arange(-5, 6, dtype=maps.dtype, device=maps.device)
    window = torch.exp(-(offsets**2) / (2 * 1.5**2))
    window = (window / window.sum())[None, None]  # (1 1 11)
    planes = rearrange(maps, "n c h w -> (n c) 1 h w")
    planes = F.conv2d(F.conv2d(planes, window[..., None]), window[..., None, :])
    return rearrange(planes, "(n c) 1 h w -> n c h w", n=len(maps))


def size_of(frame: Tensor) -> str:
    """WIDTHxHEIGHT of a frame (c h w), for messages."""
    return f"{frame.shape[-1]}x{frame.shape[-2]}"
