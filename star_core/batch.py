"""Upscales many videos, one after the other or on the GPUs and machines of a Ray cluster.

On a cluster one worker surveys a video, any workers restore its segments, and when all segments are
done one worker decodes and writes the file. They share the folder with the video's intermediate
results (`resume`), which all machines must be able to access. It holds exactly what a single worker
resumes from, so that the result does not depend on the number of workers, and a segment whose
worker has died resumes from its last finished step.
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

from .allocator import keep_freed_memory
from .memory import is_out_of_memory
from .model import Model, Prompts, add_prompts, load
from .upscale import JobSurvey, RunSpec, store_segment, survey, upscale
from .video_io import OutputExists

_LOG = logging.getLogger(__name__)
_ATTEMPTS = 3  # at a task whose worker dies
_PATIENCE = 30  # seconds without any worker before a warning
T = TypeVar("T")

Options = dict[str, Any]
OpenRunSpec = Callable[[Options], RunSpec]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a job ended. number: its position among the jobs. result: as `upscale` returns it.

    reason: why it failed. seconds: how long it took.
    """

    number: int
    state: Literal["done", "there already", "failed"]
    result: dict[str, Any] = field(default_factory=dict)
    reason: str = ""
    seconds: float = 0.0


class Worker:
    """Runs jobs or parts of them, and keeps the model that it has loaded.

    open_run: turns the options of a job, which are plain data, into a `RunSpec` on the worker's
    machine; it must be importable there.
    """

    def __init__(self, open_run: OpenRunSpec) -> None:
        keep_freed_memory()  # a worker on a cluster has a process of its own
        self._open_run = open_run
        self._model: tuple[Any, Model] | None = None
        self._done = 0.0

    def where(self) -> str:
        """Returns the names of machine and process."""
        return f"{platform.node()}, process {os.getpid()}"

    def progress(self) -> float:
        """Returns how much of the present segment is denoised, 0 to 1."""
        return self._done

    def survey(self, number: int, options: Options) -> JobSurvey | Outcome:
        """Surveys a job, see `upscale.survey`.

        number, options: of the job. Returns an `Outcome` if the job fails or its file exists.
        """

        def work() -> JobSurvey:
            run = self._open_run(options)
            return survey(run.job, run.whole, run.get_shots)

        return _attempt(number, work)

    def store_segment(
        self, number: int, options: Options, found: JobSurvey, segment: int
    ) -> Outcome | None:
        """Computes and stores the latents of one segment, see `upscale.store_segment`.

        number, options: of the job. found: of `survey`. segment: number of the segment.
        Returns an `Outcome` if the job fails or its file exists.
        """

        def work() -> None:
            run = self._open_run(options)
            store_segment(run.job, found, segment, self._get_model(run), on_progress=self._note)

        self._done = 0.0
        return _attempt(number, work)

    def finish(
        self,
        number: int,
        options: Options,
        found: JobSurvey | None = None,
        on_progress: Progress | None = None,
    ) -> Outcome:
        """Runs a job, or what is left of it, and returns its outcome.

        number, options: of the job. found: of `survey`, if the job was surveyed.
        on_progress: called with a stage, steps done and steps in all.
        """

        def work() -> Outcome:
            start = time.monotonic()
            run = self._open_run(options)
            result = upscale(
                run.job,
                run.whole,
                self._get_model(run),
                get_shots=run.get_shots,
                found=found,
                on_progress=on_progress or self._note,
            )
            seconds = time.monotonic() - start
            return Outcome(number=number, state="done", result=result, seconds=seconds)

        self._done = 0.0
        return _attempt(number, work)

    def _note(self, stage: str, done: int, total: int) -> None:
        if stage == "denoise":
            self._done = done / max(total, 1)

    def _get_model(self, run: RunSpec) -> Callable[[Sequence[Prompts]], Model]:
        files, loading = run.files, run.loading
        loras = [(lora.path, lora.strength) for lora in files.loras]
        key = (files.model, files.vae, files.decoder, files.text_encoder, loras)
        key = (*key, run.computing, loading)

        def get(prompts: Sequence[Prompts]) -> Model:
            if self._model is None or self._model[0] != key:
                self._model = None  # or both would be in memory
                model = load(files, prompts, **run.computing, **loading)
                self._model = key, model
            add_prompts(self._model[1], files, prompts, **loading)
            return self._model[1]

        return get


