"""What a restored video is measured by, with its ground truth and without.

A frame is (c h w) in [0, 1], c = 3 or 4: alpha is not compared. A value that does not exist (of a
pair at the first frame, of a picture that is occluded everywhere) is nan, and means leave it out.
"""

from .comparison import (
    DEFAULT_METRICS,
    FRAME_METRICS,
    PAIR_METRICS,
    Comparison,
    compare,
)
from .fidelity import luma, psnr, psnr_y, ssim
from .lpips import load_lpips
from .motion import flicker, optical_flow, own_warping_error, visibility, warp, warping_error

__all__ = [
    "DEFAULT_METRICS",
    "FRAME_METRICS",
    "PAIR_METRICS",
    "Comparison",
    "compare",
    "flicker",
    "load_lpips",
    "luma",
    "optical_flow",
    "own_warping_error",
    "psnr",
    "psnr_y",
    "ssim",
    "visibility",
    "warp",
    "warping_error",
]
