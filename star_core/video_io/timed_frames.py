"""Writes raw frames with timestamps to a pipe, in the smallest form of Matroska that ffmpeg reads.

Plain raw video has at most a frame rate, which loses the timing of variable-rate sources.
Elements: RFC 9559; uncompressed video and its format codes as in ffmpeg's `raw.c`.
"""

import struct
from collections.abc import Iterator
from fractions import Fraction

from .color import Color
from .planes import PlanarFormat

_UNKNOWN_SIZE = b"\x01" + b"\xff" * 7


def stream_header(
    layout: PlanarFormat, width: int, height: int, fps: Fraction, color: Color
) -> bytes:
    """Returns the bytes that begin a stream of frames.

    layout, width, height: the frames' format and size. fps: a hint for encoders; the frames'
    timestamps do not depend on it. color: its HDR metadata is stored; its tags are not.
    """
    ebml = _element(
        0x1A45DFA3,
        _number(0x42F2, 4) + _number(0x42F3, 8) + _element(0x4282, b"matroska"),
    )
    info = _element(0x1549A966, _number(0x2AD7B1, 1))  # timestamps count nanoseconds
    size = _number(0xB0, width) + _number(0xBA, height)
    video = _element(0xE0, size + _element(0x2EB524, _fourcc(layout)) + _hdr_metadata(color))
    identity = _number(0xD7, 1) + _number(0x73C5, 1) + _number(0x83, 1)
    frame_duration = _number(0x23E383, round(10**9 / fps))
    track = identity + frame_duration + _element(0x86, b"V_UNCOMPRESSED") + video
    segment = _id(0x18538067) + _UNKNOWN_SIZE
    return ebml + segment + info + _element(0x1654AE6B, _element(0xAE, track))


def timed_frame(data: bytes, time: float, duration: float) -> Iterator[bytes]:
    """Yields the bytes of one frame, as a cluster of its own.

    data: the frame's planes. time, duration: in seconds, when it is shown and for how long.
    """
    length = _number(0x9B, round(duration * 10**9))
    block_header = b"\x81\x00\x00\x00"  # track 1, no offset to the cluster's time, no flags
    block_size = len(block_header) + len(data)
    block = _id(0xA1) + _size(block_size) + block_header
    group = _id(0xA0) + _size(len(length) + len(block) + len(data)) + length + block
    timestamp = _number(0xE7, round(time * 10**9))
    yield _id(0x1F43B675) + _size(len(timestamp) + len(group) + len(data)) + timestamp + group
    yield data


def _hdr_metadata(color: Color) -> bytes:
    content = b""
    if color.light_level:
        content += b"".join(map(_number, (0x55BC, 0x55BD), color.light_level))
    if color.mastering:
        elements = (*range(0x55D1, 0x55D9), 0x55DA, 0x55D9)
        floats = [struct.pack(">d", value) for value in color.mastering]
        content += _element(0x55D0, b"".join(map(_element, elements, floats)))
    return _element(0x55B0, content) if content else b""


def _fourcc(layout: PlanarFormat) -> bytes:
    if layout.family == "yuv" and layout.bits == 8:
        return {(2, 2): b"I420", (1, 1): b"444P"}[layout.subsampling]
    if layout.family == "rgb":
        kind, chroma = b"G4" if layout.alpha else b"G3", 0
    else:
        kind = b"Y4" if layout.alpha else b"Y3"
        chroma = {(2, 2): 11, (2, 1): 10, (1, 1): 0}[layout.subsampling]
    return kind + bytes([chroma, layout.bits])


def _id(number: int) -> bytes:
    return number.to_bytes((number.bit_length() + 7) // 8, "big")


def _size(number: int) -> bytes:
    return (number | 1 << 56).to_bytes(8, "big")


def _element(number: int, content: bytes) -> bytes:
    return _id(number) + _size(len(content)) + content


def _number(number: int, value: int) -> bytes:
    return _element(number, value.to_bytes(8, "big"))