def _attempt(number: int, work: Callable[[], T]) -> T | Outcome:
    """Returns the result of `work`, or an `Outcome` for errors that a user can correct."""
    try:
        return work()
    except OutputExists:
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
    """Runs jobs in this process and yields their outcomes.

    open_run: see `Worker`. on_progress: number of a job -> function called with a stage, steps done
    and steps in all.
    """
    worker = Worker(open_run)
    for number, options in enumerate(jobs):
        yield worker.finish(number, options, on_progress=on_progress(number))


class Status(NamedTuple):
    """Progress of all jobs: frames that are denoised, frames known so far, and running workers."""

    done: int
    total: int
    workers: int


def on_ray(
    jobs: Sequence[Options],
    open_run: OpenRunSpec,
    *,
    address: str,
    on_worker: Callable[[str], None] = lambda where: None,
    on_status: Callable[[Status], None] = lambda status: None,
) -> Iterator[Outcome]:
    """Runs jobs on a Ray cluster and yields their outcomes in the order in which they end.

    There is a worker for each GPU, or without GPUs one for each machine. The package, the model
    files and all videos must have the same paths on every machine.

    open_run: see `Worker`. address: of the cluster; "auto" for the one that this machine belongs
    to, "local" for this machine alone. on_worker: called with the machine and process of each new
    worker. on_status: called about every second; an exception from it ends all work.
    ValueError if Ray is not installed, there is no cluster, or workers cannot start.
    """
    try:
        import ray  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError("a cluster needs Ray: `pip install ray` on every machine") from error

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    options: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
    try:
        if match := re.fullmatch(r"([^/]+):(\d+)", address):  # Ray itself tries for minutes
            socket.create_connection((match[1].strip("[]"), int(match[2])), timeout=10).close()
        ray.init(address=address, logging_level=logging.ERROR, **options)
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
    """A task; the order of its fields is its priority: surveys first, then video after video."""

    later: bool
    video: int
    last: bool = False
    segment: int = -1


@dataclass(kw_only=True)
class _Video:
    """State of a video. segments: frames of each; done: numbers of those that are done.

    found: reference to its `JobSurvey`, which every machine gets once.
    """

    options: Options
    found: Any = None
    segments: Sequence[int] = ()
    done: set[int] = field(default_factory=set)
    ended: bool = False


