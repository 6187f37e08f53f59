"""Every metric by its name: what it is called in a table, which way is better, how it is made."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from .dists import load_dists
from .dover import DoverMeter, load_dover
from .fidelity import ms_ssim, psnr, psnr_y, ssim
from .ilniqe import load_ilniqe
from .lpips import load_lpips
from .meters import Measure, Meter, OfFrames, OfNeighbours
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
    """What metrics need to know beside the frames.

    weights: the folder of their weights, None for `weights.default_folder()`.
    device: where networks compute.
    flow: what finds motion for the warping errors and tOF, OpenCV's DIS or RAFT.
    frames: how many there will be, None if that is not known beforehand; DOVER must know.
    """

    weights: Path | str | None = None
    device: torch.device | str = "cpu"
    flow: Literal["dis", "raft"] = "dis"
    frames: int | None = None

    def __post_init__(self) -> None:
        if self.flow not in ("dis", "raft"):
            raise ValueError(f"no flow is called {self.flow}: choose dis or raft")


@dataclass(frozen=True, kw_only=True)
class Metric:
    """meter: raises ValueError, one line, if something that it needs is missing."""

    title: str
    better: Literal["higher", "lower"]
    meter: Callable[[Setup], Meter]
    needs_reference: bool = True


def _frames(measure: Measure) -> Callable[[Setup], Meter]:
    return lambda setup: OfFrames(measure)


def _neighbours(measure: Measure) -> Callable[[Setup], Meter]:
    return lambda setup: OfNeighbours(measure)


def _by_flow(measure: Callable[[Tensor, Tensor, Flow], float]) -> Callable[[Setup], Meter]:
    def meter(setup: Setup) -> Meter:
        if setup.flow == "raft":
            flow: Flow = load_raft(folder=setup.weights, device=setup.device)
        else:
            require_opencv()
            flow = optical_flow
        return OfNeighbours(lambda restored, reference: measure(restored, reference, flow))

    return meter


def _by_network(load: Callable[..., nn.Module]) -> Callable[[Setup], Meter]:
    def meter(setup: Setup) -> Meter:
        network = load(folder=setup.weights, device=setup.device)

        @torch.inference_mode()
        def measure(restored: Tensor, reference: Tensor) -> float:
            pictures = (frame[None].to(setup.device) for frame in (restored, reference))
            return network(*pictures).item()

        return OfFrames(measure)

    return meter


def _alone(load: Callable[..., Callable[[Tensor], float]]) -> Callable[[Setup], Meter]:
    def meter(setup: Setup) -> Meter:
        measure = load(folder=setup.weights)
        return OfFrames(lambda restored, reference: measure(restored))

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
    "niqe": Metric(title="NIQE", better="lower", meter=_alone(load_niqe), needs_reference=False),
    "ilniqe": Metric(
        title="ILNIQE", better="lower", meter=_alone(load_ilniqe), needs_reference=False
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


def known(names: Iterable[str]) -> None:
    """ValueError that names the metrics that there are, unless all of `names` are among them."""
    if unknown := set(names) - METRICS.keys():
        raise ValueError(
            f"no metric is called {', '.join(sorted(unknown))}: choose from {', '.join(METRICS)}"
        )
