"""A restored video against its ground truth, frame by frame."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import torch
from torch import Tensor

from .fidelity import psnr, psnr_y, size_of, ssim
from .motion import flicker, own_warping_error, warping_error

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
                f"frame {index - 1} is {size_of(frame)} restored and {size_of(truth)} in the "
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
