"""Cuts a folder of videos into clips, filters them and writes them as webdataset shards."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import groupby
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

FindCuts = Callable[[Iterable[Tensor]], list[int]]
OnVideo = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class ClipFilter:
    """Limits that a clip must keep. Motion, brightness and detail are in 8-bit levels of luma.

    length: fewest and most frames of a clip; longer shots are split. side: smallest height and
    width in pixels. motion: range of the mean change from frame to frame. brightness: range of the
    mean. detail: smallest mean difference of neighbouring pixels, low for blurred or empty clips.
    """

    length: tuple[int, int] = (32, 64)
    side: int = 256
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
    per_shard: int = 256,
    on_video: OnVideo | None = None,
) -> dict[str, int]:
    """Cuts the videos below `folder` into clips and writes those that pass as `out`/*.tar.

    A clip is NUMBER.mp4 (H.264 CRF 16), NUMBER.json (source, frames, size and measurements) and, if
    it has a caption, NUMBER.txt.

    find_cuts: returns the indices of the frames that begin a shot; None if every video is one shot.
    per_shard: clips in a .tar file. on_video: called as on_video(done, videos) between videos.

    Returns how many clips were kept, and how many videos or clips were rejected by reason.
    ValueError if `folder` holds no videos, `out` holds shards already, or webdataset is not
    installed.
    """
    from ..shots import shots_of

    videos = sorted(path for path in folder.rglob("*") if path.suffix.lower() in VIDEOS)
    if not videos:
        raise ValueError(f"{folder} holds no videos ({', '.join(sorted(VIDEOS))})")
    if out.exists() and any(out.glob("*.tar")):
        raise ValueError(f"{out} holds shards already: choose another folder")
    captions, counts = read_captions(folder), Counter[str]()

    def samples() -> Iterator[dict[str, Any]]:
        """Yields the clips that pass the filter, as webdataset samples."""
        for index, path in enumerate(videos):
            if on_video:
                on_video(index, len(videos))
            video = open_video(path)
            if min(video.info.width, video.info.height) < config.side:
                counts["too small"] += 1
                continue
            cuts = find_cuts(frame[:3] for frame in video) if find_cuts else []
            caption = caption_of(path, captions)
            for part in clips_of(shots_of(len(video), cuts), config.length):
                clip = open_video(path, frames=(part.start, part.stop))
                measured = measure(frame[:3] for frame in clip)
                objection = config.objection(measured)
                if objection is not None:
                    counts[objection] += 1
                    continue
                record = {
                    "source": path.relative_to(folder).as_posix(),
                    "frames": [part.start, part.stop],
                    "size": [video.info.width, video.info.height],
                    **asdict(measured),
                }
                sample = {"__key__": f"{counts['kept']:08d}", "mp4": _mp4(clip), "json": record}
                counts["kept"] += 1
                yield sample if caption is None else sample | {"txt": caption}
        if on_video:
            on_video(len(videos), len(videos))

    _write_shards(samples(), out, per_shard)
    return dict(counts)


def _write_shards(samples: Iterable[dict[str, Any]], folder: Path, per_shard: int) -> None:
    """Writes samples to numbered .tar files; a file gets its name when it is complete."""
    try:
        from webdataset import TarWriter  # pyright: ignore[reportAttributeAccessIssue]
    except ImportError as error:
        raise ValueError("writing shards needs webdataset: `pip install webdataset`") from error

    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder) as unfinished:
        for shard, group in groupby(enumerate(samples), lambda item: item[0] // per_shard):
            part = Path(unfinished) / "part"
            with part.open("wb") as file, TarWriter(file, mtime=0) as tar:
                for _, sample in group:
                    tar.write(sample)
            part.rename(folder / f"shard-{shard:05d}.tar")


def _mp4(clip: VideoSource) -> bytes:
    """Returns a clip as an H.264 file."""
    with TemporaryDirectory() as folder:
        path, info = Path(folder) / "clip.mp4", clip.info
        with open_sink(path, width=info.width, height=info.height, fps=info.fps) as sink:
            for frame in clip:
                sink.write(frame[:3])
        return path.read_bytes()
