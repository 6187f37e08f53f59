"""What a file says about itself before a frame is decoded: streams, rotation, tags."""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass

from .ffmpeg import complaint, messages, running
from .planes import has_alpha

_LOG = logging.getLogger(__name__)
_STREAM = re.compile(r"\[info\]   Stream #0:(\d+)\S*: (\w+): (\w+)(.*)")
_ROTATION = re.compile(r"display ?matrix: rotation of (-?[\d.]+) degrees", re.IGNORECASE)
_INCOMPLETE = re.compile(r"moov atom not found|error reading header")


@dataclass(frozen=True)
class Stream:
    """A stream that is carried along: Audio, Subtitle or Attachment, and its codec."""

    index: int
    kind: str
    codec: str


@dataclass(frozen=True)
class Header:
    """The description that ffmpeg prints of a file.

    arguments: ffmpeg's for reading it, up to and including -i and the name.
    video_stream: index of the one that is restored.
    tags: names of the file's metadata, in lower case.
    quarter_turns: how often ffmpeg turns a frame counter-clockwise to set it upright.
    may_be_transparent: the pixel format has alpha.
    """

    arguments: list[str]
    video_stream: int
    streams: list[Stream]
    tags: set[str]
    quarter_turns: int
    may_be_transparent: bool


def read_header(name: str, arguments: Sequence[str]) -> Header:
    """ValueError where it is no video, or its beginning is not complete."""
    with running(arguments, log=None) as process:
        assert process.stderr is not None
        lines = list(messages(process.stderr))
    log = "\n".join(lines)
    found = [match for line in lines if (match := _STREAM.match(line))]
    if not found or "Input #0, tty" in log:  # text is a film of its letters to ffmpeg
        if _INCOMPLETE.search(log) and "misdetection possible" not in log:
            raise ValueError(f"{name} is truncated: its index is not complete. Copy it again")
        raise ValueError(f"{name} is not a video that ffmpeg can read ({complaint(lines)})")

    videos = [m for m in found if m[2] == "Video" and not m[0].endswith("(attached pic)")]
    if not videos:
        kinds = ", ".join(sorted({match[2].lower() for match in found}))
        raise ValueError(f"{name} has no video stream, only {kinds}: choose a video")
    if sum(match[2] == "Video" for match in found) > 1:
        _LOG.warning("%s has further video streams or a cover; they are left out", name)

    arguments = list(arguments)
    _, _, codec, details = videos[0].groups()
    decoder = {"vp8": "libvpx", "vp9": "libvpx-vp9"}.get(codec)
    webm_alpha = decoder is not None and re.search(r"alpha_mode +: 1$", log, re.MULTILINE)
    if decoder and webm_alpha:
        # ffmpeg's own decoder leaves out the alpha that WebM keeps beside the picture.
        arguments[-2:-2] = ["-c:v", decoder]
    rotation = _ROTATION.search(log)
    return Header(
        arguments=arguments,
        video_stream=int(videos[0][1]),
        streams=[
            Stream(int(match[1]), match[2], match[3])
            for match in found
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
