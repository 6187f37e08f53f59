"""Metrics of a restored video, with a ground truth and without.

A frame is (c h w) in [0, 1], c = 3 or 4; alpha is not compared. A value that does not exist (of a
pair at the first frame, or of a picture that is occluded everywhere) is nan, and means leave it
out.
"""

from .catalogue import DEFAULT_METRICS, METRICS, Metric, Setup
from .comparison import Comparison, compare
from .dists import load_dists
from .fidelity import luma, ms_ssim, psnr, psnr_y, ssim
from .lpips import load_lpips
from .motion import flicker, optical_flow, own_warping_error, tof, visibility, warp, warping_error
from .niqe import load_niqe

__all__ = [
    "DEFAULT_METRICS",
    "METRICS",
    "Comparison",
    "Metric",
    "Setup",
    "compare",
    "flicker",
    "load_dists",
    "load_lpips",
    "load_niqe",
    "luma",
    "ms_ssim",
    "optical_flow",
    "own_warping_error",
    "psnr",
    "psnr_y",
    "ssim",
    "tof",
    "visibility",
    "warp",
    "warping_error",
]
