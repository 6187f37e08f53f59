"""Reports evaluations as a table for a terminal, as CSV and JSON, and as curves."""

import csv
import importlib.util
import json
import math
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from statistics import fmean
from typing import Any, TextIO

import torch
from torch import Tensor

from ..drawing import COLOURS, write_png
from ..metrics import METRICS
from .curves import curves
from .evaluate import Evaluation


def overall(evaluations: Sequence[Evaluation]) -> dict[str, float]:
    """Returns the mean of every metric over the clips' means; clips without a value are ignored."""
    means = [evaluation.comparison.means for evaluation in evaluations]
    names = list(dict.fromkeys(name for clip in means for name in clip))
    values = {
        n: [clip[n] for clip in means if not math.isnan(clip.get(n, math.nan))] for n in names
    }
    return {name: fmean(numbers) if numbers else math.nan for name, numbers in values.items()}


def missing(evaluations: Sequence[Evaluation]) -> dict[str, str]:
    """Returns why metrics have no value, with the number of clips if it is not all of them."""
    reasons: dict[str, str] = {}
    for name in METRICS:
        of_clips = [e.comparison.missing[name] for e in evaluations if name in e.comparison.missing]
        if of_clips:
            part = f" ({len(of_clips)} of {len(evaluations)} clips)"
            reasons[name] = of_clips[0] + (part if len(of_clips) < len(evaluations) else "")
    return reasons


def table(evaluations: Sequence[Evaluation]) -> str:
    """Returns a table for a terminal: a line for each of several clips, then for each metric."""
    means = overall(evaluations)
    lines = []
    if len(evaluations) > 1:
        width = max(len(evaluation.name) for evaluation in evaluations)
        lines.append(" ".join((f"{'':{width}}", *(f"{name:>10}" for name in means))))
        for evaluation in evaluations:
            values = evaluation.comparison.means
            cells = (
                _number(values.get(name, math.nan)).rjust(max(10, len(name))) for name in means
            )
            lines.append(" ".join((f"{evaluation.name:{width}}", *cells)))
        lines.append("")
    width = max((len(METRICS[name].title) for name in means), default=0)
    lines += [
        f"{METRICS[name].title:{width}} {_number(value):>10}  {METRICS[name].better} is better"
        for name, value in means.items()
    ]
    lines += [f"{METRICS[name].title}: {why}" for name, why in missing(evaluations).items()]
    lines += [f"{e.name}: {note}" for e in evaluations for note in e.notes]
    return "\n".join(lines)


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.4f}" if abs(value) < 10 else f"{value:.3f}"


def report(evaluations: Sequence[Evaluation]) -> dict[str, Any]:
    """Returns the report as JSON: null for a value that does not exist, "inf" for infinity."""
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


def write_report(evaluations: Sequence[Evaluation], folder: Path) -> str | None:
    """Writes clips.csv, frames.csv, report.json and curves.png into a folder; replaces older ones.

    The tables have a line for each clip or frame. Without Pillow there are no curves, and the
    result is a line that says so; otherwise it is None.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = list(overall(evaluations))
    clips, frames, summary = (folder / n for n in ("clips.csv", "frames.csv", "report.json"))
    with clips.open("w", newline="", encoding="utf-8") as file:
        _write_clips(file, evaluations, names)
    with frames.open("w", newline="", encoding="utf-8") as file:
        _write_frames(file, evaluations, names)
    summary.write_text(json.dumps(report(evaluations), indent=1) + "\n", encoding="utf-8")
    if not importlib.util.find_spec("PIL"):
        return "curves.png needs Pillow: `pip install pillow`"
    if any(e.comparison.per_frame for e in evaluations):
        write_png(curves_of(evaluations), folder / "curves.png")
    return None


def curves_of(evaluations: Sequence[Evaluation], metric: str | None = None) -> Tensor:
    """Returns a picture (3 h w) in [0, 1] with curves of one metric, or of all below each other.

    Each clip has a curve; too many clips to distinguish have one curve of their mean. If no metric
    has values for each frame, the axes are empty. Raises ValueError, with the reason, if `metric`
    has no such values, and without Pillow.
    """
    if metric is not None:
        for e in evaluations:
            e.comparison.values_of(metric)
    plots = []
    for name in [metric] if metric is not None else overall(evaluations):
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
    return torch.cat(plots or [curves({"": ()}, title="no metric has a value per frame")], dim=1)


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
