"""All metrics by their names: title, which direction is better, and how to create the meter."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from .dists import load_dists
from .dover import DoverMeter, load_dover
from .fidelity import ms_ssim, psnr, psnr_y, ssim
from .ilniqe import load_ilniqe
from .lpips import load_lpips
from .meters import FrameMeter, Measure, Meter, Pair, PairMeter
from .motion import (
    Flow,
    flicker,
    optical_flow,
    own_warping_error,
    require_opencv,
    tof,
    warping_error,
)
from .niqe import load_niqe
from .raft import load_raft
from .vmaf import VMAF


@dataclass(frozen=True, kw_only=True)
class Setup:
    """Options of metrics.

    weights: the folder of their weights, None for `weights.default_folder()`.
    device: where networks compute.
    flow: the method that estimates motion for the warping errors and tOF, OpenCV's DIS or RAFT.
    frames: the number of frames, None if it is unknown beforehand; DOVER needs it.
    """

    weights: Path | str | None = None
    device: torch.device | str = "cpu"
    flow: Literal["dis", "raft"] = "dis"
    frames: int | None = None

    def __post_init__(self) -> None:
        if self.flow not in ("dis", "raft"):
            raise ValueError(f"no flow is called {self.flow}: choose dis or raft")

    @cached_property
    def motion(self) -> Flow:
        """The method `flow`, which returns the last four flows again for the same tensors.

        So metrics share those of a pair, forward and back, restored and true. Raises ValueError if
        weights or OpenCV are missing.
        """
        if self.flow == "raft":
            return lru_cache(4)(load_raft(folder=self.weights, device=self.device))
        require_opencv()
        return lru_cache(4)(optical_flow)


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A metric.

    title: the name in tables, with the unit. better: which values are better. meter: creates the
    meter; raises ValueError, one line, if weights or a package are missing. needs_reference:
    whether it compares with a ground truth.
    """

    title: str
    better: Literal["higher", "lower"]
    meter: Callable[[Setup], Meter]
    needs_reference: bool = True


def _frames(measure: Measure) -> Callable[[Setup], Meter]:
    return lambda setup: FrameMeter(measure)


def _neighbours(measure: Callable[[Pair, Pair], float]) -> Callable[[Setup], Meter]:
    return lambda setup: PairMeter(measure)


def _by_flow(measure: Callable[[Pair, Pair, Flow], float]) -> Callable[[Setup], Meter]:
    def meter(setup: Setup) -> Meter:
        flow = setup.motion
        return PairMeter(lambda restored, reference: measure(restored, reference, flow))

    return meter


def _by_network(load: Callable[..., nn.Module]) -> Callable[[Setup], Meter]:
    def meter(setup: Setup) -> Meter:
        network = load(folder=setup.weights, device=setup.device)

        @torch.inference_mode()
        def measure(restored: Tensor, reference: Tensor) -> float:
            pictures = (frame[None].to(setup.device) for frame in (restored, reference))
            return network(*pictures).item()

        return FrameMeter(measure)

    return meter


def _no_reference(load: Callable[..., Callable[[Tensor], float]]) -> Callable[[Setup], Meter]:
    def meter(setup: Setup) -> Meter:
        measure = load(folder=setup.weights)
        return FrameMeter(lambda restored, reference: measure(restored))

    return meter


def _dover(setup: Setup) -> Meter:
    network = load_dover(folder=setup.weights, device=setup.device)
    if setup.frames is None:
        raise ValueError("DOVER must know the number of frames beforehand: set `Setup.frames`")
    return DoverMeter(network, setup.frames, device=setup.device)


METRICS: dict[str, Metric] = {
    "psnr": Metric(title="PSNR, dB", better="higher", meter=_frames(psnr)),
    "psnr_y": Metric(title="PSNR of luma, dB", better="higher", meter=_frames(psnr_y)),
    "ssim": Metric(title="SSIM", better="higher", meter=_frames(ssim)),
    "ms_ssim": Metric(title="MS-SSIM", better="higher", meter=_frames(ms_ssim)),
    "lpips": Metric(
        title="LPIPS (AlexNet)", better="lower", meter=_by_network(partial(load_lpips, "alex"))
    ),
    "lpips_vgg": Metric(
        title="LPIPS (VGG16)", better="lower", meter=_by_network(partial(load_lpips, "vgg"))
    ),
    "dists": Metric(title="DISTS", better="lower", meter=_by_network(load_dists)),
    "vmaf": Metric(title="VMAF", better="higher", meter=lambda setup: VMAF()),
    "niqe": Metric(
        title="NIQE", better="lower", meter=_no_reference(load_niqe), needs_reference=False
    ),
    "ilniqe": Metric(
        title="ILNIQE", better="lower", meter=_no_reference(load_ilniqe), needs_reference=False
    ),
    "dover": Metric(title="DOVER", better="higher", meter=_dover, needs_reference=False),
    "warping_error": Metric(title="E*warp, x 1000", better="lower", meter=_by_flow(warping_error)),
    "own_warping_error": Metric(
        title="E*warp along its own motion, x 1000",
        better="lower",
        meter=_by_flow(own_warping_error),
        needs_reference=False,
    ),
    "flicker": Metric(title="flicker, 8-bit levels", better="lower", meter=_neighbours(flicker)),
    "tof": Metric(title="tOF, pixels", better="lower", meter=_by_flow(tof)),
}
DEFAULT_METRICS = ("psnr", "psnr_y", "ssim", "flicker", "warping_error")


def check_names(names: Iterable[str]) -> None:
    """Raises ValueError, with a list of all metrics, unless all names are in `METRICS`."""
    if unknown := set(names) - METRICS.keys():
        raise ValueError(
            f"no metric is called {', '.join(sorted(unknown))}: choose from {', '.join(METRICS)}"
        )
