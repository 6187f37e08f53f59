"""Reads video one frame at a time, upright, in square pixels, as R'G'B'."""

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
from .ffmpeg import first_error, messages, running
from .header import Header
from .images import SUFFIXES, is_pattern, sequence_arguments, sequence_files, still_paths
from .probe import Probe, probe
from .timing import Timing


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

    def __init__(self, path: Path, probed: Probe, frames: range, *, deinterlace: bool) -> None:
        self.path = path
        self.frames = frames
        self.is_cut = probed.is_trimmed or len(frames) < len(probed.timing.timestamps)
        self.timing: Timing = probed.timing
        if self.is_cut:
            self.timing = probed.timing.cut(frames.start, frames.stop)
        self._probe = probed
        self._deinterlace = deinterlace and probed.interlaced
        self.info = VideoInfo(
            frame_count=len(frames),
            fps=self.timing.fps,
            constant_rate=self.timing.constant_rate,
            timestamps=self.timing.timestamps,
            width=probed.displayed_size[0],
            height=probed.displayed_size[1],
            has_alpha=probed.layout.alpha,
            bit_depth=probed.bit_depth,
            interlaced=probed.interlaced,
            color=probed.color,
        )

    @property
    def files(self) -> list[Path]:
        """The files that are read: the video, or the images of a sequence in order."""
        is_sequence = self.path.is_dir() or not self.path.exists()
        return sequence_files(self.path) if is_sequence else [self.path]

    @property
    def header(self) -> Header:
        """The file's description of itself, and ffmpeg's arguments for reading it."""
        return self._probe.header

    @property
    def stream_arguments(self) -> list[str]:
        """ffmpeg's arguments for reading the other streams from the first frame's time on."""
        if not self.is_cut:
            return self.header.arguments
        clock = ["-seek_timestamp", "1"] if self._probe.is_trimmed else []
        start = self._probe.timing.timestamps[self.frames.start]
        return [*clock, "-ss", f"{start:.6f}", *self.header.arguments]

    def cut(self, frames: range) -> "VideoSource":
        """Returns a video of some of the excerpt's frames, without decoding the file again."""
        return VideoSource(self.path, self._probe, frames, deinterlace=self._deinterlace)

    def __len__(self) -> int:
        return len(self.frames)

    def __iter__(self) -> Iterator[Tensor]:
        probed, layout = self._probe, self._probe.layout
        width, height = probed.stored_size
        span = "pc" if probed.color.full_range else "tv"
        filters = [f"scale=in_range={span}:out_range={span}", f"format={layout.name}"]
        if self.is_cut:
            start, stop = probed.lead + self.frames.start, probed.lead + self.frames.stop
            filters.insert(0, f"trim=start_frame={start}:end_frame={stop}")
        if self._deinterlace:  # before the cut, so that a preview uses the same neighbours
            filters.insert(0, "bwdif=mode=send_frame:deint=interlaced")
        output = ["-map", "0:V:0", "-fps_mode", "passthrough", "-vf", ",".join(filters)]
        command = [*probed.seek, *probed.header.arguments, *output, "-f", "rawvideo", "-"]
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
                        f"({first_error(messages(log))}): check whether it has changed meanwhile"
                    )
                planes = layout.unpack(data, width, height)
                yield self._displayed(rgb_from_planes(planes, layout, probed.color))

    def _displayed(self, frame: Tensor) -> Tensor:
        if self._probe.crop:
            frame = cut(frame, self._probe.crop)
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
    """Opens a video file, an image, a `%05d.png` pattern or a folder of numbered images.

    excerpt: the part of the file that is read, timed from 0 if it is trimmed. Frames before it are
        skipped by seeking.
    frames: (A, B) selects frames A..B-1 of the excerpt, timed from 0; B None selects all from A.
    deinterlace: "auto" deinterlaces frames that the file marks as two fields.

    The excerpt is decoded once to determine its exact frame count and timestamps. Raises ValueError
    for a file that cannot be restored because it is missing, empty, truncated, HDR or not a video,
    and for frames that the excerpt does not have.
    """
    path = Path(path).absolute()
    arguments, expected = _input(path)
    probed = probe(path.name, arguments, expected=expected, excerpt=excerpt)
    count = len(probed.timing.timestamps)
    start, stop = (0, count) if frames is None else (frames[0], frames[1])
    stop = count if stop is None else stop
    if not 0 <= start < stop <= count:
        raise ValueError(f"frames {start}:{stop} are not in {path.name}, which has 0:{count}")
    return VideoSource(path, probed, range(start, stop), deinterlace=deinterlace == "auto")


def open_stills(folder: str | Path) -> list[VideoSource]:
    """Opens every image in a folder as a clip of one frame, in order of their names.

    Raises ValueError for a folder without images, and for an image that cannot be read.
    """
    return [open_video(path) for path in still_paths(Path(folder).absolute())]


def _input(path: Path) -> tuple[list[str], int | None]:
    """Returns ffmpeg's input arguments, and the number of images of a sequence.

    path: absolute, so that ffmpeg cannot read a name as an option or protocol.
    """
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
    if path.stat().st_size < stated < 2**32 - 1:  # ffmpeg reads a truncated AVI without an error
        raise ValueError(f"{path.name} is truncated: copy it again")
    images = is_pattern(path.name) and path.suffix.lower() in SUFFIXES
    literal = ["-f", "image2", "-pattern_type", "none"] if images else []
    return [*literal, "-i", str(path)], None
