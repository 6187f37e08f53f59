"""Writes video while frames arrive; the file appears under its name once it is complete."""

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from .encoder import Encoder
from .encoding import Encoding, Rounding, choose_encoding, quantize, stored_color
from .reader import VideoSource
from .survey import Stream
from .targets import FileTarget, FramesTarget, open_target
from .timing import constant_timing

_LOG = logging.getLogger(__name__)
_ROUNDING = 1e-7  # of times in seconds


class VideoSink:
    """Encodes frames in order: `with open_sink(...) as sink: sink.write(frame)`.

    Leaving the block completes the file. An exception, including Ctrl-C, leaves no file behind.
    Arguments: see `open_sink`, which creates sinks.
    """

    def __init__(
        self,
        target: FileTarget | FramesTarget,
        encoding: Encoding,
        *,
        width: int,
        height: int,
        source: VideoSource | None,
        fps: Fraction,
        rounding: Rounding,
        dither_seed: int,
    ) -> None:
        self._target = target
        self._encoding = encoding
        self._size = (width, height)
        self._source = source
        self._timing = constant_timing(1, fps) if source is None else source.timing
        color = None if source is None else source.info.color
        self._color = stored_color(encoding, color, width, height)
        self._rounding: Rounding = rounding
        self._dither_seed = dither_seed
        self._streams = self._copied_streams()
        self._written = 0
        self._check_writable()

    def __enter__(self) -> "VideoSink":
        with ExitStack() as stack:
            stack.callback(self._target.discard)
            self._target.prepare()
            self._encoder = stack.enter_context(self._encode(self._streams, self._seconds()))
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._stack:
            if kind is None:
                expected = self._written if self._source is None else len(self._source)
                assert self._written == expected, f"{self._written} of {expected} frames written"
                self._encoder.finish()
                self._target.commit()

    @property
    def unfinished(self) -> Path:
        """The file or folder that gets the video's name when it is complete."""
        return self._target.temporary

    def write(self, frame: Tensor) -> None:
        """Appends a frame (c h w) in [0, 1], c = 3, or 4 if the sink has alpha.

        Raises ValueError if the frame is not finite or ffmpeg fails, for example on a full disk.
        """
        width, height = self._size
        channels = 4 if self._encoding.layout.alpha else 3
        assert frame.shape == (channels, height, width), tuple(frame.shape)
        if not torch.isfinite(frame).all():
            raise ValueError(f"frame {self._written} is not finite: compute in a wider dtype")
        index = self._written + (0 if self._source is None else self._source.frames.start)
        time, duration = self._interval()
        data = quantize(
            frame,
            self._encoding.layout,
            self._color.matrix,
            rounding=self._rounding,
            seed=self._dither_seed,
            index=index,
        )
        self._encoder.add(data, time, duration)
        self._written += 1

    def _interval(self) -> tuple[float, float]:
        """Returns when the next frame is shown, relative to the first, and for how long."""
        if self._source is None:
            return float(self._written / self._timing.fps), float(1 / self._timing.fps)
        ends = (*self._timing.timestamps[self._written + 1 : self._written + 2], self._timing.end)
        time = self._timing.timestamps[self._written]
        return time - self._timing.timestamps[0], ends[0] - time

    def _seconds(self) -> float | None:
        """Returns the time at which all streams of a cut video end, None for the whole file."""
        return self._timing.end if self._source is not None and self._source.is_cut else None

    def _copied_streams(self) -> list[Stream]:
        if self._source is None:
            return []
        streams = list(self._source.header.streams)
        if self._encoding.container == "image2":
            if streams:
                _LOG.warning("%s: images have no sound or subtitles", self._target.path.name)
            return []
        if self._encoding.container == "matroska":
            return streams
        # Fonts and other attachments belong to subtitles that only Matroska can store.
        return [stream for stream in streams if stream.kind != "Attachment"]

    def _encode(self, streams: Sequence[Stream], seconds: float | None) -> Encoder:
        return Encoder(
            self._target.output,
            self._encoding,
            self._color,
            *self._size,
            self._timing,
            self._source,
            streams,
            seconds=seconds,
        )

    def _check_writable(self) -> None:
        """Writes one black frame as a trial, so that hours of work do not end in an error."""
        error = self._trial(self._streams)
        if error is None:
            return
        unsupported = [stream for stream in self._streams if self._trial([stream]) is not None]
        if not unsupported or self._trial([]) is not None:
            raise ValueError(f"{self._target.path.name} cannot be written: {error}")
        assert self._source is not None
        names = ", ".join(f"{s.kind.lower()} stream {s.index} ({s.codec})" for s in unsupported)
        remedy = "write .mkv instead"
        if self._encoding.container == "matroska":
            left_out = " ".join(f"-map -0:{stream.index}" for stream in unsupported)
            remedy = f"leave it out first: ffmpeg -i INPUT -map 0 {left_out} -c copy OUTPUT"
        raise ValueError(
            f"{self._target.path.name} cannot carry {names} of {self._source.path.name}: {remedy}"
        )

    def _trial(self, streams: Sequence[Stream]) -> str | None:
        """Writes one frame with these streams and deletes it; returns the error, if any."""
        self._target.prepare()
        try:
            with self._encode(streams, self._timing.timestamps[0] + 0.02) as encoder:
                size = self._encoding.layout.frame_bytes(*self._size)
                encoder.add(bytes(size), 0, 0.01)
                encoder.finish()
        except ValueError as error:
            return str(error)
        finally:
            self._target.discard()
        return None


