"""Many videos: one after the other, or shared out over the GPUs and machines of a Ray cluster.

A worker looks at a video, any workers restore its parts (shots, or segments of them), and when the
last is done one of them decodes and writes the file. They meet in the folder with the video's
finished work (`resume`), which all machines must see. It holds exactly what a single worker goes on
with, so the result is the same however many there are, and a part that was lost with its worker
goes on from its last finished step.
"""

import logging
import os
import platform
import re
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import Any, Literal, NamedTuple, TypeVar

from .memory import is_out_of_memory
from .model import Model, Prompts, add_prompts, load
from .upscale import RunSpec, ShotSettings, store_segment, survey, upscale
from .video_io import AlreadyThere, VideoSource

_LOG = logging.getLogger(__name__)
_ATTEMPTS = 3  # of a part whose worker dies
_PATIENCE = 30  # seconds without any worker before that is said
T = TypeVar("T")

Options = dict[str, Any]
OpenRunSpec = Callable[[Options], RunSpec]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a job. number: its place among the jobs. result: as `upscale` returns it.

    reason: why it failed.
    """

    number: int
    state: Literal["done", "there already", "failed"]
    result: dict[str, Any] = field(default_factory=dict)
    reason: str = ""
    seconds: float = 0.0


class Worker:
    """Does jobs or parts of them, and keeps the model that it has loaded. A job is plain data.

    Its methods return an `Outcome` where the job has come to its end otherwise than hoped for.
    """

    def __init__(self, open_run: OpenRunSpec) -> None:
        """open_order: what a job asks for, on the machine that does it; importable there."""
        self._open_order = open_run
        self._model: tuple[Any, Model] | None = None
        self._done = 0.0

    def where(self) -> str:
        """The machine and the process."""
        return f"{platform.node()}, process {os.getpid()}"

    def progress(self) -> float:
        """How much of the part at hand is denoised, 0 to 1."""
        return self._done

    def survey(
        self, number: int, options: Options
    ) -> tuple[list[ShotSettings], list[int]] | Outcome:
        """See `upscale.survey`."""

        def look() -> tuple[list[ShotSettings], list[int]]:
            run = self._open_order(options)
            return survey(run.job, run.whole, run.get_shots)

        return _tried(number, look)

    def store_segment(
        self, number: int, options: Options, shot_settings: Sequence[ShotSettings], segment: int
    ) -> Outcome | None:
        """See `upscale.store_segment`."""

        def find() -> None:
            run = self._open_order(options)
            store_segment(
                run.job, shot_settings, segment, self._get_model(run), on_progress=self._note
            )

        self._done = 0.0
        return _tried(number, find)

    def finish(
        self,
        number: int,
        options: Options,
        shot_settings: Sequence[ShotSettings] | None = None,
        on_progress: Progress | None = None,
    ) -> Outcome:
        """Does a job, or what is left of it. scenes: those of `survey` if it was surveyed."""

        def do() -> Outcome:
            def known(source: VideoSource) -> Sequence[ShotSettings]:
                return shot_settings or ()

            start = time.monotonic()
            run = self._open_order(options)
            result = upscale(
                run.job,
                run.whole,
                self._get_model(run),
                get_shots=run.get_shots if shot_settings is None else known,
                on_progress=on_progress or self._note,
            )
            seconds = time.monotonic() - start
            return Outcome(number=number, state="done", result=result, seconds=seconds)

        self._done = 0.0
        return _tried(number, do)

    def _note(self, stage: str, done: int, total: int) -> None:
        if stage == "denoise":
            self._done = done / max(total, 1)

    def _get_model(self, run: RunSpec) -> Callable[[Sequence[Prompts]], Model]:
        files, how = run.files, run.loading
        key = (files.model, files.vae, files.text_encoder, how)

        def get(prompts: Sequence[Prompts]) -> Model:
            if self._model is None or self._model[0] != key:
                self._model = None  # or both would be in memory
                self._model = key, load(files, prompts, **how)
            add_prompts(self._model[1], files, prompts, **how)
            return self._model[1]

        return get


def _tried(number: int, work: Callable[[], T]) -> T | Outcome:
    """What `work` returns, or how it failed where a person can mend that."""
    try:
        return work()
    except AlreadyThere:
        return Outcome(number=number, state="there already")
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            return Outcome(number=number, state="failed", reason="not enough memory")
        if isinstance(error, RuntimeError):
            raise
        return Outcome(number=number, state="failed", reason=str(error))


def one_by_one(
    jobs: Sequence[Options], open_run: OpenRunSpec, on_progress: Callable[[int], Progress]
) -> Iterator[Outcome]:
    """Does jobs in this process. on_progress: number of a job -> what is told how far it is."""
    worker = Worker(open_run)
    for number, options in enumerate(jobs):
        yield worker.finish(number, options, on_progress=on_progress(number))


class Status(NamedTuple):
    """How far everything is: frames that are denoised, and those known of; workers at hand."""

    done: int
    total: int
    workers: int


def on_ray(
    jobs: Sequence[Options],
    open_run: OpenRunSpec,
    *,
    address: str,
    on_worker: Callable[[str], None] = lambda where: None,
    on_status: Callable[[Status], None] = lambda standing: None,
) -> Iterator[Outcome]:
    """Does jobs on a Ray cluster, and yields their outcomes as they come.

    address: the cluster's, auto for the one that this machine belongs to, or local for this machine
    alone. There is a worker for each GPU; where there are none, one for each machine.
    The package, the model files and all videos must be found in the same places everywhere.
    on_worker: told where a new worker is. on_standing: called about every second; an exception from
    it ends everything. ValueError without Ray, or where there is no cluster.
    """
    try:
        import ray  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError("this needs Ray: `pip install ray` on every machine") from error

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    how: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
    try:
        if named := re.fullmatch(r"([^/]+):(\d+)", address):  # Ray itself tries for minutes
            socket.create_connection((named[1].strip("[]"), int(named[2])), timeout=10).close()
        ray.init(address=address, logging_level=logging.ERROR, **how)
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"there is no Ray cluster at {address} ({' '.join(str(error).split())[:200]}): start "
            "one with `ray start --head`, or leave out --ray"
        ) from None
    try:
        yield from _Scheduler(ray, jobs, open_run, on_worker, on_status).outcomes()
    finally:
        ray.shutdown()  # ends the workers


class _Task(NamedTuple):
    """Looking at videos comes first; then each video is brought to its end before the next."""

    later: bool
    video: int
    last: bool = False
    segment: int = -1


@dataclass(kw_only=True)
class _Video:
    """What is known of one. parts: frames of each; done: those of them that are done."""

    options: Options
    shot_settings: list[ShotSettings] | None = None
    segments: list[int] = field(default_factory=list)
    done: set[int] = field(default_factory=set)
    ended: bool = False


class _Scheduler:
    """Workers on a cluster and what they have to do."""

    def __init__(
        self,
        ray: Any,
        jobs: Sequence[Options],
        open_run: OpenRunSpec,
        on_worker: Callable[[str], None],
        on_status: Callable[[Status], None],
    ) -> None:
        self._ray, self._on_worker, self._on_standing = ray, on_worker, on_status
        self._videos = [_Video(options=options) for options in jobs]
        self._waiting = [_Task(False, number) for number in range(len(jobs))]
        self._deaths: Counter[_Task | None] = Counter()
        self._idle: list[Any] = []
        self._busy: dict[Any, tuple[Any, _Task | None]] = {}  # without a task: still starting
        self._last_seen = self._last_report = time.monotonic()
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        gpus = int(sum(node.get("GPU", 0) for node in nodes))
        cpus = [int(node["CPU"]) for node in nodes if node.get("CPU", 0) >= 1]
        how: dict[str, Any] = {"max_restarts": 0, "scheduling_strategy": "SPREAD"}
        how |= {"num_gpus": 1, "num_cpus": 0} if gpus else {"num_cpus": min(cpus, default=1)}
        how["max_concurrency"] = 2  # a second thread answers how far the first one is
        self._spawn = lambda: ray.remote(Worker).options(**how).remote(open_run)
        for _ in range(gpus or len(cpus) or 1):
            self._start()

    def _start(self) -> None:
        worker = self._spawn()
        self._busy[worker.where.remote()] = worker, None

    def outcomes(self) -> Iterator[Outcome]:
        errors = self._ray.exceptions
        while any(not video.ended for video in self._videos):
            self._assign()
            for reference in self._ray.wait(list(self._busy), timeout=1)[0]:
                worker, task = self._busy.pop(reference)
                outcome = None
                try:
                    found = self._ray.get(reference)
                    if task is None:
                        self._deaths[None] = 0
                        self._on_worker(found)
                    else:
                        outcome = self._take(task, found)
                    self._idle.append(worker)
                except errors.RayTaskError as error:
                    if task is None:
                        raise
                    # The worker lives, the fault is in the program.
                    self._idle.append(worker)
                    outcome = _failed(task, f"{type(error.cause).__name__}: {error.cause}")
                except errors.RayError as error:
                    outcome = self._lost(worker, task, error)
                if task and outcome and not self._videos[task.video].ended:
                    self._videos[task.video].ended = True
                    yield outcome
            self._report()

    def _assign(self) -> None:
        while self._idle and self._waiting:
            task = heappop(self._waiting)
            video = self._videos[task.video]
            if video.ended:
                continue
            worker, job = self._idle.pop(), (task.video, video.options)
            if not task.later:
                reference = worker.survey.remote(*job)
            elif task.last:
                reference = worker.finish.remote(*job, video.shot_settings)
            else:
                reference = worker.store_segment.remote(*job, video.shot_settings, task.segment)
            self._busy[reference] = worker, task

    def _take(self, task: _Task, found: Any) -> Outcome | None:
        """Goes on with what a worker has returned; the job's outcome if that is its end."""
        if isinstance(found, Outcome):
            return found
        video = self._videos[task.video]
        if task.later:
            video.done.add(task.segment)
        else:
            video.shot_settings, video.segments = found
            if len(video.segments) > 1:
                for segment in range(len(video.segments)):
                    heappush(self._waiting, _Task(True, task.video, segment=segment))
        if len(video.segments) < 2 or len(video.done) == len(video.segments):
            heappush(self._waiting, _Task(True, task.video, last=True))
        return None

    def _lost(self, worker: Any, task: _Task | None, error: Exception) -> Outcome | None:
        """A worker has died: another takes its place, and its part is done again."""
        with suppress(self._ray.exceptions.RayError):
            self._ray.kill(worker)
        self._deaths[task] += 1
        if self._deaths[task] == _ATTEMPTS:
            if task is not None:
                self._start()
                return _failed(task, f"{_ATTEMPTS} workers died over it: too little memory?")
            raise ValueError(
                f"workers cannot start ({' '.join(str(error).split())[-300:]}): is this package "
                "installed on every machine?"
            )
        self._start()
        if task is not None:
            _LOG.warning("a worker died: what it was at is done again")
            heappush(self._waiting, task)
        return None

    def _report(self) -> None:
        now = time.monotonic()
        at_work = {worker: task for worker, task in self._busy.values() if task}
        if at_work or self._idle:
            self._last_seen = now
        elif now - self._last_seen > _PATIENCE:
            self._last_seen = float("inf")
            _LOG.warning("no worker has started yet: is the cluster busy with something else?")
        if now - self._last_report < 1:
            return
        self._last_report = now
        found = sum(
            sum(
                video.segments
                if video.ended
                else (video.segments[segment] for segment in video.done)
            )
            for video in self._videos
        )
        asked = {w.progress.remote(): task for w, task in at_work.items() if task.later}
        answered = (
            self._ray.wait(list(asked), num_returns=len(asked), timeout=1)[0] if asked else ()
        )
        for reference in answered:
            task = asked[reference]
            segments = self._videos[task.video].segments
            if not task.last or len(segments) == 1:
                with suppress(self._ray.exceptions.RayError):
                    found += self._ray.get(reference) * segments[0 if task.last else task.segment]
        total = sum(sum(video.segments) for video in self._videos)
        self._on_standing(Status(round(found), total, len(at_work) + len(self._idle)))


def _failed(task: _Task, reason: str) -> Outcome:
    return Outcome(number=task.video, state="failed", reason=reason)
