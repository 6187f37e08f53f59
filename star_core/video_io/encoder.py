"""Runs ffmpeg as an encoder: timed frames through a pipe, other streams from the source's file."""

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from types import TracebackType

from .color import Color
from .encoding import Encoding, tag_filter
from .ffmpeg import first_error, messages, running
from .reader import VideoSource
from .survey import Stream
from .timed_frames import stream_header, timed_frame
from .timing import Timing

# The tags that MP4 and QuickTime store where every player reads them. Other tags need the form that
# allows any name, which players do not read and in which ffmpeg finds the date twice.
_COMMON_TAGS = {
    *("title", "artist", "album", "comment", "genre", "copyright", "date", "creation_time"),
    *("encoder", "major_brand", "minor_version", "compatible_brands"),
}


class Encoder:
    """A context manager that runs one ffmpeg process.

    arguments: see `encoder_arguments`. color, width, height: of the frames, in pixels. Entering,
    `write` and `finish` raise ValueError with ffmpeg's own message if it fails.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        encoding: Encoding,
        color: Color,
        width: int,
        height: int,
        timing: Timing,
    ) -> None:
        self._arguments = arguments
        self._is_timed = encoding.container != "image2"
        self._header = stream_header(encoding.layout, width, height, timing.fps, color)

    def __enter__(self) -> "Encoder":
        with ExitStack() as stack:
            self._log = stack.enter_context(tempfile.TemporaryFile())
            self._process = stack.enter_context(running(self._arguments, stdin=True, log=self._log))
            if self._is_timed:
                self._send(self._header)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def write(self, data: bytes, time: float, duration: float) -> None:
        """Encodes a frame.

        data: its planes. time, duration: in seconds, when it is shown after the first frame, and
        for how long. Raises ValueError if ffmpeg has stopped.
        """
        for part in timed_frame(data, time, duration) if self._is_timed else [data]:
            self._send(part)

    def finish(self) -> None:
        """Waits until everything is written; ValueError if ffmpeg reports a failure."""
        assert self._process.stdin is not None
        with suppress(OSError):
            self._process.stdin.close()
        if self._process.wait() != 0:
            raise self._failure()

    def _send(self, data: bytes) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(data)
        except OSError:  # the process has ended; its log says why
            self._process.wait()
            raise self._failure() from None

    def _failure(self) -> ValueError:
        self._log.seek(0)
        reason = first_error(messages(self._log))
        return ValueError(f"ffmpeg stopped with code {self._process.returncode}: {reason}")


def encoder_arguments(
    output: str,
    encoding: Encoding,
    color: Color,
    width: int,
    height: int,
    timing: Timing,
    source: VideoSource | None,
    streams: Sequence[Stream],
    *,
    seconds: float | None,
) -> list[str]:
    """Returns ffmpeg's arguments for timed frames on stdin and `streams` of the source's file.

    Images have no times and get plain frames. output: the path to write. color: tags of the frames.
    width, height: of the frames. source: None for a video of frames alone.
    seconds: the end of all streams, for an excerpt or a trial; None for no limit.
    """
    unit = timing.time_base
    first = ["-itsoffset", f"{timing.timestamps[0]:.6f}"]
    plain = ["-f", "rawvideo", "-pix_fmt", encoding.layout.name, "-s", f"{width}x{height}"]
    timed = [*first, "-f", "matroska"]
    arguments = ["-y", *(plain if encoding.container == "image2" else timed), "-i", "pipe:0"]
    mapped = ["-map", "0:v:0"]
    if source is not None and source.stream_arguments and encoding.container != "image2":
        arguments += source.stream_arguments
        if source.is_cut:
            mapped += ["-copypriorss", "0"]  # no packets from before the excerpt
        mapped += ["-map_metadata", "1", "-map_chapters", "1"]
        mapped += ["-map_metadata:s:0", f"1:s:{source.header.video_stream}"]
        for stale in ("BPS", "NUMBER_OF_BYTES", "NUMBER_OF_FRAMES", "alpha_mode"):
            mapped += ["-metadata:s:0", f"{stale}="]
        for place, stream in enumerate(streams, start=1):
            mapped += ["-map", f"1:{stream.index}", f"-map_metadata:s:{place}"]
            mapped += [f"1:s:{stream.index}", f"-c:{place}", _copy(stream, encoding)]
    if encoding.container in ("mp4", "mov"):
        flags = "faststart"  # the index first, so that players on the web can start at once
        if source is not None and source.header.tags - _COMMON_TAGS:
            flags += "+use_metadata_tags"
        mapped += ["-movflags", flags]
        mapped += ["-video_track_timescale", str(unit.denominator)]
    limit = [] if seconds is None else ["-t", f"{seconds:.6f}"]
    # ffmpeg finds the joints of recordings by all streams that are read, as this reader does.
    read_too = ["-map", "1:V:0", "-c", "copy", *limit, "-f", "null", "-"]
    return [
        *arguments,
        *mapped,
        *limit,
        *("-fps_mode", "passthrough", "-enc_time_base", f"{unit.numerator}/{unit.denominator}"),
        *("-vf", tag_filter(color), *encoding.arguments),
        *("-fflags", "+bitexact"),  # no random identifiers: equal frames give equal files
        *("-f", encoding.container, output),
        *(read_too if streams and source is not None and source.is_joined else []),
    ]


def _copy(stream: Stream, encoding: Encoding) -> str:
    # Matroska cannot store text subtitles in MP4's format, but it can store SRT.
    return "srt" if stream.codec == "mov_text" and encoding.container == "matroska" else "copy"
