"""Restored clips measured against their ground truth: files and folders in, tables out."""

import csv
import importlib.util
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice, zip_longest
from pathlib import Path
from statistics import fmean
from typing import Any, TextIO

import torch
from torch import Tensor

from .clip_folders import Pair
from .curves import COLOURS, curves, write_png
from .metrics import METRICS, Comparison, Setup, compare
from .video_io import open_video

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
    setup: Setup | None = None,
    border: int = 0,
    on_frame: Callable[[int], None] | None = None,
) -> Evaluation:
    """Measure frames (f c h w) in [0, 1] that are in memory; as many true ones, of the same size.

    border, and what metrics lack: as in `evaluate`.
    """
    name, (frames, _, height, width) = "the video", restored.shape
    rows, columns = _region(name, width, height, Selection(border=border))
    if reference is not None and reference.shape[-2:] != restored.shape[-2:]:
        true_height, true_width = reference.shape[-2:]
        raise ValueError(
            f"the frames are {width}x{height}, the reference {true_width}x{true_height}: resize "
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


def overall(evaluations: Sequence[Evaluation]) -> dict[str, float]:
    """Of every metric the mean over clips of each clip's mean; clips without a value left out."""
    means = [evaluation.comparison.means for evaluation in evaluations]
    names = list(dict.fromkeys(name for clip in means for name in clip))
    values = {
        n: [clip[n] for clip in means if not math.isnan(clip.get(n, math.nan))] for n in names
    }
    return {name: fmean(found) if found else math.nan for name, found in values.items()}


def missing(evaluations: Sequence[Evaluation]) -> dict[str, str]:
    """Why metrics lack a value, each once, with the number of clips if it is not all of them."""
    reasons: dict[str, str] = {}
    for name in METRICS:
        found = [e.comparison.missing[name] for e in evaluations if name in e.comparison.missing]
        if found:
            part = f" ({len(found)} of {len(evaluations)} clips)"
            reasons[name] = found[0] + (part if len(found) < len(evaluations) else "")
    return reasons


def table(evaluations: Sequence[Evaluation]) -> str:
    """For a terminal: a line a clip, where there are several, then a line a metric."""
    means = overall(evaluations)
    lines = []
    if len(evaluations) > 1:
        wide = max(len(evaluation.name) for evaluation in evaluations)
        lines.append(" ".join((f"{'':{wide}}", *(f"{name:>10}" for name in means))))
        for evaluation in evaluations:
            values = evaluation.comparison.means
            cells = (
                _number(values.get(name, math.nan)).rjust(max(10, len(name))) for name in means
            )
            lines.append(" ".join((f"{evaluation.name:{wide}}", *cells)))
        lines.append("")
    wide = max((len(METRICS[name].title) for name in means), default=0)
    lines += [
        f"{METRICS[name].title:{wide}} {_number(value):>10}  {METRICS[name].better} is better"
        for name, value in means.items()
    ]
    lines += [f"{METRICS[name].title}: {why}" for name, why in missing(evaluations).items()]
    lines += [f"{e.name}: {note}" for e in evaluations for note in e.notes]
    return "\n".join(lines)


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.4f}" if abs(value) < 10 else f"{value:.3f}"


def report(evaluations: Sequence[Evaluation]) -> dict[str, Any]:
    """JSON: values as numbers, null where there is none, "inf" for equal clips' PSNR."""
    return {
        "means": {name: _json(value) for name, value in overall(evaluations).items()},
        "missing": missing(evaluations),
        "clips": [
            {
                "name": e.name,
                "frames": e.frames,
                "size": [e.width, e.height],
                "means": {name: _json(value) for name, value in e.comparison.means.items()},
                "per_frame": {
                    name: [_json(value) for value in values]
                    for name, values in e.comparison.per_frame.items()
                },
                "notes": list(e.notes),
            }
            for e in evaluations
        ],
    }


def _json(value: float) -> float | str | None:
    return None if math.isnan(value) else value if math.isfinite(value) else str(value)


def write_report(evaluations: Sequence[Evaluation], folder: Path) -> None:
    """clips.csv (a line a clip), frames.csv (a line a frame), report.json; replaces older ones.

    And curves.png, where Pillow is installed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = list(overall(evaluations))
    clips, frames, whole = (folder / n for n in ("clips.csv", "frames.csv", "report.json"))
    with clips.open("w", newline="", encoding="utf-8") as file:
        _write_clips(file, evaluations, names)
    with frames.open("w", newline="", encoding="utf-8") as file:
        _write_frames(file, evaluations, names)
    whole.write_text(json.dumps(report(evaluations), indent=1) + "\n", encoding="utf-8")
    if importlib.util.find_spec("PIL"):
        write_png(curves_of(evaluations), folder / "curves.png")


def curves_of(evaluations: Sequence[Evaluation]) -> Tensor:
    """A picture (3 h w) with the curves of every metric below each other.

    A curve for each clip; where there are more than can be told apart, one for their mean.
    """
    plots = []
    for name in overall(evaluations):
        values = {
            e.name: e.comparison.per_frame[name]
            for e in evaluations
            if name in e.comparison.per_frame
        }
        if len(values) > len(COLOURS):
            frames = zip_longest(*values.values(), fillvalue=math.nan)
            means = [[v for v in frame if not math.isnan(v)] for frame in frames]
            values = {f"mean of {len(values)} clips": [fmean(m) if m else math.nan for m in means]}
        if values:
            plots.append(curves(values, title=METRICS[name].title))
    return torch.cat(plots, dim=1)


def _write_clips(file: TextIO, evaluations: Sequence[Evaluation], names: Sequence[str]) -> None:
    writer = csv.writer(file)
    writer.writerow(["clip", "frames", "width", "height", *names])
    for e in evaluations:
        values = (_cell(e.comparison.means.get(name, math.nan)) for name in names)
        writer.writerow([e.name, e.frames, e.width, e.height, *values])
    means = overall(evaluations)
    writer.writerow(["mean", "", "", "", *(_cell(means[name]) for name in names)])


def _write_frames(file: TextIO, evaluations: Sequence[Evaluation], names: Sequence[str]) -> None:
    names = [n for n in names if any(n in e.comparison.per_frame for e in evaluations)]
    writer = csv.writer(file)
    writer.writerow(["clip", "frame", *names])
    for e in evaluations:
        columns = [e.comparison.per_frame.get(name, [math.nan] * e.frames) for name in names]
        for frame in range(e.frames):
            writer.writerow([e.name, frame, *(_cell(column[frame]) for column in columns)])


def _cell(value: float) -> float | str:
    return "" if math.isnan(value) else value
