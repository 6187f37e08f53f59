"""Restores, times and measures every combination (cell) of clip, recipe and method.

Each cell runs in a process of its own, because a process's peak of memory never falls. Results are
stored in the folder, so that an interrupted run resumes and only what has changed is repeated.
"""

import json
import math
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from .. import metrics as measures
from ..allocator import keep_freed_memory
from ..bench.speed import resident
from ..progress import Counter, Progress
from ..video_io import open_video
from .cases import CLIPS, METRICS, RECIPES, degraded, scale_of, truth_of
from .methods import METHODS


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Time and memory of restoring a clip.

    seconds, cpu_seconds: for the whole clip, from the loaded method to the written file. peak: most
    resident bytes of the process, Python and libraries included; None if the system has no /proc.
    """

    seconds: float
    cpu_seconds: float
    peak: int | None


@dataclass(frozen=True, kw_only=True)
class Result:
    """Result of one cell. version: of the method. per_frame, means: values by metric, maybe nan."""

    clip: str
    recipe: str
    method: str
    version: str
    threads: int
    frames: int
    cost: Cost
    per_frame: dict[str, list[float]]
    means: dict[str, float]

    @property
    def seconds_per_frame(self) -> float:
        """Processor time per frame, which other work on the machine affects least."""
        return self.cost.cpu_seconds / self.frames


def run(
    folder: Path,
    *,
    clips: Sequence[str],
    methods: Sequence[str],
    recipes: Sequence[str] = tuple(RECIPES),
    metrics: Sequence[str] = METRICS,
    threads: int = 1,
    on_progress: Progress | None = None,
    on_missing: Callable[[str], None] | None = None,
) -> list[Result]:
    """Returns the results of all cells, and computes those that are not stored in `folder`.

    clips, methods, recipes, metrics: names. threads: of the processor, for each method.
    on_progress: called with the stage "restore" and counts of cells; an exception from it ends the
    run. on_missing: called with one line for each method or metric that is left out.
    ValueError for unknown names, and if a clip cannot be fetched.
    """
    for kind, names, known in (
        ("clip", clips, CLIPS),
        ("method", methods, METHODS),
        ("recipe", recipes, RECIPES),
        ("metric", metrics, measures.METRICS),
    ):
        if unknown := [name for name in names if name not in known]:
            raise ValueError(f"no {kind} is called {unknown[0]}: choose from {', '.join(known)}")
    report = on_missing or (lambda line: None)
    versions = dict(_versions(methods, folder, report))
    available = [name for name in metrics if _available(name, report)]
    by_recipe = {
        recipe: {
            method: version
            for method, version in versions.items()
            if scale_of(recipe) in (METHODS[method].scales or [scale_of(recipe)])
        }
        for recipe in recipes
    }
    total = len(clips) * sum(map(len, by_recipe.values()))
    counter = Counter({"restore": total}, on_progress)
    counter.begin("restore")
    results = []
    for clip in clips:
        truth = truth_of(clip, folder)
        for recipe in recipes:
            source = degraded(clip, recipe, folder)
            for method, version in by_recipe[recipe].items():
                out = folder / recipe / method / f"{clip}.mkv"
                result = _stored(out, version, threads, available)
                if result is None:
                    cost = _restore(method, source, out, folder, threads)
                    result = _measured(out, truth, available, cost, version, threads)
                    _store(out, result)
                results.append(result)
                counter.add("restore")
    return results


def _versions(
    methods: Sequence[str], folder: Path, report: Callable[[str], None]
) -> Iterator[tuple[str, str]]:
    for method in methods:
        try:
            yield method, METHODS[method].prepare(folder)
        except ValueError as error:
            report(f"{method} is left out: {error}")


def _available(name: str, report: Callable[[str], None]) -> bool:
    try:
        with measures.METRICS[name].meter(measures.Setup()):
            return True
    except ValueError as error:
        report(f"{name} is left out: {error}")
        return False


def _restore(method: str, source: Path, out: Path, folder: Path, threads: int) -> Cost:
    out.parent.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=keep_freed_memory) as pool:
        return pool.submit(restore_here, method, source, out, folder, threads).result()


def restore_here(method: str, source: Path, out: Path, folder: Path, threads: int) -> Cost:
    """Restores a cell in this process and returns what it took.

    method: by name. out: the file to write, RECIPE/METHOD/CLIP in `folder`. threads: of the
    processor.
    """
    torch.set_num_threads(threads)
    truth = open_video(folder / "truth" / out.name).info
    size = truth.width, truth.height
    began: list[tuple[float, float]] = []

    def begin() -> None:
        began.append((time.perf_counter(), time.process_time()))

    # A new folder, in which no earlier run has left results to resume from.
    with TemporaryDirectory(dir=out.parent, prefix=".restoring-") as empty:
        restored = Path(empty) / out.name
        METHODS[method].restore(source, restored, size, folder, begin, threads)
        ended = time.perf_counter(), time.process_time()
        os.replace(restored, out)
    try:
        peak = resident("VmHWM")
    except OSError:  # no /proc: not Linux
        peak = None
    return Cost(seconds=ended[0] - began[0][0], cpu_seconds=ended[1] - began[0][1], peak=peak)


def _measured(
    out: Path, truth: Path, metrics: Sequence[str], cost: Cost, version: str, threads: int
) -> Result:
    video = open_video(out)
    comparison = measures.compare(video, open_video(truth), metrics=metrics, skip_missing=True)
    return Result(
        clip=out.stem,
        recipe=out.parents[1].name,
        method=out.parent.name,
        version=version,
        threads=threads,
        frames=len(video),
        cost=cost,
        per_frame=comparison.per_frame,
        means=comparison.means | {name: math.nan for name in comparison.missing},
    )


def _store(out: Path, result: Result) -> None:
    path = out.with_suffix(".json")
    part = path.with_suffix(".part")
    part.write_text(json.dumps(asdict(result), indent=1), encoding="utf-8")
    os.replace(part, path)


def _stored(out: Path, version: str, threads: int, metrics: Sequence[str]) -> Result | None:
    """Returns the stored result if it is by the same version and has all metrics."""
    path = out.with_suffix(".json")
    if not (path.exists() and out.exists()):
        return None
    content: Mapping = json.loads(path.read_text(encoding="utf-8"))
    same = (content["version"], content["threads"]) == (version, threads)
    if not same or not set(metrics) <= content["means"].keys():
        return None
    selected = {
        kind: {name: values for name, values in content[kind].items() if name in metrics}
        for kind in ("per_frame", "means")
    }
    return Result(**{**content, "cost": Cost(**content["cost"]), **selected})
