"""Reads video one frame at a time, upright, in square pixels, as R'G'B'."""

import functools
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from fractions import Fraction
from itertools import groupby, islice
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch.nn.functional as F
from torch import Tensor

from ..resume import hash_of
from ..windows.canvas import cut, region_of
from .color import Color
from .excerpt import WHOLE, Excerpt
from .form import Form
from .images import SUFFIXES, is_pattern, sequence_files, still_paths
from .survey import Header, Survey, survey
from .timing import Timing

if TYPE_CHECKING:
    from av import VideoFrame

# The deinterlacer compares a frame with the one before and the one after.
_NEIGHBOURS = 1


@dataclass(frozen=True, kw_only=True)
class VideoInfo:
    """The properties of a video's frames.

    frame_count: the exact number of decoded frames.
    fps: the rate if it is constant, else the average rate.
    timestamps: seconds, one for each frame; the first may be above 0 if sound begins earlier.
    width, height: as displayed: upright, in square pixels.
    has_alpha: whether some pixel is not opaque.
    bit_depth: bits of a component as stored.
    interlaced: whether some frame is marked as two fields.
    """

    frame_count: int
    fps: Fraction
    constant_rate: bool
    timestamps: tuple[float, ...]
    width: int
    height: int
    has_alpha: bool
    bit_depth: int
    interlaced: bool
    color: Color


class VideoSource:
    """A video, image sequence or still image; each iteration decodes it anew.

    Iteration yields frames (c h w) float32 in [0, 1], c = 4 with alpha (straight, last). It raises
    ValueError if the file cannot be read to its end.

    frames: the frames of the excerpt that make up this video. is_cut: whether the file may have
    others. timing: timestamps, from 0 if the video is cut. info: the frames' properties.
    """

    def __init__(
        self, path: Path, found: Survey, excerpt: Excerpt, frames: range, *, deinterlace: bool
    ) -> None:
        self.path = path
        self.frames = frames
        self.is_cut = excerpt.is_trimmed or len(frames) < len(found.frames)
        self.timing: Timing = found.timing
        if self.is_cut:
            self.timing = found.timing.cut(frames.start, frames.stop)
        self._survey = found
        self._excerpt = excerpt
        self._deinterlace = deinterlace and found.interlaced
        form = found.frames[0].form
        self._crop = excerpt.crop and region_of(excerpt.crop, *form.size)
        width, height = form.displayed(excerpt.crop[:2] if excerpt.crop else form.size)
        self.info = VideoInfo(
            frame_count=len(frames),
            fps=self.timing.fps,
            constant_rate=self.timing.constant_rate,
            timestamps=self.timing.timestamps,
            width=width,
            height=height,
            has_alpha=found.has_alpha,
            bit_depth=found.bit_depth,
            interlaced=found.interlaced,
            color=form.color,
        )

    @property
    def files(self) -> list[Path]:
        """The files that are read: the video, or the images of a sequence in order."""
        return list(self._survey.files)

    @functools.cached_property
    def digest(self) -> str:
        """A hash of the files' names and content."""
        return hash_of(self.files)

    @property
    def header(self) -> Header:
        """The container's description of the file."""
        return self._survey.header

    @property
    def stream_arguments(self) -> list[str]:
        """ffmpeg's arguments for reading the other streams from the first frame's time on.

        Empty for images, which have none.
        """
        if len(self.files) > 1 or self.path.suffix.lower() in SUFFIXES:
            return []
        begin = 0.0 if self._excerpt.is_trimmed else float(self.header.start)
        if self.is_cut:
            begin += self._survey.timing.timestamps[self.frames.start]
        can_seek = self.is_cut and not self.is_joined
        place = ["-ss", f"{begin:.6f}"] if can_seek else ["-itsoffset", f"{-begin:.6f}"]
        # Absolute times: versions of ffmpeg differ in where they take a file to begin.
        return ["-seek_timestamp", "1", *place, "-i", str(self.files[0])]

    @property
    def is_joined(self) -> bool:
        """True if the file's timestamps jump, as in recordings that were joined byte by byte."""
        return self._survey.is_joined

    def frames_at(self, numbers: list[int]) -> Iterator[Tensor]:
        """Yields frames by their ascending numbers; those of one key frame are decoded once."""
        start = self.frames.start
        for group in self._survey.by_key_frame([start + number for number in numbers]):
            wanted = set(group)
            span = range(group[0], group[-1] + 1)
            for number, frame in zip(span, self.cut(span), strict=True):
                if number in wanted:
                    yield frame

    def cut(self, frames: range) -> "VideoSource":
        """Returns a video of some of the excerpt's frames, without decoding the file again."""
        return VideoSource(
            self.path, self._survey, self._excerpt, frames, deinterlace=self._deinterlace
        )

    def __len__(self) -> int:
        return len(self.frames)

    def __iter__(self) -> Iterator[Tensor]:
        return self.every(1)

    def every(self, step: int) -> Iterator[Tensor]:
        """Yields the first and every `step`-th frame after it; others are decoded only."""
        lead = min(_NEIGHBOURS, self.frames.start) if self._deinterlace else 0
        first, count = self.frames.start - lead, 0
        with closing(self._survey.decode(first)) as decoded:
            if self._deinterlace:  # which needs neighbours
                chosen = islice(self._converted(decoded), lead, lead + len(self), step)
            else:
                chosen = self._converted(islice(decoded, 0, len(self), step))
            for frame in chosen:
                yield self._displayed(frame)
                count += 1
        if count < len(range(0, len(self), step)):
            raise ValueError(
                f"{self.path.name} could not be read to its end: check whether it has changed "
                "meanwhile"
            )

    def _converted(self, decoded: "Iterable[tuple[Form, VideoFrame]]") -> Iterator[Tensor]:
        for form, run in groupby(decoded, key=itemgetter(0)):
            frames = (frame for _, frame in run)
            yield from form.upright(
                frames, alpha=self.info.has_alpha, deinterlace=self._deinterlace
            )

    def _displayed(self, frame: Tensor) -> Tensor:
        if self._crop:
            frame = cut(frame, self._crop)
        size = (self.info.height, self.info.width)
        if frame.shape[1:] == size:
            return frame
        square = F.interpolate(
            frame[None], size, mode="bicubic", align_corners=False, antialias=True
        )
        return square[0] if self.info.color.transfer == "linear" else square[0].clamp(0, 1)


