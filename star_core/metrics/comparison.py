"""Measures a restored video frame by frame, against a ground truth if there is one."""

from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from itertools import zip_longest

import torch
from torch import Tensor

from .catalogue import DEFAULT_METRICS, METRICS, Setup, check_names
from .fidelity import size_of
from .meters import Meter


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The values of metrics, by the metrics' names.

    per_frame: one value for each frame; that of a pair of frames is at the second of them.
    whole: values of metrics that have one for the whole video.
    missing: why a requested metric has no value, one line each.
    """

    per_frame: dict[str, list[float]]
    whole: dict[str, float] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    @property
    def means(self) -> dict[str, float]:
        """The mean of every metric over the frames that have a value (nan if none has)."""
        means = {
            name: torch.tensor(values, dtype=torch.float64).nanmean().item()
            for name, values in self.per_frame.items()
        }
        return means | self.whole

    def values_of(self, name: str) -> list[float]:
        """Returns a metric's value for each frame; ValueError with the reason if there are none."""
        if name in self.per_frame:
            return self.per_frame[name]
        check_names([name])
        reason = self.missing.get(name) or (
            "it has one value for the whole video" if name in self.whole else "it was not measured"
        )
        raise ValueError(f"there is no {METRICS[name].title} of each frame: {reason}")


def compare(
    restored: Iterable[Tensor],
    reference: Iterable[Tensor] | None,
    *,
    metrics: Sequence[str] = DEFAULT_METRICS,
    setup: Setup | None = None,
    skip_missing: bool = False,
    on_frame: Callable[[int], None] | None = None,
) -> Comparison:
    """Measures a restored video in one pass, with a few frames of each video in memory.

    restored, reference: frames (c h w) in [0, 1], of equal number and size; reference is None
    without a ground truth.
    metrics: keys of `METRICS`. setup: None for the defaults.
    skip_missing: whether a metric that lacks weights, a package, a ground truth or large enough
    frames goes to `Comparison.missing` instead of raising ValueError.
    on_frame: called with the number of frames done; an exception from it ends the measurement.
    Raises ValueError also for unknown metrics, no frames, and videos of different sizes.
    """
    check_names(metrics)
    setup = setup or Setup()
    if setup.frames is None and isinstance(restored, Sized):
        setup = replace(setup, frames=len(restored))
    missing: dict[str, str] = {}
    count = 0
    with ExitStack() as stack:
        meters: dict[str, Meter] = {}
        for name in metrics:
            with _optional(name, missing, skip_missing):
                if METRICS[name].needs_reference and reference is None:
                    raise ValueError(f"{METRICS[name].title} needs a ground truth to compare with")
                meters[name] = stack.enter_context(METRICS[name].meter(setup))
        for frame, truth in _pairs(restored, reference):
            for name in meters.keys() - missing.keys():
                with _optional(name, missing, skip_missing):
                    meters[name].add(frame, truth)
            count += 1
            if on_frame:
                on_frame(count)
        if not count:
            raise ValueError("there are no frames to measure: the video is empty")
        results: dict[str, list[float] | float] = {}
        for name, meter in meters.items():
            if name not in missing:
                with _optional(name, missing, skip_missing):
                    results[name] = meter.result()
    return Comparison(
        per_frame={name: r for name, r in results.items() if isinstance(r, list)},
        whole={name: r for name, r in results.items() if not isinstance(r, list)},
        missing=missing,
    )


@contextmanager
def _optional(name: str, missing: dict[str, str], skip: bool) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        if not skip:
            raise
        missing[name] = str(error)


def _pairs(
    restored: Iterable[Tensor], reference: Iterable[Tensor] | None
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yields frames (3 h w) in float32 with their ground truth; ValueError if they do not match."""
    if reference is None:
        yield from ((frame[:3].float(), None) for frame in restored)
        return
    for index, (frame, truth) in enumerate(zip_longest(restored, reference)):
        if frame is None or truth is None:
            short, long = ("restored", "reference") if frame is None else ("reference", "restored")
            raise ValueError(
                f"the {short} video has {index} frames, the {long} one more: use the same range "
                "of frames of both"
            )
        if frame.shape[-2:] != truth.shape[-2:]:
            raise ValueError(
                f"frame {index} is {size_of(frame)} restored and {size_of(truth)} in the "
                "reference: crop or resize one of them first"
            )
        yield frame[:3].float(), truth[:3].float()
