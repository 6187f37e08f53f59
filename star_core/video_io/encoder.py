"""Runs ffmpeg as an encoder: timed frames through a pipe, other streams from the source's file."""

from collections.abc import Sequence

from .color import Color
from .encoding import Encoding, tag_filter
from .ffmpeg import FFmpeg
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


class Encoder(FFmpeg):
    """Encodes timed frames, with other streams of the source's file beside them.

    output: the path to write. color: tags of the frames. width, height: of the frames, in pixels.
    source: None for a video of frames alone. streams: of the source's file. seconds: the end of all
    streams, for an excerpt or a trial; None for no limit.
    """

    def __init__(
        self,
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
    ) -> None:
        size = (width, height)
        super().__init__(
            _arguments(output, encoding, color, size, timing, source, streams, seconds)
        )
        self._is_timed = encoding.container != "image2"
        self._header = stream_header(encoding.layout, width, height, timing.fps, color)

    def add(self, data: bytes, time: float, duration: float) -> None:
        """Encodes a frame.

        data: its planes. time, duration: in seconds, when it is shown after the first frame, and
        for how long. Raises ValueError with ffmpeg's own message if it has stopped.
        """
        parts = [self._header, *timed_frame(data, time, duration)] if self._is_timed else [data]
        for part in parts:
            self.write(part)
        self._header = b""


def _arguments(
    output: str,
    encoding: Encoding,
    color: Color,
    size: tuple[int, int],
    timing: Timing,
    source: VideoSource | None,
    streams: Sequence[Stream],
    seconds: float | None,
) -> list[str]:
    """Returns ffmpeg's arguments for timed frames on stdin and `streams` of the source's file.

    Images have no times and get plain frames. Arguments: see `Encoder`.
    """
    unit = timing.time_base
    first = ["-itsoffset", f"{timing.timestamps[0]:.6f}"]
    plain = ["-f", "rawvideo", "-pix_fmt", encoding.layout.name, "-s", "{}x{}".format(*size)]
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
