"""Restored clips measured against their ground truth, or alone."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any

from torch import Tensor

from ..metrics import Comparison, Setup, compare
from ..video_io import open_video
from .clip_folders import Pair

# What a restored clip may lack of its ground truth: sizes that are no multiple of the scale.
MARGIN = 16


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What of each clip is compared.

    frames: (A, B) of both clips, from 0; B None takes all from A.
    border: pixels left out at each side.
    size: width, height of the middle that is compared, None for all.
    """

    frames: tuple[int, int | None] | None = None
    border: int = 0
    size: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.border < 0:
            raise ValueError(f"the border must be 0 or more, got {self.border}")


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One clip's values, and what was compared: frames, width, height after cropping.

    notes: what a reader must know of how restored clip and ground truth were made to fit.
    """

    name: str
    frames: int
    width: int
    height: int
    comparison: Comparison
    notes: tuple[str, ...] = ()


def evaluate(
    pair: Pair,
    metrics: Sequence[str],
    *,
    setup: Setup | None = None,
    selection: Selection | None = None,
    on_frame: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Measure a clip; metrics that lack something are left out and say so.

    Clips are aligned by their first frame and upper left corner; what one has more, by up to
    MARGIN pixels or by any number of frames, is left out with a note. Then `selection` crops.
    on_frame: called with the frames that are done and their number. ValueError for sizes that
    differ more.
    """
    selection, setup = selection or Selection(), setup or Setup()
    restored = open_video(pair.restored, frames=selection.frames)
    reference = pair.reference and open_video(pair.reference, frames=selection.frames)
    sources = [restored, reference] if reference else [restored]
    counts = [len(source) for source in sources]
    sizes = [(source.info.width, source.info.height) for source in sources]
    frames, width, height = min(counts), *map(min, zip(*sizes, strict=True))
    notes = [] if setup.flow == "dis" else [f"motion by {setup.flow.upper()}"]
    if max(counts) > frames:
        notes.append(f"{counts[0]} frames restored, {counts[1]} of the truth: first {frames} taken")
    if len(set(sizes)) > 1:
        told = " and ".join(f"{w}x{h}" for w, h in sizes)
        if any(w - width > MARGIN or h - height > MARGIN for w, h in sizes):
            raise ValueError(
                f"{pair.name}: sizes are {told}, restored and true: resize or restore to one size"
            )
        notes.append(f"{told}, restored and true: cropped to {width}x{height} from the upper left")
    region = _region(pair.name, width, height, selection)

    def cropped(source: Any) -> Iterator[Tensor]:
        rows, columns = region
        for frame in islice(source, frames):
            yield frame[:, rows, columns]

    comparison = compare(
        cropped(restored),
        reference and cropped(reference),
        metrics=metrics,
        setup=replace(setup, frames=frames),
        skip_missing=True,
        on_frame=on_frame and (lambda done: on_frame(done, frames)),
    )
    rows, columns = region
    return Evaluation(
        name=pair.name,
        frames=frames,
        width=columns.stop - columns.start,
        height=rows.stop - rows.start,
        comparison=comparison,
        notes=tuple(notes),
    )


def evaluate_all(
    pairs: Sequence[Pair],
    metrics: Sequence[str],
    *,
    setup: Setup | None = None,
    selection: Selection | None = None,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> list[Evaluation]:
    """`evaluate` for each pair. on_progress: called with its name, frames done and their number."""
    return [
        evaluate(
            pair,
            metrics,
            setup=setup,
            selection=selection,
            on_frame=on_progress and partial(on_progress, pair.name),
        )
        for pair in pairs
    ]


def evaluate_frames(
    restored: Tensor,
    reference: Tensor | None,
    metrics: Sequence[str],
    *,
    name: str = "the video",
    setup: Setup | None = None,
    border: int = 0,
    on_frame: Callable[[int], None] | None = None,
) -> Evaluation:
    """Measure frames (f c h w) in [0, 1] that are in memory; as many true ones, of the same size.

    name: what reports call them. border: pixels left out at each side. Metrics that lack something
    are left out and say so.
    """
    frames, _, height, width = restored.shape
    rows, columns = _region(name, width, height, Selection(border=border))
    if reference is not None and reference.shape[-2:] != restored.shape[-2:]:
        true_height, true_width = reference.shape[-2:]
        raise ValueError(
            f"{name} is {width}x{height}, the reference {true_width}x{true_height}: resize "
            "or crop one of them first"
        )
    comparison = compare(
        restored[..., rows, columns],
        None if reference is None else reference[..., rows, columns],
        metrics=metrics,
        setup=setup,
        skip_missing=True,
        on_frame=on_frame,
    )
    return Evaluation(
        name=name,
        frames=frames,
        width=columns.stop - columns.start,
        height=rows.stop - rows.start,
        comparison=comparison,
    )


def _region(name: str, width: int, height: int, selection: Selection) -> tuple[slice, slice]:
    """Rows and columns that are compared."""
    left = top = selection.border
    width, height = width - 2 * left, height - 2 * top
    if selection.size:
        left += (width - selection.size[0]) // 2
        top += (height - selection.size[1]) // 2
        if left < selection.border or top < selection.border:
            raise ValueError(
                f"{name} has {width}x{height} to compare, not "
                f"{selection.size[0]}x{selection.size[1]}"
            )
        width, height = selection.size
    if min(width, height) < 1:
        raise ValueError(f"{name}: nothing is left without a border of {selection.border} pixels")
    return slice(top, top + height), slice(left, left + width)