class _Scheduler:
    """Assigns tasks to the workers of a cluster."""

    def __init__(
        self,
        ray: Any,
        jobs: Sequence[Options],
        open_run: OpenRunSpec,
        on_worker: Callable[[str], None],
        on_status: Callable[[Status], None],
    ) -> None:
        self._ray, self._on_worker, self._on_status = ray, on_worker, on_status
        self._videos = [_Video(options=options) for options in jobs]
        self._waiting = [_Task(False, number) for number in range(len(jobs))]
        self._deaths: Counter[_Task | None] = Counter()
        self._idle: list[Any] = []
        self._busy: dict[Any, tuple[Any, _Task | None]] = {}  # without a task while starting
        self._last_seen = self._last_report = time.monotonic()
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        gpus = int(sum(node.get("GPU", 0) for node in nodes))
        cpus = [int(node["CPU"]) for node in nodes if node.get("CPU", 0) >= 1]
        options: dict[str, Any] = {"max_restarts": 0, "scheduling_strategy": "SPREAD"}
        options |= {"num_gpus": 1, "num_cpus": 0} if gpus else {"num_cpus": min(cpus, default=1)}
        options["max_concurrency"] = 2  # a second thread reports the progress of the first
        self._spawn = lambda: ray.remote(Worker).options(**options).remote(open_run)
        for _ in range(gpus or len(cpus) or 1):
            self._start()

    def _start(self) -> None:
        worker = self._spawn()
        self._busy[worker.where.remote()] = worker, None

    def outcomes(self) -> Iterator[Outcome]:
        """Runs all jobs and yields their outcomes in the order in which they end."""
        errors = self._ray.exceptions
        while any(not video.ended for video in self._videos):
            self._assign()
            for reference in self._ray.wait(list(self._busy), timeout=1)[0]:
                worker, task = self._busy.pop(reference)
                outcome = None
                try:
                    result = self._ray.get(reference)
                    if task is None:
                        self._deaths[None] = 0
                        self._on_worker(result)
                    else:
                        outcome = self._accept(task, result)
                    self._idle.append(worker)
                except errors.RayTaskError as error:
                    if task is None:
                        raise
                    # The worker is alive: the error is in the program.
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
                reference = worker.finish.remote(*job, video.found)
            else:
                reference = worker.store_segment.remote(*job, video.found, task.segment)
            self._busy[reference] = worker, task

    def _accept(self, task: _Task, result: Any) -> Outcome | None:
        """Adds the tasks that follow from a result; returns the outcome if the job has ended."""
        if isinstance(result, Outcome):
            return result
        video = self._videos[task.video]
        if task.later:
            video.done.add(task.segment)
        else:
            video.found, video.segments = self._ray.put(result), result.segments
            if len(video.segments) > 1:
                for segment in range(len(video.segments)):
                    heappush(self._waiting, _Task(True, task.video, segment=segment))
        if len(video.segments) < 2 or len(video.done) == len(video.segments):
            heappush(self._waiting, _Task(True, task.video, last=True))
        return None

    def _lost(self, worker: Any, task: _Task | None, error: Exception) -> Outcome | None:
        """Replaces a dead worker and repeats its task, or returns the outcome after too many."""
        with suppress(self._ray.exceptions.RayError):
            self._ray.kill(worker)
        self._deaths[task] += 1
        if self._deaths[task] == _ATTEMPTS:
            if task is not None:
                self._start()
                return _failed(task, f"{_ATTEMPTS} workers died at it: too little memory?")
            raise ValueError(
                f"workers cannot start ({' '.join(str(error).split())[-300:]}): is this package "
                "installed on every machine?"
            )
        self._start()
        if task is not None:
            _LOG.warning("a worker died: its task is repeated")
            heappush(self._waiting, task)
        return None

    def _report(self) -> None:
        now = time.monotonic()
        working = {worker: task for worker, task in self._busy.values() if task}
        if working or self._idle:
            self._last_seen = now
        elif now - self._last_seen > _PATIENCE:
            self._last_seen = float("inf")
            _LOG.warning("no worker has started yet: is the cluster busy with something else?")
        if now - self._last_report < 1:
            return
        self._last_report = now
        done = sum(
            sum(
                video.segments
                if video.ended
                else (video.segments[segment] for segment in video.done)
            )
            for video in self._videos
        )
        queries = {w.progress.remote(): task for w, task in working.items() if task.later}
        answered = (
            self._ray.wait(list(queries), num_returns=len(queries), timeout=1)[0] if queries else ()
        )
        for reference in answered:
            task = queries[reference]
            segments = self._videos[task.video].segments
            if not task.last or len(segments) == 1:
                with suppress(self._ray.exceptions.RayError):
                    done += self._ray.get(reference) * segments[0 if task.last else task.segment]
        total = sum(sum(video.segments) for video in self._videos)
        self._on_status(Status(round(done), total, len(working) + len(self._idle)))


def _failed(task: _Task, reason: str) -> Outcome:
    return Outcome(number=task.video, state="failed", reason=reason)
