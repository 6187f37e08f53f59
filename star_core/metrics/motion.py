"""Compares a video's motion with its ground truth: optical flow, warping error, flicker, tOF.

A pair is two neighbouring frames (c h w) in [0, 1], c = 3 or 4; alpha is not compared.
"""

from collections.abc import Callable
from types import ModuleType

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor

from .fidelity import luma
from .meters import Pair

# A function of two frames (c h w) that returns displacements (2 h w) in pixels, x then y.
Flow = Callable[[Tensor, Tensor], Tensor]


def flicker(restored: Pair, reference: Pair) -> float:
    """Returns the change between frames that the reference does not have, in 8-bit levels.

    It is the mean of |change of restored - change of reference| of neighbouring frames (c h w) in
    [0, 1].
    """
    change, expected = (pair[1][:3] - pair[0][:3] for pair in (restored, reference))
    return 255 * F.l1_loss(change, expected).item()


def warping_error(restored: Pair, reference: Pair, flow: Flow | None = None) -> float:
    """Returns the flow warping error x 1000 along the reference's motion (Lai et al. 2018).

    restored, reference: neighbouring frames (c h w) in [0, 1]. flow: None for OpenCV's DIS on
    luma. The second frame, warped back to the first, is subtracted from it; the result is the mean
    square over colours and pixels that are not occluded, nan if all are. Blur lowers it too, so
    read it beside PSNR.
    """
    flow = flow or optical_flow
    forward, backward = flow(reference[0], reference[1]), flow(reference[1], reference[0])
    visible = visibility(forward, backward)
    error = (warp(restored[1][:3], forward) - restored[0][:3]) ** 2
    return 1000 * reduce(error, "c h w -> h w", "mean")[visible].mean().item()


def own_warping_error(restored: Pair, reference: Pair, flow: Flow | None = None) -> float:
    """Returns the flow warping error x 1000 along the restored video's own motion.

    restored: neighbouring frames (c h w) in [0, 1]. reference: unused. flow: see `warping_error`.
    """
    return warping_error(restored, restored, flow)


def tof(restored: Pair, reference: Pair, flow: Flow | None = None) -> float:
    """Returns the mean difference between the motion and the reference's, in pixels.

    restored, reference: neighbouring frames (c h w) in [0, 1]. flow: None for OpenCV's DIS. Chu
    et al. 2020 (TecoGAN) use the mean length of the difference of the two flows too, but with
    Farneback's method and a cropped frame.
    """
    flow = flow or optical_flow
    difference = flow(restored[0], restored[1]) - flow(reference[0], reference[1])
    return difference.norm(dim=0).mean().item()


def optical_flow(frame: Tensor, target: Tensor) -> Tensor:
    """Returns the displacements (2 h w), x then y, in pixels, from `frame` to `target` (c h w).

    OpenCV's DIS (Kroeger et al. 2016), medium preset, on 8-bit luma, on the CPU. Raises ValueError
    without OpenCV.
    """
    cv2 = require_opencv()
    h, w = frame.shape[-2:]
    # OpenCV (5.0) reads outside the picture, and may crash, if a side is below 16.
    margin = (0, max(16 - w, 0), 0, max(16 - h, 0))
    lumas = torch.cat((luma(frame), luma(target)))
    lumas = (F.pad(lumas, margin, mode="replicate") * 255).round().byte()
    dis = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    first, second = lumas.cpu().numpy()
    flow = dis.calc(first, second, None)
    return rearrange(torch.from_numpy(flow)[:h, :w], "h w c -> c h w").to(frame)


def require_opencv() -> ModuleType:
    """Returns the module cv2. Raises ValueError, with advice, if OpenCV is not installed."""
    try:
        import cv2
    except ImportError as error:
        raise ValueError(
            "the warping error and tOF need OpenCV: `pip install opencv-python-headless`, or leave "
            "them out of `metrics`"
        ) from error
    return cv2


def warp(frame: Tensor, flow: Tensor) -> Tensor:
    """Samples a frame (c h w) where `flow` (2 h w) points: bilinear, edges repeated."""
    h, w = frame.shape[-2:]
    # grid_sample counts from -1 to 1 between the centres of the outer pixels.
    sides = torch.tensor((max(w - 1, 1), max(h - 1, 1)), dtype=flow.dtype, device=flow.device)
    grid = rearrange(_targets(flow), "c h w -> h w c") * 2 / sides - 1
    return F.grid_sample(frame[None], grid[None], padding_mode="border", align_corners=True)[0]


def visibility(forward: Tensor, backward: Tensor) -> Tensor:
    """Returns which pixels (h w) of a frame are visible in the next one.

    forward, backward: flows (2 h w) to the next frame and back. A pixel is visible if both flows
    cancel: |f + b|^2 < 0.01 (|f|^2 + |b|^2) + 0.5 (Sundaram et al. 2010), with b where f points to,
    which must be inside the frame.
    """
    back = warp(backward, forward)
    squares = ((forward + back) ** 2).sum(0), (forward**2).sum(0) + (back**2).sum(0)
    x, y = _targets(forward)
    h, w = forward.shape[-2:]
    inside = (x >= 0) & (x <= w - 1) & (y >= 0) & (y <= h - 1)
    return inside & (squares[0] < 0.01 * squares[1] + 0.5)


def _targets(flow: Tensor) -> Tensor:
    """Returns the pixel coordinates (2 h w), x then y, to which a flow (2 h w) points."""
    h, w = flow.shape[-2:]
    y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    return flow + torch.stack((x, y)).to(flow)
