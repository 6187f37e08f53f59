"""Determines the frames and properties of a file, or of an excerpt, by decoding it once.

Containers state frame counts, rates and durations that need not be true, so the results come from
ffmpeg's report of every frame instead.
"""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction

from ..windows.canvas import Region, region_of
from .color import (
    HDR_TRANSFERS,
    MATRICES,
    SITINGS,
    Color,
    matrix_by_size,
    primaries_by_size,
    turned_siting,
)
from .excerpt import WHOLE, Excerpt
from .ffmpeg import first_error, messages, running
from .header import Header, read_header
from .planes import PlanarFormat, planar_format
from .timing import Timing, timing

_LOG = logging.getLogger(__name__)
_SHOWINFO = r"\[[^]]*showinfo[^]]*\] \[info\] "
_FRAME = re.compile(
    _SHOWINFO + r"n: *\d+ pts: *(\S+) pts_time:\S+ *(?:duration: *(\S+))?.* fmt:(\w+)"
    r"(?: cl:(\w+))? sar:(\d+)/(\d+) s:(\d+)x(\d+) i:(\w) iskey:(\d)"
)
_COLOR = re.compile(
    _SHOWINFO + r"color_range:(\S+) color_space:(\S+) color_primaries:(\S+) color_trc:(\S+)"
)
_CLOCK = re.compile(_SHOWINFO + r"config in time_base: (\d+)/(\d+), frame_rate: (\d+)/(\d+)")
_ALPHA_MINIMUM = re.compile(r"lavfi\.signalstats\.YMIN=(\d+)")
_UNTAGGED = ("unknown", "unspecified", "reserved")
_CUT_OFF = re.compile(
    r"File ended prematurely|partial file|mov.*corrupt input packet|EOI missing|LZW decode failed"
)


@dataclass
class Report:
    """The results of the decoding pass.

    seek: see `Probe`. anchored: whether decoding began at the file's beginning, or at a key frame
    at or before the excerpt's first frame. late: whether the excerpt's first frame was reached
    without that. lead: number of frames before the excerpt. following: pts of the frame after it.
    size: width and height after rotation, in stored (not square) pixels.
    """

    seek: list[str]
    anchored: bool
    late: bool = False
    lead: int = 0
    following: int | None = None
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
    """The properties of a video that can be decoded, and how to read its frames.

    seek: ffmpeg's arguments before those of `header`, to begin `lead` frames before the excerpt.
    is_trimmed: whether the excerpt may cover less than the file's time; timestamps are then the
    file's own. crop: the region of the upright stored frame that is read, None for all. layout: the
    planes in which frames are read. stored_size, displayed_size: width and height after rotation,
    in stored and in square pixels. bit_depth: of a component as stored. interlaced: whether some
    frame is marked as two fields.
    """

    header: Header
    seek: list[str]
    lead: int
    is_trimmed: bool
    crop: Region | None
    layout: PlanarFormat
    stored_size: tuple[int, int]
    displayed_size: tuple[int, int]
    color: Color
    bit_depth: int
    interlaced: bool
    timing: Timing


def probe(
    name: str,
    arguments: Sequence[str],
    *,
    expected: int | None = None,
    excerpt: Excerpt = WHOLE,
) -> Probe:
    """Decodes a video, or an excerpt of it, once and returns its properties.

    name: the file's name in messages. arguments: ffmpeg's for reading it. expected: the number of
    images in a sequence, None for a file. Raises ValueError for a file that is not a video, cannot
    be decoded to its end, is HDR, or changes its size, and for an excerpt that is empty or not
    inside the frame.
    """
    header = read_header(name, arguments)
    report = _decode(name, header, excerpt)
    if not report.times and (report.lead or report.following is not None):
        raise ValueError(
            f"the trim of {name} is empty: no frame begins {excerpt}; choose a time within the file"
        )
    if not report.times:
        reason = first_error(report.errors)
        raise ValueError(f"{name} is truncated or damaged: no frame can be decoded ({reason})")
    if any(_CUT_OFF.search(line) for line in report.errors):
        raise ValueError(
            f"{name} is truncated: it breaks off in frame {len(report.times)}. Copy it again, "
            f"or keep the frames before that: ffmpeg -i INPUT -c:v ffv1 -c:a copy OUTPUT.mkv"
        )
    if expected is not None and len(report.times) != expected:
        raise ValueError(
            f"{name}: {len(report.times)} of {expected} images can be decoded "
            f"({first_error(report.errors)}); replace the damaged ones"
        )
    if any("[error]" in line for line in report.errors):
        _LOG.warning("%s is damaged; ffmpeg conceals it: %s", name, first_error(report.errors))

    turned = header.quarter_turns % 2 == 1
    crop = excerpt.crop and region_of(excerpt.crop, *report.size)
    return Probe(
        header=header,
        seek=report.seek,
        lead=report.lead,
        is_trimmed=excerpt.is_trimmed,
        crop=crop,
        layout=planar_format(report.pixel_format, alpha=report.transparent),
        stored_size=report.size,
        displayed_size=_displayed(
            excerpt.crop[:2] if excerpt.crop else report.size, report.aspect, turned=turned
        ),
        color=_color(name, report, header.quarter_turns),
        bit_depth=planar_format(report.pixel_format, alpha=False).bits,
        interlaced=report.interlaced,
        timing=timing(name, _times_inside(report, excerpt), report.clock),
    )


