"""A running encoder: timed frames come through a pipe, sound and the rest from the source."""

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from types import TracebackType

from .color import Color
from .encoding import Encoding, tag_filter
from .ffmpeg import complaint, messages, running
from .header import Stream
from .reader import VideoSource
from .timed_frames import stream_header, timed_frame
from .timing import Timing

# What MP4 and QuickTime store where every player looks. Others need the form that takes any name,
# in which players find none of them, and ffmpeg the date twice.
_COMMON_TAGS = {
    *("title", "artist", "album", "comment", "genre", "copyright", "date", "creation_time"),
    *("encoder", "major_brand", "minor_version", "compatible_brands"),
}


class Encoder:
    """Context manager around one ffmpeg. ValueError with ffmpeg's own words where it fails."""

    def __init__(
        self, arguments: Sequence[str], encoding: Encoding, width: int, height: int, timing: Timing
    ) -> None:
        self._arguments = arguments
        self._header = stream_header(encoding.layout, width, height, timing.fps)

    def __enter__(self) -> "Encoder":
        with ExitStack() as stack:
            self._log = stack.enter_context(tempfile.TemporaryFile())
            self._process = stack.enter_context(running(self._arguments, stdin=True, log=self._log))
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
        """Encode a frame, shown `time` after the first and for `duration`, in seconds."""
        for part in timed_frame(data, time, duration):
            self._send(part)

    def finish(self) -> None:
        """Wait until everything is written."""
        assert self._process.stdin is not None
        with suppress(OSError):
            self._process.stdin.close()
        if self._process.wait() != 0:
            raise self._failure()

    def _send(self, data: bytes) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(data)
        except OSError:  # it has gone; its log says why
            self._process.wait()
            raise self._failure() from None

    def _failure(self) -> ValueError:
        self._log.seek(0)
        reason = complaint(messages(self._log))
        return ValueError(f"ffmpeg stopped with code {self._process.returncode}: {reason}")


def encoder_arguments(
    output: str,
    encoding: Encoding,
    color: Color,
    timing: Timing,
    source: VideoSource | None,
    streams: Sequence[Stream],
    *,
    seconds: float | None,
) -> list[str]:
    """ffmpeg's arguments for timed frames on stdin and `streams` from the source's file.

    seconds: end of everything, for a cut or a trial.
    """
    unit = timing.time_base
    first = ["-itsoffset", f"{timing.timestamps[0]:.6f}"]
    arguments = ["-y", *first, "-f", "matroska", "-i", "pipe:0"]
    carried = ["-map", "0:v:0"]
    if source is not None and encoding.container != "image2":
        arguments += source.beside
        if source.is_cut:
            carried += ["-copypriorss", "0"]  # nothing from before the cut
        carried += ["-map_metadata", "1", "-map_chapters", "1"]
        carried += ["-map_metadata:s:0", f"1:s:{source.header.video_stream}"]
        for stale in ("BPS", "NUMBER_OF_BYTES", "NUMBER_OF_FRAMES", "alpha_mode"):
            carried += ["-metadata:s:0", f"{stale}="]
        for place, stream in enumerate(streams, start=1):
            carried += ["-map", f"1:{stream.index}", f"-map_metadata:s:{place}"]
            carried += [f"1:s:{stream.index}", f"-c:{place}", _copy(stream, encoding)]
    if encoding.container in ("mp4", "mov"):
        flags = "faststart"  # the index first, for the web
        if source is not None and source.header.tags - _COMMON_TAGS:
            flags += "+use_metadata_tags"
        carried += ["-movflags", flags]
        carried += ["-video_track_timescale", str(unit.denominator)]
    if seconds is not None:
        carried += ["-t", f"{seconds:.6f}"]
    return [
        *arguments,
        *carried,
        *("-fps_mode", "passthrough", "-enc_time_base", f"{unit.numerator}/{unit.denominator}"),
        *("-vf", tag_filter(color), *encoding.arguments),
        *("-fflags", "+bitexact"),  # no random identifiers: the same frames give the same file
        *("-f", encoding.container, output),
    ]


def _copy(stream: Stream, encoding: Encoding) -> str:
    # The text of MP4 subtitles has no place in Matroska in that form; as SRT it has.
    return "srt" if stream.codec == "mov_text" and encoding.container == "matroska" else "copy"
