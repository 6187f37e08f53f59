"""Decodes the video stream of a file with PyAV, from its beginning or from a key frame."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from av import Packet, VideoFrame
    from av.container import InputContainer
    from av.video.stream import VideoStream

_MAY_JUMP = 0x0200  # libavformat's AVFMT_TS_DISCONT: timestamps may begin anew within a file


@contextmanager
def opened(path: Path) -> "Iterator[InputContainer]":
    """Opens a file; its name is taken literally. Raises av.FFmpegError for what is no video."""
    import av

    # Without the option, images named like "100%d.jpg" would be read as a sequence.
    with av.open(
        str(path), container_options={"pattern_type": "none"}, metadata_errors="replace"
    ) as file:
        yield file


def video_stream(file: "InputContainer") -> "VideoStream | None":
    """Returns the first video stream that is not a cover, None without one."""
    from av.stream import Disposition

    streams = [s for s in file.streams.video if not s.disposition & Disposition.attached_pic]
    return streams[0] if streams else None


@dataclass
class Findings:
    """Facts about a file that show while it is decoded.

    damage: a message for whatever could not be read or decoded. durations: of frames by timestamp,
    in the stream's unit, as the container states them. is_joined: whether timestamps jumped.
    """

    damage: list[str] = field(default_factory=list)
    durations: dict[int | None, int] = field(default_factory=dict)
    is_joined: bool = False


def decode(
    file: "InputContainer", seek: int | None, findings: Findings | None = None
) -> "Iterator[VideoFrame]":
    """Yields the frames of a file in the order in which they are shown.

    seek: timestamp in the stream's unit; decoding begins at a key frame before it if the file can
    be searched. None decodes from the beginning, with the timestamps that ffmpeg's command line
    gives to joined recordings. findings: is filled while frames are decoded.
    """
    import av
    from av import error as errors

    findings = findings or Findings()
    stream: Any = video_stream(file)
    decoder: Any = stream.codec_context
    tags = {name.lower(): value for name, value in stream.metadata.items()}
    library = {"vp8": "libvpx", "vp9": "libvpx-vp9"}.get(decoder.name)
    if library and tags.get("alpha_mode") == "1":  # WebM's alpha, which other decoders ignore
        decoder = av.CodecContext.create(library, "r")
    if seek is not None:
        try:
            file.seek(seek, stream=stream)
        except errors.FFmpegError:
            seek = None
    may_jump = bool(file.format.flags & _MAY_JUMP)
    clock, streams = None, [stream]
    if seek is None and may_jump:
        clock = _Clock()
        streams = [s for s in file.streams if s is stream or s.type in ("audio", "subtitle")]
    packets, packet, ended = file.demux(*streams), None, False
    while not ended:  # without a packet, the decoder yields the rest
        try:
            packet = next(packets, None)
        except errors.FFmpegError as error:
            findings.damage.append(str(error.strerror))
            packet = None
        ended = packet is None
        if packet is not None:
            if clock:
                findings.is_joined |= clock.correct(packet)
            if packet.stream_index != stream.index:
                continue
            findings.durations[packet.pts] = packet.duration or 0
            # Transport streams mark the packets at a joint so, which are not damaged.
            if packet.is_corrupt and not may_jump:
                findings.damage.append("partial file")
        try:
            yield from decoder.decode(packet)
        except errors.EOFError:
            return
        except errors.FFmpegError as error:
            findings.damage.append(str(error.strerror))


def filter_graph(frame: "VideoFrame", *filters: tuple[str, str]) -> Any:
    """Returns a chain of ffmpeg's filters (name, options) for frames of the format of `frame`."""
    from av.filter import Graph

    graph = Graph()
    source = graph.add_buffer(
        width=frame.width, height=frame.height, format=frame.format, time_base=Fraction(1, 25)
    )
    nodes = [graph.add(*node) for node in filters]
    graph.link_nodes(source, *nodes, graph.add("buffersink")).configure()
    return graph


def filtered(frames: "Iterable[VideoFrame]", *filters: tuple[str, str]) -> "Iterator[VideoFrame]":
    """Yields what a chain of filters makes of frames that have one format."""
    from av.error import BlockingIOError, EOFError

    graph = None
    for number, frame in enumerate(chain(frames, [None])):
        if frame is not None:
            graph = graph or filter_graph(frame, *filters)
            frame.pts, frame.time_base = number, Fraction(1, 25)
        if graph is not None:
            graph.vpush(frame)
            with suppress(BlockingIOError, EOFError):
                while True:
                    yield graph.vpull()


def time_of(frame: "VideoFrame") -> int | None:
    """Returns a frame's timestamp in the stream's unit; some files state only dts."""
    return frame.dts if frame.pts is None else frame.pts


@contextmanager
def captured_log() -> Iterator[list[tuple[int, str, str]]]:
    """Yields the level, source and text of what ffmpeg's libraries report in this thread.

    Level 16 is an error, a higher one is less. Frames must not be decoded in threads meanwhile
    (PyAV's default are slices, which do not overlap with Python).
    """
    from av import logging

    before = logging.get_level()
    logging.set_level(logging.INFO)
    try:
        with logging.Capture() as lines:
            yield lines
    finally:
        logging.set_level(before)


class _Clock:
    """Removes jumps of timestamps, as in transport streams that were joined byte by byte.

    Follows `ts_discontinuity_detect` in ffmpeg_demux.c of FFmpeg 7, so that frames stay with the
    sound that ffmpeg copies. Times are in microseconds.
    """

    def __init__(self) -> None:
        self._offset = 0
        self._last: int | None = None
        self._begins: dict[int, int] = {}  # by stream: where the last packet ended
        self._ends: dict[int, int] = {}  # by stream: where the next is expected

    def correct(self, packet: "Packet") -> bool:
        """Shifts the timestamps of the file's next packet; returns whether one has jumped."""
        if not packet.size:
            return self._offset != 0
        index, unit = packet.stream_index, Fraction(packet.time_base) * 1_000_000
        _shift(packet, self._offset, unit)
        if packet.stream.type == "subtitle" or packet.dts is None:
            return self._offset != 0
        dts = round(packet.dts * unit)
        end = self._ends.get(index, self._last)
        if end is not None:
            jumps = abs(dts - end) > 10_000_000
            if jumps or dts + 100_000 < self._begins.get(index, dts):
                self._offset -= dts - end
                _shift(packet, end - dts, unit)
        self._last = self._begins[index] = round(packet.dts * unit)
        self._ends[index] = self._last + round(_duration(packet) * 1_000_000)
        return self._offset != 0


def _duration(packet: "Packet") -> Fraction:
    context: Any = packet.stream.codec_context
    if packet.stream.type == "audio" and context and context.frame_size and context.sample_rate:
        return Fraction(context.frame_size, context.sample_rate)
    return (packet.duration or 0) * Fraction(packet.time_base)


def _shift(packet: "Packet", offset: int, unit: Fraction) -> None:
    ticks = round(offset / unit)
    if ticks and packet.dts is not None:
        packet.dts += ticks
    if ticks and packet.pts is not None:
        packet.pts += ticks
