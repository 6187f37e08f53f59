"""Reads what a file states before a frame is decoded: streams, rotation, tags."""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass

from .ffmpeg import first_error, messages, running
from .planes import has_alpha

_LOG = logging.getLogger(__name__)
_STREAM = re.compile(r"\[info\]   Stream #0:(\d+)\S*: (\w+): (\w+)(.*)")
_ROTATION = re.compile(r"display ?matrix: rotation of (-?[\d.]+) degrees", re.IGNORECASE)
_INCOMPLETE = re.compile(r"moov atom not found|error reading header")


@dataclass(frozen=True)
class Stream:
    """A stream that is copied to the result.

    index: in the file. kind: Audio, Subtitle or Attachment. codec: in ffmpeg's name.
    """

    index: int
    kind: str
    codec: str


@dataclass(frozen=True)
class Header:
    """A file's description of itself, as ffmpeg prints it.

    arguments: ffmpeg's arguments for reading the file, up to and including -i and the name.
    video_stream: index of the stream that is restored. streams: those that are copied.
    tags: names of the file's metadata, in lower case.
    quarter_turns: how often ffmpeg turns a frame counter-clockwise to make it upright.
    may_be_transparent: whether the pixel format has alpha.
    """

    arguments: list[str]
    video_stream: int
    streams: list[Stream]
    tags: set[str]
    quarter_turns: int
    may_be_transparent: bool


def read_header(name: str, arguments: Sequence[str]) -> Header:
    """Reads the header of `ffmpeg <arguments>`.

    name: the file's name in messages. arguments: see `Header.arguments`. Raises ValueError if the
    file is not a video or its index is incomplete.
    """
    with running(arguments, log=None) as process:
        assert process.stderr is not None
        lines = list(messages(process.stderr))
    log = "\n".join(lines)
    streams = [match for line in lines if (match := _STREAM.match(line))]
    if not streams or "Input #0, tty" in log:  # ffmpeg reads text files as video of their letters
        if _INCOMPLETE.search(log) and "misdetection possible" not in log:
            raise ValueError(f"{name} is truncated: its index is incomplete. Copy it again")
        raise ValueError(f"{name} is not a video that ffmpeg can read ({first_error(lines)})")

    videos = [m for m in streams if m[2] == "Video" and not m[0].endswith("(attached pic)")]
    if not videos:
        kinds = ", ".join(sorted({match[2].lower() for match in streams}))
        raise ValueError(f"{name} has no video stream, only {kinds}: choose a video")
    if sum(match[2] == "Video" for match in streams) > 1:
        _LOG.warning("%s has further video streams or a cover, which are left out", name)

    arguments = list(arguments)
    _, _, codec, details = videos[0].groups()
    decoder = {"vp8": "libvpx", "vp9": "libvpx-vp9"}.get(codec)
    webm_alpha = decoder is not None and re.search(r"alpha_mode +: 1$", log, re.MULTILINE)
    if decoder and webm_alpha:
        # ffmpeg's own decoder ignores the alpha, which WebM stores beside the picture.
        arguments[-2:-2] = ["-c:v", decoder]
    rotation = _ROTATION.search(log)
    return Header(
        arguments=arguments,
        video_stream=int(videos[0][1]),
        streams=[
            Stream(int(match[1]), match[2], match[3])
            for match in streams
            if match[2] in ("Audio", "Subtitle", "Attachment")
        ],
        tags={
            tag.lower()
            for tag in re.findall(
                r"^\[info\]     (\S+) *: ", log.partition("  Duration: ")[0], re.M
            )
        },
        quarter_turns=round(float(rotation[1]) / 90) % 4 if rotation else 0,
        may_be_transparent=bool(webm_alpha) or any(map(has_alpha, re.findall(r"\w+", details))),
    )
