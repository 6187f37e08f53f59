"""What a file holds, found by decoding it once: ffmpeg's own report of every frame.

Containers state frame counts, rates and durations that need not be true, so none of them is used.
"""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction

from .color import (
    HDR_TRANSFERS,
    MATRICES,
    SITINGS,
    Color,
    matrix_by_size,
    primaries_by_size,
    turned_siting,
)
from .ffmpeg import complaint, messages, running
from .planes import PlanarFormat, has_alpha, planar_format
from .timing import Timing, timing

_LOG = logging.getLogger(__name__)
_STREAM = re.compile(r"\[info\]   Stream #0:(\d+)\S*: (\w+): (\w+)(.*)")
_SHOWINFO = r"\[[^]]*showinfo[^]]*\] \[info\] "
_FRAME = re.compile(
    _SHOWINFO + r"n: *\d+ pts: *(\S+) pts_time:\S+ *(?:duration: *(\S+))?.* fmt:(\w+)"
    r"(?: cl:(\w+))? sar:(\d+)/(\d+) s:(\d+)x(\d+) i:(\w)"
)
_COLOR = re.compile(
    _SHOWINFO + r"color_range:(\S+) color_space:(\S+) color_primaries:(\S+) color_trc:(\S+)"
)
_CLOCK = re.compile(_SHOWINFO + r"config in time_base: (\d+)/(\d+), frame_rate: (\d+)/(\d+)")
_ROTATION = re.compile(r"display ?matrix: rotation of (-?[\d.]+) degrees", re.IGNORECASE)
_ALPHA_MINIMUM = re.compile(r"lavfi\.signalstats\.YMIN=(\d+)")
_UNTAGGED = ("unknown", "unspecified", "reserved")
_CUT_INDEX = re.compile(r"moov atom not found|error reading header")
_CUT_OFF = re.compile(
    r"File ended prematurely|partial file|mov.*corrupt input packet|EOI missing|LZW decode failed"
)


@dataclass(frozen=True)
class Stream:
    """A stream that is carried along: Audio, Subtitle or Attachment, and its codec."""

    index: int
    kind: str
    codec: str


@dataclass
class Report:
    """What the decoding pass found. Size, rotation applied, in stored (not square) pixels."""

    clock: tuple[int, int, int, int] = (1, 25, 25, 1)
    times: list[tuple[int | None, int]] = field(default_factory=list)  # pts and duration
    size: tuple[int, int] = (0, 0)
    aspect: Fraction = Fraction(1)
    pixel_format: str = ""
    siting: str = ""
    tags: list[str] = field(default_factory=list)  # range, matrix, primaries, transfer
    interlaced: bool = False
    transparent: bool = False
    errors: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Probe:
    """A decodable video: how its frames are to be read, and what lies beside them."""

    arguments: list[str]  # ffmpeg's, up to and including -i
    video_stream: int
    streams: list[Stream]
    layout: PlanarFormat
    stored_size: tuple[int, int]
    displayed_size: tuple[int, int]
    color: Color
    bit_depth: int
    interlaced: bool
    timing: Timing


def probe(name: str, arguments: Sequence[str], *, expected: int | None = None) -> Probe:
    """Decode `ffmpeg <arguments>` once. `expected`: the frame count of an image sequence.

    Raises ValueError where it is no video, cannot be decoded to its end, is HDR, or changes size.
    """
    header = _header(arguments)
    video, streams = _streams(name, header)
    arguments = list(arguments)
    may_be_transparent = any(map(has_alpha, re.findall(r"\w+", video[4])))
    decoder = {"vp8": "libvpx", "vp9": "libvpx-vp9"}.get(video[3])
    if decoder and any(re.search(r"alpha_mode +: 1$", line) for line in header):
        # ffmpeg's own decoder leaves out the alpha that WebM keeps beside the picture.
        arguments[-2:-2] = ["-c:v", decoder]
        may_be_transparent = True
    report = _decode(name, arguments, alpha=may_be_transparent)
    if not report.times:
        reason = complaint(report.errors)
        raise ValueError(f"{name} is truncated or damaged: no frame can be decoded ({reason})")
    if any(_CUT_OFF.search(line) for line in report.errors):
        raise ValueError(
            f"{name} is truncated: it breaks off in frame {len(report.times)}. Copy it again, "
            f"or keep what there is: ffmpeg -i INPUT -c:v ffv1 -c:a copy OUTPUT.mkv"
        )
    if expected is not None and len(report.times) != expected:
        raise ValueError(
            f"{name}: {len(report.times)} of {expected} images can be decoded "
            f"({complaint(report.errors)}); replace the damaged ones"
        )
    if any("[error]" in line for line in report.errors):
        _LOG.warning("%s is damaged; ffmpeg conceals it: %s", name, complaint(report.errors))

    quarters = _quarter_turns(header)
    color = _color(name, report, quarters)
    bit_depth = planar_format(report.pixel_format, alpha=False).bits
    return Probe(
        arguments=arguments,
        video_stream=int(video[1]),
        streams=streams,
        layout=planar_format(report.pixel_format, alpha=report.transparent),
        stored_size=report.size,
        displayed_size=_displayed(report.size, report.aspect, turned=quarters % 2 == 1),
        color=color,
        bit_depth=bit_depth,
        interlaced=report.interlaced,
        timing=timing(name, report.times, report.clock),
    )


def _header(arguments: Sequence[str]) -> list[str]:
    with running(arguments, log=None) as process:
        assert process.stderr is not None
        return list(messages(process.stderr))