def open_video(
    path: str | Path,
    *,
    excerpt: Excerpt = WHOLE,
    frames: tuple[int, int | None] | None = None,
    deinterlace: Literal["auto", "off"] = "auto",
    hdr: bool = False,
) -> VideoSource:
    """Opens a video file, an image, a `%05d.png` pattern or a folder of numbered images.

    excerpt: the part of the file that is read, timed from 0 if it is trimmed. Frames before it are
        skipped by seeking.
    frames: (A, B) selects frames A..B-1 of the excerpt, timed from 0; B None selects all from A.
    deinterlace: "auto" deinterlaces frames that the file marks as two fields.
    hdr: whether PQ, HLG and linear light are read, as code values; linear light may exceed 1.

    The excerpt is decoded once to determine its exact frame count and timestamps. Raises ValueError
    for a file that cannot be restored because it is missing, empty, truncated or not a video, for
    HDR unless `hdr`, and for frames that the excerpt does not have.
    """
    path = Path(path).absolute()
    found = survey(path.name, _files(path), excerpt)
    kind = found.frames[0].form.color.hdr
    if kind and not hdr:
        raise ValueError(
            f"{path.name} is HDR ({kind}), which is only restored, not measured or learned from. "
            "Convert it first: ffmpeg -i INPUT -vf zscale=t=linear:npl=100,format=gbrpf32le,"
            "zscale=p=bt709,tonemap=hable,zscale=t=bt709:m=bt709:r=tv,format=yuv420p10le "
            "-c:v ffv1 -c:a copy SDR.mkv"
        )
    count = len(found.frames)
    start, stop = (0, count) if frames is None else (frames[0], frames[1])
    stop = count if stop is None else stop
    if not 0 <= start < stop <= count:
        raise ValueError(f"frames {start}:{stop} are not in {path.name}, which has 0:{count}")
    return VideoSource(path, found, excerpt, range(start, stop), deinterlace=deinterlace == "auto")


def open_stills(folder: str | Path, *, hdr: bool = False) -> list[VideoSource]:
    """Opens every image in a folder as a clip of one frame, in order of their names.

    hdr: see `open_video`.
    Raises ValueError for a folder without images, and for an image that cannot be read.
    """
    return [open_video(path, hdr=hdr) for path in still_paths(Path(folder).absolute())]


def _files(path: Path) -> list[Path]:
    """Returns the files to read: the images of a sequence, or the file itself after a check."""
    if path.is_dir() or (is_pattern(path.name) and not path.exists()):
        return sequence_files(path)
    try:
        with path.open("rb") as file:
            start = file.read(64)
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist: check the name") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    if not start:
        raise ValueError(f"{path.name} is empty (0 bytes): copy or record it again")
    stated = int.from_bytes(start[4:8], "little") if start[:4] == b"RIFF" else 0
    if path.stat().st_size < stated < 2**32 - 1:  # ffmpeg reads a truncated AVI without an error
        raise ValueError(f"{path.name} is truncated: copy it again")
    return [path]
