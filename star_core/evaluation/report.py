"""What was measured, as tables: terminal, CSV, JSON, curves."""

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


def write_report(evaluations: Sequence[Evaluation], folder: Path) -> str | None:
    """clips.csv (a line a clip), frames.csv (a line a frame), report.json; replaces older ones.

    And curves.png; without Pillow that is left out, and returned is a line that says so.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = list(overall(evaluations))
    clips, frames, whole = (folder / n for n in ("clips.csv", "frames.csv", "report.json"))
    with clips.open("w", newline="", encoding="utf-8") as file:
        _write_clips(file, evaluations, names)
    with frames.open("w", newline="", encoding="utf-8") as file:
        _write_frames(file, evaluations, names)
    whole.write_text(json.dumps(report(evaluations), indent=1) + "\n", encoding="utf-8")
    if not importlib.util.find_spec("PIL"):
        return "curves.png needs Pillow: `pip install pillow`"
    if any(e.comparison.per_frame for e in evaluations):
        write_png(curves_of(evaluations), folder / "curves.png")
    return None


def curves_of(evaluations: Sequence[Evaluation], metric: str | None = None) -> Tensor:
    """A picture (3 h w) with the curves of every metric below each other, or of one alone.

    A curve for each clip; where there are more than can be told apart, one for their mean. Axes
    without a curve if no metric has a value for each frame. ValueError, which says why, if `metric`
    has none.
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
