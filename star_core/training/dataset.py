"""Cuts a folder of videos into clips, filters them and writes them as webdataset shards."""

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from itertools import count
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..metrics.fidelity import luma
from ..video_io import VideoSource, open_sink, open_video
from .captions import caption_of, read_captions
from .clips import VIDEOS
from .videos import SampleSize

logger = logging.getLogger(__name__)

FindCuts = Callable[[Iterable[Tensor]], list[int]]
OnVideo = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class ClipFilter:
    """Limits that a clip must keep. Motion, brightness and detail are in 8-bit levels of luma.

    length: fewest and most frames of a clip; longer shots are split. size: smallest height and
    width in pixels. The defaults suit a training sample, see `SampleSize`. motion: range of the
    mean change from frame to frame. brightness: range of the mean. detail: smallest mean
    difference of neighbouring pixels, low for blurred or empty clips.
    """

    length: tuple[int, int] = (SampleSize().length, 2 * SampleSize().length)
    size: tuple[int, int] = SampleSize().size
    motion: tuple[float, float] = (0.2, 30.0)
    brightness: tuple[float, float] = (24.0, 230.0)
    detail: float = 1.0

    def __post_init__(self) -> None:
        if not 1 <= self.length[0] <= self.length[1]:
            raise ValueError(f"length must be 1 <= fewest <= most frames, got {self.length}")

    def objection(self, measured: "Measured") -> str | None:
        """Returns why a clip is rejected, or None if it passes."""
        for name in ("motion", "brightness"):
            low, high = getattr(self, name)
            value = getattr(measured, name)
            if not low <= value <= high:
                return f"too {'little' if value < low else 'much'} {name}"
        return "too little detail" if measured.detail < self.detail else None


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Motion, brightness and detail of a clip in 8-bit levels of luma, see `ClipFilter`."""

    motion: float
    brightness: float
    detail: float


def measure(frames: Iterable[Tensor]) -> Measured:
    """Measures a clip of frames (c h w) in [0, 1], at most two of them in memory at a time."""
    sums, previous, count = torch.zeros(3, dtype=torch.float64), None, 0
    for frame in frames:
        y = luma(frame) * 255
        small = F.avg_pool2d(y[None], 4, ceil_mode=True)[0]
        motion = torch.zeros(()) if previous is None else (small - previous).abs().mean()
        detail = ((y[:, 1:] - y[:, :-1]).abs().mean() + (y[..., 1:] - y[..., :-1]).abs().mean()) / 2
        sums += torch.stack([motion, y.mean(), detail]).double()
        previous, count = small, count + 1
    motion, brightness, detail = sums.tolist()
    return Measured(
        motion=motion / max(count - 1, 1), brightness=brightness / count, detail=detail / count
    )


def clips_of(shots: Iterable[range], length: tuple[int, int]) -> Iterator[range]:
    """Yields clips of `length[0]` to `length[1]` frames, as equal within a shot as possible.

    shots: frame numbers. A shot that cannot be split within these limits loses its last frames; one
    that is too short is left out.
    """
    fewest, most = length
    for shot in shots:
        parts = -(-len(shot) // most)
        if len(shot) < parts * fewest:
            parts = len(shot) // most
            shot = shot[: parts * most]
        for i in range(parts):
            yield shot[len(shot) * i // parts : len(shot) * (i + 1) // parts]


def make_dataset(
    folder: Path,
    out: Path,
    config: ClipFilter,
    *,
    find_cuts: FindCuts | None = None,
    per_shard: int = 16,
    workers: int = 1,
    on_video: OnVideo | None = None,
) -> dict[str, int]:
    """Cuts the videos below `folder` into clips and writes those that pass as `out`/*.tar.

    A clip is NUMBER.mp4 (H.264 CRF 16), NUMBER.json (source, frames, size and measurements) and, if
    it has a caption, NUMBER.txt. Each shard holds the clips of `per_shard` videos; beside it,
    shard-NUMBER.json tells what it was made of. Shards that are complete are not made again.

    find_cuts: returns the indices of the frames that begin a shot; None if every video is one shot.
    workers: processes, each with a shard at a time; find_cuts must then be a function of a module.
    on_video: called as on_video(done, videos) between videos.

    Returns how many clips were kept, and how many videos or clips were rejected by reason.
    ValueError if `folder` holds no videos, `out` holds other shards, or webdataset is not
    installed.
    """
    _tar_writer()
    videos = sorted(path for path in folder.rglob("*") if path.suffix.lower() in VIDEOS)
    if not videos:
        raise ValueError(f"{folder} holds no videos ({', '.join(sorted(VIDEOS))})")
    if min(per_shard, workers) < 1:
        raise ValueError(f"--per-shard and --workers must be at least 1: {per_shard}, {workers}")
    captions, counts = read_captions(folder), Counter[str]()
    out.mkdir(parents=True, exist_ok=True)
    jobs, done = [], 0
    for first in range(0, len(videos), per_shard):
        part = videos[first : first + per_shard]
        job = _Job(
            path=out / f"shard-{first // per_shard:05d}.tar",
            folder=folder,
            videos=part,
            captions={path: text for path in part if (text := caption_of(path, captions))},
            config=config,
            find_cuts=find_cuts,
        )
        if (finished := job.finished()) is None:
            jobs.append(job)
        else:
            counts.update(finished)
            done += len(part)
    stray = {path.name for path in out.glob("*.tar")} - {f"{p.stem}.tar" for p in _records(out)}
    if stray:
        raise ValueError(f"{out} holds other shards ({min(stray)}): choose another folder")

    def report(more: int) -> None:
        if on_video:
            on_video(done + more, len(videos))

    report(0)
    counts.update(_in_turn(jobs, report) if workers == 1 else _at_once(jobs, workers, report))
    return dict(counts)


@dataclass(frozen=True, kw_only=True)
class _Job:
    """A shard and the videos that it is made of. Other arguments: see `make_dataset`."""

    path: Path
    folder: Path
    videos: list[Path]
    captions: dict[Path, str]
    config: ClipFilter
    find_cuts: FindCuts | None

    @property
    def record(self) -> Path:
        """The file that tells what the shard is made of."""
        return self.path.with_suffix(".json")

    def made_of(self) -> dict[str, Any]:
        """Returns all that the shard depends on, as JSON."""
        names = [path.relative_to(self.folder).as_posix() for path in self.videos]
        limits = json.loads(json.dumps(asdict(self.config)))
        return {"videos": names, "limits": limits, "cuts": self.find_cuts is not None}

    def finished(self) -> dict[str, int] | None:
        """Returns the counts of a complete shard, None if it must be made.

        ValueError if it is made of other videos or with other limits.
        """
        if not self.record.exists():
            return None
        stored = json.loads(self.record.read_text(encoding="utf-8"))
        counts = stored.pop("counts")
        if stored != self.made_of():
            raise ValueError(
                f"{self.path} was made of other videos or with other options: give the same ones, "
                "or choose another folder"
            )
        return None if counts.get("kept") and not self.path.exists() else counts


def _records(out: Path) -> list[Path]:
    return list(out.glob("shard-*.json"))


def _in_turn(jobs: list[_Job], report: Callable[[int], None]) -> Counter[str]:
    counts, done = Counter[str](), count(1)
    for job in jobs:
        counts += _make_shard(job, lambda: report(next(done)))
    return counts


def _at_once(jobs: list[_Job], workers: int, report: Callable[[int], None]) -> Counter[str]:
    """Makes shards in processes, and reports how many videos they have done."""
    counts, context = Counter[str](), get_context("spawn")
    done = context.Value("i", 0)
    pool = ProcessPoolExecutor(workers, context, _begin_worker, (done,))
    try:
        waiting = {pool.submit(_make_shard, job, _count_video) for job in jobs}
        while waiting:
            finished, waiting = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)
            for future in finished:
                counts += future.result()
            report(done.value)
    finally:
        pool.shutdown(cancel_futures=True)
    return counts


_videos_done: Any = None  # in a worker: the number that all workers share


def _begin_worker(done: Any) -> None:
    global _videos_done
    _videos_done = done
    torch.set_num_threads(1)


def _count_video() -> None:
    with _videos_done.get_lock():
        _videos_done.value += 1


def _make_shard(job: _Job, on_video: Callable[[], None]) -> Counter[str]:
    """Writes a shard and its record; returns the counts.

    The files get their names when they are complete, and the shard last.
    """
    counts = Counter[str]()
    with TemporaryDirectory(dir=job.path.parent) as unfinished:
        tar_file, record = Path(unfinished) / "tar", Path(unfinished) / "json"
        with tar_file.open("wb") as file, _tar_writer()(file, mtime=0) as tar:
            for path in job.videos:
                for sample in _clips(path, job, counts):
                    tar.write({"__key__": f"{job.path.stem[6:]}{counts['kept']:05d}", **sample})
                    counts["kept"] += 1
                on_video()
        content = {**job.made_of(), "counts": +counts}
        record.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        record.replace(job.record)
        if counts["kept"]:
            tar_file.replace(job.path)
    return counts


def _clips(path: Path, job: _Job, counts: Counter[str]) -> Iterator[dict[str, Any]]:
    """Yields the clips of a video that pass the filter, and counts what does not pass."""
    from ..shots import shots_of

    config = job.config
    try:
        video = open_video(path)
        if video.info.height < config.size[0] or video.info.width < config.size[1]:
            counts["too small"] += 1
            return
        cuts = job.find_cuts(frame[:3] for frame in video) if job.find_cuts else []
        shots = shots_of(len(video), cuts)
        counts["too short"] += sum(len(shot) < config.length[0] for shot in shots)
        for part in clips_of(shots, config.length):
            clip = video.cut(part)
            measured = measure(frame[:3] for frame in clip)
            if objection := config.objection(measured):
                counts[objection] += 1
                continue
            record = {
                "source": path.relative_to(job.folder).as_posix(),
                "frames": [part.start, part.stop],
                "size": [video.info.width, video.info.height],
                **asdict(measured),
            }
            caption = job.captions.get(path)
            texts = {} if caption is None else {"txt": caption}
            yield {"mp4": _mp4(clip), "json": record, **texts}
    except ValueError as error:
        logger.warning("%s is left out: %s", path, error)
        counts["unreadable"] += 1


def _tar_writer() -> Any:
    try:
        from webdataset import TarWriter  # pyright: ignore[reportAttributeAccessIssue]
    except ImportError as error:
        raise ValueError("writing shards needs webdataset: `pip install webdataset`") from error
    return TarWriter


def _mp4(clip: VideoSource) -> bytes:
    """Returns a clip as an H.264 file."""
    with TemporaryDirectory() as folder:
        path, info = Path(folder) / "clip.mp4", clip.info
        with open_sink(path, width=info.width, height=info.height, fps=info.fps) as sink:
            for frame in clip:
                sink.write(frame[:3])
        return path.read_bytes()
