"""What a restored video is measured by, against its ground truth, frame by frame.

A frame is (c h w) in [0, 1], c = 3 or 4: alpha is not compared. A value that does not exist (of a
pair at the first frame, of a picture that is occluded everywhere) is nan, and means leave it out.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
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
            f"SSIM needs frames of at least 11x11, got {_size(restored)}: leave it out of `metrics`"
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


def flicker(restored: Tensor, reference: Tensor) -> float:
    """Change from frame to frame that the reference does not have, in 8-bit levels.

    Mean of |change of restored - change of reference|; neighbouring frames (2 c h w) of each.
    """
    changes = restored[1, :3] - restored[0, :3], reference[1, :3] - reference[0, :3]
    return 255 * F.l1_loss(*changes).item()


def warping_error(restored: Tensor, reference: Tensor) -> float:
    """Flow warping error x 1000 of neighbouring frames (2 c h w), along the reference's motion.

    Lai et al. 2018: the second frame, warped back to the first, is subtracted from it; the mean
    square over colours and non-occluded pixels, with values in [0, 1]. Flow by OpenCV's DIS on the
    reference's luma. Blur lowers it too: read it beside PSNR.
    """
    forward = optical_flow(reference[0], reference[1])
    backward = optical_flow(reference[1], reference[0])
    visible = visibility(forward, backward)
    error = (warp(restored[1, :3], forward) - restored[0, :3]) ** 2
    return 1000 * reduce(error, "c h w -> h w", "mean")[visible].mean().item()


def own_warping_error(restored: Tensor, reference: Tensor) -> float:
    """`warping_error` along the motion of the restored video itself, whatever the reference."""
    return warping_error(restored, restored)


def optical_flow(frame: Tensor, target: Tensor) -> Tensor:
    """Displacements (2 h w), x then y, in pixels, of what `frame` shows to its place in `target`.

    OpenCV's DIS (Kroeger et al. 2016), medium preset, on 8-bit luma, on the CPU.
    """
    try:
        import cv2
    except ImportError as error:
        raise ValueError(
            "the warping error needs OpenCV: `pip install opencv-python-headless`, or leave it out "
            "of `metrics`"
        ) from error
    h, w = frame.shape[-2:]
    # OpenCV (5.0) reads outside the picture, down to a segmentation fault, if a side is below 16.
    margin = (0, max(16 - w, 0), 0, max(16 - h, 0))
    lumas = torch.cat((luma(frame), luma(target)))
    lumas = (F.pad(lumas, margin, mode="replicate") * 255).round().byte()
    dis = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    first, second = lumas.cpu().numpy()
    flow = dis.calc(first, second, None)  # pyright: ignore (its stub does not know "no start")
    return rearrange(torch.from_numpy(flow)[:h, :w], "h w c -> c h w").to(frame)


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


Metric = Callable[[Tensor, Tensor], float]

FRAME_METRICS: dict[str, Metric] = {"psnr": psnr, "psnr_y": psnr_y, "ssim": ssim}
PAIR_METRICS: dict[str, Metric] = {
    "flicker": flicker,
    "warping_error": warping_error,
    "own_warping_error": own_warping_error,
}
DEFAULT_METRICS = ("psnr", "psnr_y", "ssim", "flicker", "warping_error")


@dataclass(frozen=True)
class Comparison:
    """Values by metric and frame; that of a pair of frames stands at the second of them."""

    per_frame: dict[str, list[float]]

    @property
    def means(self) -> dict[str, float]:
        """Mean of every metric over the frames that have a value; nan if none has."""
        return {
            name: torch.tensor(values, dtype=torch.float64).nanmean().item()
            for name, values in self.per_frame.items()
        }


def compare(
    restored: Iterable[Tensor],
    reference: Iterable[Tensor],
    *,
    metrics: Sequence[str] = DEFAULT_METRICS,
) -> Comparison:
    """Measure a restored video against its ground truth in one pass, two frames of each in memory.

    restored, reference: frames (c h w) in [0, 1], equally many, of one size.
    metrics: names out of FRAME_METRICS and PAIR_METRICS.
    """
    if unknown := set(metrics) - {*FRAME_METRICS, *PAIR_METRICS}:
        known = ", ".join((*FRAME_METRICS, *PAIR_METRICS))
        raise ValueError(f"no metric is called {', '.join(sorted(unknown))}: choose from {known}")
    per_frame: dict[str, list[float]] = {name: [] for name in metrics}
    previous: tuple[Tensor, Tensor] | None = None
    index = 0
    for index, (frame, truth) in enumerate(zip_longest(restored, reference), start=1):
        if frame is None or truth is None:
            short, long = ("restored", "reference") if frame is None else ("reference", "restored")
            raise ValueError(
                f"the {short} video has {index - 1} frames, the {long} one more: give both the "
                "same range of frames"
            )
        if frame.shape[-2:] != truth.shape[-2:]:
            raise ValueError(
                f"frame {index - 1} is {_size(frame)} restored and {_size(truth)} in the "
                "reference: crop or resize one of them first"
            )
        frame, truth = frame[:3].float(), truth[:3].float()
        pairs = previous and [torch.stack(p) for p in zip(previous, (frame, truth), strict=True)]
        for name, values in per_frame.items():
            if name in FRAME_METRICS:
                values.append(FRAME_METRICS[name](frame, truth))
            else:
                values.append(PAIR_METRICS[name](*pairs) if pairs else math.nan)
        previous = frame, truth
    if not index:
        raise ValueError("there are no frames to compare: both videos are empty")
    return Comparison(per_frame)


def _size(frame: Tensor) -> str:
    return f"{frame.shape[-1]}x{frame.shape[-2]}"
