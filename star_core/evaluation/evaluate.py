"""Measures restored clips against their ground truth, or alone."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any

from torch import Tensor

from ..metrics import Comparison, Setup, compare
from ..video_io import open_video
from .clip_folders import Pair

# The difference in pixels that is allowed between a restored clip and its ground truth, whose size
# need not be a multiple of the scale.
MARGIN = 16


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The part of each clip that is compared.

    frames: (A, B) selects frames A..B-1 of both clips, from 0; B None selects all from A.
    border: pixels left out at each side.
    size: width and height of the compared middle, None for all. Raises ValueError for a negative
    border.
    """

    frames: tuple[int, int | None] | None = None
    border: int = 0
    size: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.border < 0:
            raise ValueError(f"the border must be 0 or more, got {self.border}")


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The values of one clip.

    name: of the clip. frames, width, height: the compared part, after cropping. notes: how restored
    clip and ground truth were aligned, for the reader of a report.
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
    """Measures a clip; metrics that cannot be computed are listed in `Comparison.missing`.

    Clips are aligned by their first frame and upper left corner. Additional frames of one clip, and
    up to MARGIN additional pixels, are left out with a note. Then `selection` crops both.

    metrics: keys of `metrics.METRICS`. setup: options of metrics, None for the defaults. on_frame:
    called with the frames done and their number. Raises ValueError for sizes that differ more, and
    for files that cannot be read.
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
        notes.append(f"{counts[0]} frames restored, {counts[1]} of the truth: first {frames} used")
    if len(set(sizes)) > 1:
        listed = " and ".join(f"{w}x{h}" for w, h in sizes)
        if any(w - width > MARGIN or h - height > MARGIN for w, h in sizes):
            raise ValueError(
                f"{pair.name}: sizes are {listed}, restored and true: resize or restore to one size"
            )
        notes.append(
            f"{listed}, restored and true: cropped to {width}x{height} from the upper left"
        )
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
    """Measures each pair as `evaluate` does.

    metrics: keys of `metrics.METRICS`. setup, selection: None for the defaults. on_progress: called
    with the pair's name, the frames done and their number. Raises ValueError for clips that do not
    fit or cannot be read.
    """
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
    """Measures frames (f c h w) in [0, 1] that are in memory.

    Metrics that cannot be computed are listed in `Comparison.missing`.

    reference: the ground truth, of the same shape; None without one. metrics: keys of
    `metrics.METRICS`. name: the clip's name in reports. setup: options of metrics, None for the
    defaults. border: pixels left out at each side. on_frame: called with the number of frames done.
    Raises ValueError for videos of different sizes.
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
    """Returns the rows and columns that are compared."""
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