def _streams(name: str, header: list[str]) -> tuple[re.Match[str], list[Stream]]:
    found = [match for line in header if (match := _STREAM.match(line))]
    log = "\n".join(header)
    if not found or "Input #0, tty" in log:  # text is a film of its letters to ffmpeg
        if _CUT_INDEX.search(log) and "misdetection possible" not in log:
            raise ValueError(
                f"{name} is truncated: its index, written last, is not complete. Copy it again"
            )
        raise ValueError(f"{name} is not a video that ffmpeg can read ({complaint(header)})")
    videos = [m for m in found if m[2] == "Video" and not m[0].endswith("(attached pic)")]
    if not videos:
        kinds = ", ".join(sorted({match[2].lower() for match in found}))
        raise ValueError(f"{name} has no video stream, only {kinds}: choose a video")
    if sum(match[2] == "Video" for match in found) > 1:
        _LOG.warning("%s has further video streams or a cover; they are left out", name)
    carried = [
        Stream(int(m[1]), m[2], m[3]) for m in found if m[2] in ("Audio", "Subtitle", "Attachment")
    ]
    return videos[0], carried


def _decode(name: str, arguments: list[str], *, alpha: bool) -> Report:
    filters = "showinfo=checksum=0"
    if alpha:
        # A format with alpha says little: most files never use it.
        filters += ",alphaextract,format=gray,signalstats,metadata=print:key=lavfi.signalstats.YMIN"
    filters += ",setpts=N/TB"  # the times are noted by now; close ones would upset the null muxer
    output = ["-map", "0:V:0", "-fps_mode", "passthrough", "-vf", filters, "-f", "null", "-"]
    report = Report()
    with running([*arguments, *output], log=None) as process:
        assert process.stderr is not None
        for line in messages(process.stderr):
            _note(name, line, report)
        process.wait()
    return report


def _note(name: str, line: str, report: Report) -> None:
    if match := _FRAME.match(line):
        pts, duration, pixel_format, siting, across, down, width, height, scan = match.groups()
        if not report.times:
            report.size = int(width), int(height)
            report.aspect = Fraction(int(across) or 1, int(down)) if int(across) else Fraction(1)
            report.pixel_format = pixel_format
            report.siting = siting or ""
        elif report.size != (int(width), int(height)):
            stored = "x".join(map(str, report.size))
            raise ValueError(
                f"{name} changes its frame size from {stored} to {width}x{height} at frame "
                f"{len(report.times)}: cut it there, or treat a folder of images as stills"
            )
        report.times.append(
            (
                int(pts) if pts.lstrip("-").isdigit() else None,
                int(duration) if (duration or "").isdigit() else 0,
            )
        )
        report.interlaced |= scan in "TB"
    elif (match := _COLOR.match(line)) and len(report.times) == 1:
        report.tags = list(match.groups())
        if (hdr := HDR_TRANSFERS.get(match[4])) is not None:
            raise ValueError(
                f"{name} is HDR ({hdr}), which this model does not know. Convert it first: "
                "ffmpeg -i INPUT -vf zscale=t=linear:npl=100,format=gbrpf32le,zscale=p=bt709,"
                "tonemap=hable,zscale=t=bt709:m=bt709:r=tv,format=yuv420p10le "
                "-c:v ffv1 -c:a copy SDR.mkv"
            )
    elif match := _CLOCK.match(line):
        base, scale, rate, per = map(int, match.groups())
        report.clock = (base, scale, rate, per)
    elif match := _ALPHA_MINIMUM.search(line):
        report.transparent |= int(match[1]) < 255
    elif re.search(r"\[(warning|error|fatal)\]", line) and len(report.errors) < 1000:
        report.errors.append(line)


def _quarter_turns(header: list[str]) -> int:
    """How often ffmpeg turns the stored frame counter-clockwise to set it upright."""
    angles = [float(match[1]) for line in header if (match := _ROTATION.search(line))]
    return round(angles[0] / 90) % 4 if angles else 0


def _displayed(size: tuple[int, int], aspect: Fraction, *, turned: bool) -> tuple[int, int]:
    """Square pixels: the stored lines are kept, their length is stretched."""
    width, height = size
    half = Fraction(1, 2)
    if turned:  # ffmpeg has turned the aspect with the frame
        return width, max(1, int(height / aspect + half))
    return max(1, int(width * aspect + half)), height


def _color(name: str, report: Report, quarters: int) -> Color:
    stored = report.size[::-1] if quarters % 2 else report.size
    value_range, matrix, primaries, transfer = report.tags
    layout = planar_format(report.pixel_format, alpha=False)
    full_by_convention = layout.family != "yuv" or report.pixel_format.startswith("yuvj")
    if layout.family != "yuv":
        matrix = "gbr"
    elif matrix in (*_UNTAGGED, "gbr"):
        matrix = matrix_by_size(*stored)
    elif matrix not in MATRICES:
        raise ValueError(
            f"{name} uses the colour matrix {matrix}, which is not supported. Convert it first: "
            "ffmpeg -i INPUT -vf zscale=m=bt709 -c:v ffv1 -c:a copy OUTPUT.mkv"
        )
    return Color(
        matrix=matrix,
        primaries=primaries_by_size(*stored) if primaries in _UNTAGGED else primaries,
        transfer="bt709" if transfer in _UNTAGGED else transfer,
        full_range=value_range == "pc" or (value_range != "tv" and full_by_convention),
        siting=turned_siting(SITINGS.get(report.siting, SITINGS["left"]), quarters, *stored),
    )