def _times_inside(report: Report, excerpt: Excerpt) -> list[tuple[int | None, int]]:
    """Returns the frames' times; the last is shown until the next frame or the excerpt's end."""
    *times, (pts, duration) = report.times
    if excerpt.is_trimmed and pts is not None:
        _, end = excerpt.ticks(Fraction(*report.clock[:2]))
        duration = duration if report.following is None else report.following - pts
        duration = duration if end is None else min(duration, end - pts)
    return [*times, (pts, duration)]


def _decode(name: str, header: Header, excerpt: Excerpt) -> Report:
    """Decodes from the last key frame before the excerpt, seeking further back if it was missed."""
    seek, step = excerpt.start, 1.0
    while True:
        report = _decode_from(name, header, excerpt, seek)
        if not report.late:
            return report
        seek, step = seek - step, 2 * step


def _decode_from(name: str, header: Header, excerpt: Excerpt, seek: float) -> Report:
    """Decodes from `seek` seconds of the file's timestamps; 0 or less means its beginning."""
    report = Report(seek=["-copyts"] if excerpt.is_trimmed else [], anchored=seek <= 0)
    if not report.anchored:
        report.seek += ["-seek_timestamp", "1", "-noaccurate_seek", "-ss", f"{seek:.6f}"]
    filters = "showinfo=checksum=0"
    if excerpt.end is not None:
        filters += f",trim=end={excerpt.end:.6f}"
    if header.may_be_transparent:
        # The format alone does not decide: most files with alpha never use it.
        filters += (
            ",format=gbrap,alphaextract,signalstats,metadata=print:key=lavfi.signalstats.YMIN"
        )
    filters += ",setpts=N/TB"  # the null muxer rejects close times, which are recorded by now
    output = ["-map", "0:V:0", "-fps_mode", "passthrough", "-vf", filters, "-f", "null", "-"]
    with running([*report.seek, *header.arguments, *output], log=None) as process:
        assert process.stderr is not None
        for line in messages(process.stderr):
            _record(name, line, report, excerpt)
            if report.late:
                return report
        process.wait()
    report.late = not report.anchored
    return report


def _is_inside(name: str, pts: str, report: Report, excerpt: Excerpt, *, is_key: bool) -> bool:
    """Tests whether a frame belongs to the excerpt; frames outside only update the report."""
    if not excerpt.is_trimmed:
        return True
    if not pts.lstrip("-").isdigit():
        raise ValueError(
            f"{name} has no timestamps to trim it by; give it some: ffmpeg -i INPUT -c copy "
            "OUTPUT.mkv"
        )
    time, (start, end) = int(pts), excerpt.ticks(Fraction(*report.clock[:2]))
    report.anchored |= is_key and time <= start
    report.late = time >= start and not report.anchored
    if time < start:
        report.lead += 1
        return False
    if end is not None and time >= end:
        report.following = min(time, report.following or time)
        return False
    return not report.late


def _record(name: str, line: str, report: Report, excerpt: Excerpt) -> None:
    if match := _FRAME.match(line):
        pts, duration, pixel_format, siting, across, down, width, height, scan, key = match.groups()
        if not _is_inside(name, pts, report, excerpt, is_key=key == "1"):
            return
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
    elif (match := _COLOR.match(line)) and report.times and not report.tags:
        report.tags = list(match.groups())
        if (hdr := HDR_TRANSFERS.get(match[4])) is not None:
            raise ValueError(
                f"{name} is HDR ({hdr}), which this model does not support. Convert it first: "
                "ffmpeg -i INPUT -vf zscale=t=linear:npl=100,format=gbrpf32le,zscale=p=bt709,"
                "tonemap=hable,zscale=t=bt709:m=bt709:r=tv,format=yuv420p10le "
                "-c:v ffv1 -c:a copy SDR.mkv"
            )
    elif match := _CLOCK.match(line):
        base, scale, rate, per = map(int, match.groups())
        report.clock = (base, scale, rate, per)
    elif match := _ALPHA_MINIMUM.search(line):
        report.transparent |= int(match[1]) < 255 and bool(report.times)
    elif "-ss" in report.seek and not report.times:
        pass  # frames before the first key frame after seeking cannot be decoded
    elif re.search(r"\[(warning|error|fatal)\]", line) and len(report.errors) < 1000:
        report.errors.append(line)


def _displayed(size: tuple[int, int], aspect: Fraction, *, turned: bool) -> tuple[int, int]:
    """Returns the size in square pixels: the number of stored lines stays, their length changes."""
    width, height = size
    half = Fraction(1, 2)
    if turned:  # ffmpeg turns the aspect with the frame
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
    full_range = value_range == "pc" or (value_range != "tv" and full_by_convention)
    if primaries in _UNTAGGED:
        # Full range comes from computers and cameras for stills, not from television.
        primaries = "bt709" if full_range else primaries_by_size(*stored)
    return Color(
        matrix=matrix,
        primaries=primaries,
        transfer="bt709" if transfer in _UNTAGGED else transfer,
        full_range=full_range,
        siting=turned_siting(SITINGS.get(report.siting, SITINGS["left"]), quarters, *stored),
    )
