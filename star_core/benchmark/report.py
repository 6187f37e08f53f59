"""Writes the results of a benchmark as tables and pictures."""

import csv
import math
import platform
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import torch

from ..degradation.pipeline import Blur, Codec, Jpeg, Noise, Resize
from ..drawing import write_png
from ..evaluation.curves import curves
from ..metrics import METRICS
from ..plots import Point, scatter, write_figure
from .cases import CLIPS, RECIPES, SEED, scale_of
from .methods import METHODS
from .run import Result

HEADER = (
    "# Benchmark\n\n"
    "Made by `python -m star_core benchmark`, which fetches clips and networks by package version "
    "and hash, degrades the clips, restores them by each method, and measures quality, time and "
    "memory in the same run. An interrupted run resumes; a method or metric that lacks a package "
    "or file is left out with a message. Compare the clips with\n\n"
    "```\npython -m star_core compare OUT/heavy/bicubic OUT/heavy/x4plus OUT/heavy/tiny "
    "--truth OUT/truth\n```\n"
)


def write_report(
    results: Sequence[Result], data: Path, report: Path, *, draw: bool = True
) -> list[Path]:
    """Writes cells.csv and frames.csv to `data`, benchmark.md and its pictures to `report`.

    draw: whether to draw pictures, which needs matplotlib. Returns the paths of all files.
    """
    for folder in (data, report):
        folder.mkdir(parents=True, exist_ok=True)
    metrics = list(dict.fromkeys(name for result in results for name in result.means))
    files = [_cells(results, metrics, data / "cells.csv"), _frames(results, data / "frames.csv")]
    pictures = []
    if draw:
        pictures = [*_scatters(results, metrics, report), *_curves(results, metrics, report)]
    text = report / "benchmark.md"
    text.write_text(_text(results, metrics, pictures), encoding="utf-8")
    return [text, *pictures, *files]


def _cells(results: Sequence[Result], metrics: Sequence[str], path: Path) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(
            ["clip", "recipe", "method", "version", "threads", "frames", "cpu_seconds_per_frame"]
            + ["seconds_per_frame", "peak_bytes", *metrics]
        )
        for r in results:
            table.writerow(
                [r.clip, r.recipe, r.method, r.version, r.threads, r.frames]
                + [f"{r.seconds_per_frame:.4g}", f"{r.cost.seconds / r.frames:.4g}", r.cost.peak]
                + [r.means.get(name, "") for name in metrics]
            )
    return path


def _frames(results: Sequence[Result], path: Path) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["clip", "recipe", "method", "metric", "frame", "value"])
        for r in results:
            for name, values in r.per_frame.items():
                for frame, value in enumerate(values):
                    if not math.isnan(value):
                        table.writerow([r.clip, r.recipe, r.method, name, frame, value])
    return path


def _by_method(results: Sequence[Result], recipe: str) -> dict[str, list[Result]]:
    by_method: dict[str, list[Result]] = {}
    for result in results:
        if result.recipe == recipe:
            by_method.setdefault(result.method, []).append(result)
    return by_method


def _mean(results: Sequence[Result], metric: str) -> float:
    """Returns the mean over clips; nan if one has no value, so that all means are comparable."""
    return fmean(result.means.get(metric, math.nan) for result in results)


def _recipes(results: Sequence[Result]) -> list[str]:
    return list(dict.fromkeys(result.recipe for result in results))


def _scatters(results: Sequence[Result], metrics: Sequence[str], folder: Path) -> list[Path]:
    """Draws quality over time for two metrics."""
    paths = []
    for metric in [name for name in ("psnr", "lpips") if name in metrics]:
        series = {
            recipe: [
                Point(
                    name=method,
                    x=fmean(cell.seconds_per_frame for cell in cells),
                    y=_mean(cells, metric),
                )
                for method, cells in _by_method(results, recipe).items()
            ]
            for recipe in _recipes(results)
            if scale_of(recipe) == scale_of(results[0].recipe)
        }
        title = f"{METRICS[metric].title} ({METRICS[metric].better} is better)"
        paths.append(folder / f"benchmark_{metric}.png")
        figure = scatter(series, x_title="processor seconds a frame", y_title=title)
        write_figure(figure, paths[-1])
    return paths


