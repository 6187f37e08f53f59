"""Video in: frames one at a time, upright, in square pixels, as R'G'B'."""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from ..windows.canvas import cut
from .color import Color, rgb_from_planes
from .excerpt import WHOLE, Excerpt
from .ffmpeg import complaint, messages, running
from .header import Header
from .images import SUFFIXES, is_pattern, sequence_arguments, still_paths
from .probe import Probe, probe
from .timing import Timing


@dataclass(frozen=True, kw_only=True)
class VideoInfo:
    """What the frames of a source are like.

    frame_count: exact, every decoded frame once.
    fps: the constant rate, else the average rate.
    timestamps: seconds, one for each frame; the first may be above 0 where sound begins earlier.
    width, height: as displayed: turned upright, in square pixels.
    has_alpha: some pixel is not opaque.
    bit_depth: bits of a component as stored.
    interlaced: some frame is marked as two fields.
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
    """A video, image sequence or still; each iteration decodes anew.

    Yields (c h w) float32 in [0, 1], c = 4 with alpha (straight, last). frames: of the excerpt that
    the video is. is_cut: they are not all that the file has.
    """

    def __init__(self, path: Path, found: Probe, frames: range, *, deinterlace: bool) -> None:
        self.path = path
        self.frames = frames
        self.is_cut = found.is_trimmed or len(frames) < len(found.timing.timestamps)
        self.timing: Timing = found.timing
        if self.is_cut:
            self.timing = found.timing.cut(frames.start, frames.stop)
        self._found = found
        self._deinterlace = deinterlace and found.interlaced
        self.info = VideoInfo(
            frame_count=len(frames),
            fps=self.timing.fps,
            constant_rate=self.timing.constant_rate,
            timestamps=self.timing.timestamps,
            width=found.displayed_size[0],
            height=found.displayed_size[1],
            has_alpha=found.layout.alpha,
            bit_depth=found.bit_depth,
            interlaced=found.interlaced,
            color=found.color,
        )

    @property
    def header(self) -> Header:
        """What the file says about itself, and how ffmpeg reads it."""
        return self._found.header

    @property
    def beside(self) -> list[str]:
        """ffmpeg's arguments for what lies beside the picture, from the first frame on."""
        if not self.is_cut:
            return self.header.arguments
        clock = ["-seek_timestamp", "1"] if self._found.is_trimmed else []
        start = self._found.timing.timestamps[self.frames.start]
        return [*clock, "-ss", f"{start:.6f}", *self.header.arguments]

    def cut(self, frames: range) -> "VideoSource":
        """Some of the excerpt's frames, as `open_video` gives them, without looking at it again."""
        return VideoSource(self.path, self._found, frames, deinterlace=self._deinterlace)

    def __len__(self) -> int:
        return len(self.frames)

    def __iter__(self) -> Iterator[Tensor]:
        found, layout = self._found, self._found.layout
        width, height = found.stored_size
        span = "pc" if found.color.full_range else "tv"
        filters = [f"scale=in_range={span}:out_range={span}", f"format={layout.name}"]
        if self.is_cut:
            start, stop = found.lead + self.frames.start, found.lead + self.frames.stop
            filters.insert(0, f"trim=start_frame={start}:end_frame={stop}")
        if self._deinterlace:  # before the cut, so that a preview sees the same neighbours
            filters.insert(0, "bwdif=mode=send_frame:deint=interlaced")
        output = ["-map", "0:V:0", "-fps_mode", "passthrough", "-vf", ",".join(filters)]
        command = [*found.seek, *found.header.arguments, *output, "-f", "rawvideo", "-"]
        with (
            tempfile.TemporaryFile() as log,
            running(command, stdout=True, log=log) as process,
        ):
            assert process.stdout is not None
            for _ in self.frames:
                data = process.stdout.read(layout.frame_bytes(width, height))
                if len(data) < layout.frame_bytes(width, height):
                    process.wait()
                    log.seek(0)
                    raise ValueError(
                        f"{self.path.name} could not be read to its end "
                        f"({complaint(messages(log))}); was it changed meanwhile?"
                    )
                planes = layout.unpack(data, width, height)
                yield self._displayed(rgb_from_planes(planes, layout, found.color))

    def _displayed(self, frame: Tensor) -> Tensor:
        if self._found.crop:
            frame = cut(frame, self._found.crop)
        size = (self.info.height, self.info.width)
        if frame.shape[1:] == size:
            return frame
        square = F.interpolate(
            frame[None], size, mode="bicubic", align_corners=False, antialias=True
        )
        return square[0].clamp(0, 1)


def open_video(
    path: str | Path,
    *,
    excerpt: Excerpt = WHOLE,
    frames: tuple[int, int | None] | None = None,
    deinterlace: Literal["auto", "off"] = "auto",
) -> VideoSource:
    """Open a video file, an image, a `%05d.png` pattern or a folder of numbered images.

    excerpt: the part of the file that is the video, timed from 0 where it is trimmed; what lies
        before is sought, not decoded.
    frames: (A, B) takes frames A..B-1 of it, timed from 0; B None takes all from A.
    deinterlace: "auto" makes whole frames of those that the file marks as two fields.

    Decodes the excerpt once to find its exact frame count and timestamps. Raises ValueError for
    whatever keeps it from being restored: missing, empty, truncated, no video, HDR.
    """
    path = Path(path).absolute()
    arguments, expected = _input(path)
    found = probe(path.name, arguments, expected=expected, excerpt=excerpt)
    count = len(found.timing.timestamps)
    start, stop = (0, count) if frames is None else (frames[0], frames[1])
    stop = count if stop is None else stop
    if not 0 <= start < stop <= count:
        raise ValueError(f"frames {start}:{stop} are not in {path.name}, which has 0:{count}")
    return VideoSource(path, found, range(start, stop), deinterlace=deinterlace == "auto")


def open_stills(folder: str | Path) -> list[VideoSource]:
    """Open every image in a folder as a clip of its own, in order of their names."""
    return [open_video(path) for path in still_paths(Path(folder).absolute())]


def _input(path: Path) -> tuple[list[str], int | None]:
    """ffmpeg's input arguments. Absolute, so that no name is taken for an option or protocol."""
    if path.is_dir() or (is_pattern(path.name) and not path.exists()):
        return sequence_arguments(path)
    try:
        with path.open("rb") as file:
            start = file.read(12)
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist: check the name") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    if not start:
        raise ValueError(f"{path.name} is empty (0 bytes): copy or record it again")
    stated = int.from_bytes(start[4:8], "little") if start[:4] == b"RIFF" else 0
    if path.stat().st_size < stated < 2**32 - 1:  # ffmpeg plays a cut AVI without a word
        raise ValueError(f"{path.name} is truncated: copy it again")
    images = is_pattern(path.name) and path.suffix.lower() in SUFFIXES
    literal = ["-f", "image2", "-pattern_type", "none"] if images else []
    return [*literal, "-i", str(path)], None