def open_sink(
    path: str | Path,
    *,
    width: int,
    height: int,
    source: VideoSource | None = None,
    fps: Fraction | None = None,
    codec: str | None = None,
    overwrite: bool = False,
    alpha: bool = False,
    rounding: Rounding = "round",
    dither_seed: int = 0,
    scratch: Path | None = None,
) -> VideoSink:
    """Opens a video for writing, in a format that depends on the extension of `path`.

    .mkv: FFV1, lossless, RGB of the source's depth. .mp4: CRF 16 4:2:0 (4:4:4 if a side is odd),
    H.264 for a source of 8 bit, else H.265 of 10 bit, or as codec says. .mov: ProRes 422 HQ, 4444
    with alpha. .webm: VP9 CRF 8 of 8 or 10 bit with frequent key frames. A folder or `%05d.png`:
    PNG of 8 or 16 bit. `%05d.exr`: OpenEXR, for linear light, which nothing else holds.

    width, height: of the frames. alpha: whether they have a fourth channel.
    source: provides timestamps, colour tags, sound, subtitles, chapters and metadata; exactly its
        number of frames must be written. fps: the rate if there is no source.
    rounding: to 8 bit, "truncate" as the reference does. dither_seed: see `quantize`. scratch:
        the folder of the unfinished file, see `open_target`.

    Raises ValueError before the first frame for an unknown extension, an existing file without
    `overwrite`, an unwritable folder, and streams that the container cannot store.
    """
    path = Path(path).absolute()
    target = open_target(path, overwrite=overwrite, scratch=scratch)
    encoding = choose_encoding(
        target.path,
        codec=codec,
        alpha=alpha,
        bits=source.info.bit_depth if source else 8,
        hdr=source.info.color.hdr if source else None,
        width=width,
        height=height,
    )
    if isinstance(target, FramesTarget) and target.single and (source is None or len(source) > 1):
        raise ValueError(f"{path.name} holds one frame: write a folder or %05d.png")
    if source is not None and encoding.container in ("matroska", "webm"):
        times = (*source.timing.timestamps, source.timing.end)
        if (least := min(b - a for a, b in pairwise(times))) < 0.001 - _ROUNDING:
            raise ValueError(
                f"{path.name}: frames of {source.path.name} are {1000 * least:.3g} ms apart, and "
                f"{path.suffix} stores whole ms: write .mp4 or .mov"
            )
    assert (source is None) != (fps is None), "timing comes from a source or from fps"
    return VideoSink(
        target,
        encoding,
        width=width,
        height=height,
        source=source,
        fps=fps or Fraction(25),
        rounding=rounding,
        dither_seed=dither_seed,
    )