def _curves(results: Sequence[Result], metrics: Sequence[str], folder: Path) -> list[Path]:
    """Draws values over frames of the first clip under the hardest recipe that was run."""
    recipe = "heavy" if "heavy" in _recipes(results) else results[0].recipe
    cells = [r for r in results if (r.clip, r.recipe) == (results[0].clip, recipe)]
    paths = []
    for metric in [name for name in ("psnr", "flicker") if name in metrics]:
        paths.append(folder / f"benchmark_{metric}_by_frame.png")
        title = f"{METRICS[metric].title}, {results[0].clip}, {recipe}"
        values = {cell.method: cell.per_frame[metric] for cell in cells}
        write_png(curves(values, title=title), paths[-1])
    return paths


def _text(results: Sequence[Result], metrics: Sequence[str], pictures: Sequence[Path]) -> str:
    parts = [HEADER, _conditions(results)]
    for recipe in _recipes(results):
        parts.append(f"## {recipe.capitalize()}\n\n{_degradation(recipe)}\n")
        parts.append(_table(_by_method(results, recipe), metrics))
    parts += ["## Pictures\n"] if pictures else []
    parts += [f"![{path.stem.replace('_', ' ')}]({path.name})\n" for path in pictures]
    return "\n".join(parts)


def _degradation(recipe: str) -> str:
    """Describes a recipe in words; only the noise of these recipes is random."""
    words = []
    for stage in RECIPES[recipe].stages:
        if isinstance(stage, Blur):
            words.append(f"Gaussian blur {stage.sigma[0]:g}")
        elif isinstance(stage, Resize):
            words.append(f"{'/'.join(stage.modes)} reduction by {1 / stage.scale:g}")
        elif isinstance(stage, Noise):
            words.append(f"noise {255 * stage.sigma[0]:g}/255")
        elif isinstance(stage, Jpeg):
            words.append(f"JPEG {stage.quality[0]:g}")
        elif isinstance(stage, Codec) and stage.quality:
            words.append(f"{stage.codec} at CRF {stage.quality[0]:g}")
    text = ", ".join(words)
    text += f"; enlarged by {scale_of(recipe)}"
    return f"{text[0].upper()}{text[1:]}; seed {SEED}."


def _table(cells: dict[str, list[Result]], metrics: Sequence[str]) -> str:
    arrows = {"higher": "↑", "lower": "↓"}
    titles = [f"{METRICS[name].title} {arrows[METRICS[name].better]}" for name in metrics]
    head = ["method", *titles, "processor s a frame", "peak memory, MiB"]
    rows = [head, ["---"] * len(head)]
    for method, results in cells.items():
        peaks = [result.cost.peak for result in results if result.cost.peak is not None]
        rows.append(
            [METHODS[method].title]
            + [_number(_mean(results, name)) for name in metrics]
            + [_number(fmean(result.seconds_per_frame for result in results))]
            + [f"{max(peaks) / 2**20:.0f}" if peaks else "not known"]
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def _number(value: float) -> str:
    if math.isnan(value):
        return "-"
    return f"{value:.2f}" if abs(value) >= 10 else f"{value:.3g}"


def _conditions(results: Sequence[Result]) -> str:
    """Describes clips, methods and machine."""
    lines = []
    for name in dict.fromkeys(result.clip for result in results):
        clip, frames = CLIPS[name], CLIPS[name].frames
        width, height, x, y = clip.crop
        trained_on = "; tiny was trained on this film" if clip.trained_on else ""
        lines.append(
            f"* {name}: {clip.file} of {clip.carrier.requirement}, frames {frames[0]} to "
            f"{frames[1] - 1}, {width}x{height} at ({x}, {y}){trained_on}"
        )
    lines += [
        f"* {METHODS[method].title}: {version}"
        for method, version in dict.fromkeys((r.method, r.version) for r in results)
    ]
    lines.append(
        f"* {platform.system()} {platform.machine()}, {_processor()}, {results[0].threads} "
        f"thread(s), Python {platform.python_version()}, torch {torch.__version__}, float32"
    )
    clock = sum(r.cost.seconds for r in results) / sum(r.cost.cpu_seconds for r in results)
    lines.append(f"* elapsed time was {clock:.2g} times the processor time")
    return (
        "Means over the clips. Time is processor time of the process that restores, from the "
        "loaded method to the written file: other work on the machine affects it less than elapsed "
        "time. ffmpeg, which reads and writes the files, is not counted. Memory is the peak of the "
        "process, Python and libraries included.\n\n" + "\n".join(lines) + "\n"
    )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration, IndexError):
        return platform.processor() or "unknown processor"
