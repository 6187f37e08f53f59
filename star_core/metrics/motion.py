"""How a video moves against its ground truth: optical flow, warping error, flicker, tOF.

A pair is two neighbouring frames (2 c h w) in [0, 1], c = 3 or 4: alpha is not compared.
"""

from collections.abc import Callable
from types import ModuleType

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor

from .fidelity import luma

# Displacements (2 h w) in pixels, x then y, of a frame (c h w) to another.
Flow = Callable[[Tensor, Tensor], Tensor]


def flicker(restored: Tensor, reference: Tensor) -> float:
    """Change from frame to frame that the reference does not have, in 8-bit levels.

    Mean of |change of restored - change of reference|; neighbouring frames (2 c h w) of each.
    """
    changes = restored[1, :3] - restored[0, :3], reference[1, :3] - reference[0, :3]
    return 255 * F.l1_loss(*changes).item()


def warping_error(restored: Tensor, reference: Tensor, flow: Flow | None = None) -> float:
    """Flow warping error x 1000 of neighbouring frames (2 c h w), along the reference's motion.

    Lai et al. 2018: the second frame, warped back to the first, is subtracted from it; the mean
    square over colours and non-occluded pixels, with values in [0, 1]. Flow by OpenCV's DIS on the
    reference's luma, or by `flow`. Blur lowers it too: read it beside PSNR.
    """
    flow = flow or optical_flow
    forward, backward = flow(reference[0], reference[1]), flow(reference[1], reference[0])
    visible = visibility(forward, backward)
    error = (warp(restored[1, :3], forward) - restored[0, :3]) ** 2
    return 1000 * reduce(error, "c h w -> h w", "mean")[visible].mean().item()


def own_warping_error(restored: Tensor, reference: Tensor, flow: Flow | None = None) -> float:
    """`warping_error` along the motion of the restored video itself, whatever the reference."""
    return warping_error(restored, restored, flow)


def tof(restored: Tensor, reference: Tensor, flow: Flow | None = None) -> float:
    """How far the motion of neighbouring frames (2 c h w) is from the reference's, in pixels.

    Chu et al. 2020 (TecoGAN): mean length of the difference of the two flows, here by DIS or by
    `flow` where the authors took Farneback's and cropped the frame.
    """
    flow = flow or optical_flow
    difference = flow(restored[0], restored[1]) - flow(reference[0], reference[1])
    return difference.norm(dim=0).mean().item()


def optical_flow(frame: Tensor, target: Tensor) -> Tensor:
    """Displacements (2 h w), x then y, in pixels, of what `frame` shows to its place in `target`.

    OpenCV's DIS (Kroeger et al. 2016), medium preset, on 8-bit luma, on the CPU.
    """
    cv2 = require_opencv()
    h, w = frame.shape[-2:]
    # OpenCV (5.0) reads outside the picture, down to a segmentation fault, if a side is below 16.
    margin = (0, max(16 - w, 0), 0, max(16 - h, 0))
    lumas = torch.cat((luma(frame), luma(target)))
    lumas = (F.pad(lumas, margin, mode="replicate") * 255).round().byte()
    dis = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    first, second = lumas.cpu().numpy()
    flow = dis.calc(first, second, None)
    return rearrange(torch.from_numpy(flow)[:h, :w], "h w c -> c h w").to(frame)


def require_opencv() -> ModuleType:
    """OpenCV. ValueError that says how to get it, if it is not installed."""
    try:
        import cv2
    except ImportError as error:
        raise ValueError(
            "the warping error and tOF need OpenCV: `pip install opencv-python-headless`, or leave "
            "them out of `metrics`"
        ) from error
    return cv2


def warp(frame: Tensor, flow: Tensor) -> Tensor:
    """Fetch (c h w) from where `flow` (2 h w) points: bilinear, edges repeated."""
    h, w = frame.shape[-2:]
    # grid_sample counts from -1 to 1 between the centres of the outer pixels.
    sides = torch.tensor((max(w - 1, 1), max(h - 1, 1)), dtype=flow.dtype, device=flow.device)
    grid = rearrange(_targets(flow), "c h w -> h w c") * 2 / sides - 1
    return F.grid_sample(frame[None], grid[None], padding_mode="border", align_corners=True)[0]


def visibility(forward: Tensor, backward: Tensor) -> Tensor:
    """Pixels of a frame that the next one shows too: flows (2 h w) to it and back -> (h w) bool.

    There and back again must lead home: |f + b|^2 < 0.01 (|f|^2 + |b|^2) + 0.5 (Sundaram et al.
    2010), b taken where f points to, inside the frame.
    """
    back = warp(backward, forward)
    squares = ((forward + back) ** 2).sum(0), (forward**2).sum(0) + (back**2).sum(0)
    x, y = _targets(forward)
    h, w = forward.shape[-2:]
    inside = (x >= 0) & (x <= w - 1) & (y >= 0) & (y <= h - 1)
    return inside & (squares[0] < 0.01 * squares[1] + 0.5)


def _targets(flow: Tensor) -> Tensor:
    """Where a flow (2 h w) points: pixel coordinates (2 h w), x then y."""
    h, w = flow.shape[-2:]
    y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    return flow + torch.stack((x, y)).to(flow)
