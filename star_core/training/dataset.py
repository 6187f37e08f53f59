"""A folder of videos to shards of clips: cut into shots, filtered, captioned (webdataset)."""

import io
import json
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

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
    """What becomes of shots. length: least and most frames of a clip; longer shots give several.

    side: least height and width in pixels. motion: least and most mean change from frame to frame,
    and brightness: of the mean, in 8-bit levels. detail: least mean difference of neighbouring
    pixels in levels; what is blurred or empty has little.
    """

    length: tuple[int, int] = (32, 64)
    side: int = 256
    motion: tuple[float, float] = (0.2, 30.0)
    brightness: tuple[float, float] = (24.0, 230.0)
    detail: float = 1.0

    def __post_init__(self) -> None:
        if not 1 <= self.length[0] <= self.length[1]:
            raise ValueError(f"a clip has from 1 frame up, the least first, got {self.length}")

    def objection(self, measured: "Measured") -> str | None:
        """Why a clip is left out."""
        for name in ("motion", "brightness"):
            low, high = getattr(self, name)
            value = getattr(measured, name)
            if not low <= value <= high:
                return f"too {'little' if value < low else 'much'} {name}"
        return "too little detail" if measured.detail < self.detail else None


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Of a clip, in 8-bit levels of its luma."""

    motion: float
    brightness: float
    detail: float


def measure(frames: Iterable[Tensor]) -> Measured:
    """Means over frames (c h w) in [0, 1]; every frame is looked at, two are held."""
    sums, before, count = torch.zeros(3, dtype=torch.float64), None, 0
    for frame in frames:
        y = luma(frame) * 255
        small = F.avg_pool2d(y[None], 4, ceil_mode=True)[0]
        moved = torch.zeros(()) if before is None else (small - before).abs().mean()
        detail = ((y[:, 1:] - y[:, :-1]).abs().mean() + (y[..., 1:] - y[..., :-1]).abs().mean()) / 2
        sums += torch.stack([moved, y.mean(), detail]).double()
        before, count = small, count + 1
    motion, brightness, detail = sums.tolist()
    return Measured(
        motion=motion / max(count - 1, 1), brightness=brightness / count, detail=detail / count
    )


def clips_of(shots: Iterable[range], length: tuple[int, int]) -> Iterator[range]:
    """Parts of shots of `length[0]` to `length[1]` frames, as equal as can be.

    A shot that cannot be parted evenly is cut short, and one that is too short left out.
    """
    least, most = length
    for shot in shots:
        parts = -(-len(shot) // most)
        if len(shot) < parts * least:
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

    find_cuts: frames -> indices of frames that begin a shot; None where videos are single shots.
    A clip is NUMBER.mp4 (H.264 CRF 16), NUMBER.json (where it is from, what was measured) and, if
    it has a caption, NUMBER.txt. on_video(done, videos) is called between videos. Returns how many
    clips were kept, and left out why. ValueError if there is nothing to read or `out` holds shards.
    """
    from ..shots import shots_of

    videos = sorted(path for path in folder.rglob("*") if path.suffix.lower() in VIDEOS)
    if not videos:
        raise ValueError(f"{folder} holds no videos")
    if out.exists() and any(out.glob("*.tar")):
        raise ValueError(f"{out} holds shards already: choose another folder")
    captions, counts = read_captions(folder), Counter[str]()
    with ShardWriter(out, per_shard) as writer:
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
                counts[objection or "kept"] += 1
                if objection is None:
                    record = {
                        "source": path.relative_to(folder).as_posix(),
                        "frames": [part.start, part.stop],
                        "size": [video.info.width, video.info.height],
                        **asdict(measured),
                    }
                    writer.add(clip, record, caption)
        if on_video:
            on_video(len(videos), len(videos))
    return dict(counts)


class ShardWriter:
    """Numbered clips in .tar files of so many; a file gets its name when it is complete."""

    def __init__(self, folder: Path, per_shard: int) -> None:
        self.folder, self.per_shard = folder, per_shard
        self.clips = self.shards = 0
        self.tar: tarfile.TarFile | None = None

    def __enter__(self) -> "ShardWriter":
        self.folder.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._close(complete=kind is None)

    @property
    def _path(self) -> Path:
        return self.folder / f"shard-{self.shards:05d}.tar"

    def add(self, clip: VideoSource, record: dict[str, object], caption: str | None) -> None:
        if self.tar is None:
            self.tar = tarfile.open(self._path.with_suffix(".part"), "w")  # noqa: SIM115
        key = f"{self.clips:08d}"
        with TemporaryDirectory() as folder:
            path = Path(folder) / f"{key}.mp4"
            info = clip.info
            with open_sink(path, width=info.width, height=info.height, fps=info.fps) as sink:
                for frame in clip:
                    sink.write(frame[:3])
            self._put(f"{key}.mp4", path.read_bytes())
        self._put(f"{key}.json", json.dumps(record).encode())
        if caption is not None:
            self._put(f"{key}.txt", caption.encode())
        self.clips += 1
        if self.clips % self.per_shard == 0:
            self._close(complete=True)

    def _put(self, name: str, data: bytes) -> None:
        assert self.tar is not None
        entry = tarfile.TarInfo(name)
        entry.size = len(data)
        self.tar.addfile(entry, io.BytesIO(data))

    def _close(self, *, complete: bool) -> None:
        if self.tar is None:
            return
        self.tar.close()
        self.tar = None
        part = self._path.with_suffix(".part")
        if complete:
            part.rename(self._path)
            self.shards += 1
        else:
            part.unlink()
