"""Determines the frames of a file, or of an excerpt of it, by decoding it once.

Containers state frame counts, rates and durations that need not be true, and hidden frames, alpha
that is used, fields and damage only show when frames are decoded. This takes a small part of the
time that restoring takes, so it is done for the whole before any work begins.
"""

import functools
import logging
import re
from bisect import bisect_right
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import chain, groupby, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .decoding import Findings, captured_log, decode, opened, time_of, video_stream
from .excerpt import WHOLE, Excerpt
from .form import Form, FormReader
from .images import check_readable
from .planes import planar_format
from .timing import Timing, timing

if TYPE_CHECKING:
    from av import VideoFrame
    from av.container import InputContainer

_LOG = logging.getLogger(__name__)
Log = list[tuple[int, str, str]]  # see `captured_log`
# Of these, only the log of ffmpeg's libraries tells.
_INCOMPLETE = re.compile(r"moov atom not found|error reading header")
_CUT_OFF = re.compile(r"File ended prematurely|partial file|EOI missing|LZW decode failed")


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
    """A container's description of its content.

    video_stream: index of the stream that is restored. streams: those that are copied.
    tags: names of the file's metadata, in lower case. start: the time in seconds that counts as the
    beginning. unit: of the frames' timestamps, in seconds. fps: the nominal rate.
    """

    video_stream: int = 0
    streams: tuple[Stream, ...] = ()
    tags: frozenset[str] = frozenset()
    start: Fraction = Fraction(0)
    unit: Fraction = Fraction(1, 25)  # ffmpeg's rate for images, which state none
    fps: Fraction = Fraction(25)


@dataclass(frozen=True)
class StoredFrame:
    """A frame of a file. time: its timestamp in the stream's unit, None if it has none."""

    time: int | None
    is_key: bool
    form: Form


@dataclass(frozen=True)
class Survey:
    """The frames of a file, of an excerpt of it, or of a sequence of images.

    files: the file, or the images in order. seek: the timestamp at which decoding begins, None for
    the file's beginning. lead: number of frames from there to the excerpt. following: timestamp of
    the frame after the excerpt. has_alpha: whether some pixel is not opaque. interlaced: whether
    some frame is marked as two fields. is_joined: whether recordings were joined byte by byte.
    """

    files: Sequence[Path]
    header: Header
    timing: Timing
    seek: int | None = None
    lead: int = 0
    frames: Sequence[StoredFrame] = ()
    has_alpha: bool = False
    interlaced: bool = False
    is_joined: bool = False

    @functools.cached_property
    def bit_depth(self) -> int:
        """The bits of a component as stored, the most of all frames."""
        formats = {frame.form.pixel_format for frame in self.frames}
        return max(planar_format(name, alpha=False).bits for name in formats)

    def decode(self, first: int) -> "Generator[tuple[Form, VideoFrame], None, None]":
        """Yields the frames from number `first` on, as stored, with their forms.

        Seeks to the key frame before `first` where timestamps allow it. Ends early if other frames
        arrive than were found.
        """
        with closing(self._decode(first)) as decoded:
            # In this order: nothing is decoded after the last stored frame.
            for stored, frame in zip(self.frames[first:], decoded, strict=False):
                size, form = (frame.width, frame.height), stored.form
                expected = form.size[::-1] if form.transposed else form.size
                if (*size, frame.format.name) != (*expected, form.pixel_format):
                    return
                if len(self.files) == 1 and time_of(frame) != stored.time:
                    return
                yield form, frame

    def _decode(self, first: int) -> "Generator[VideoFrame, None, None]":
        if len(self.files) > 1:
            for path in self.files[first:]:
                with opened(path) as file:
                    yield from decode(file, None)
            return
        keys = self._keys[: bisect_right(self._keys, first)]
        if len(keys) > 1 and self._can_seek:
            with opened(self.files[0]) as file:
                frames = self._decode_after_seeking(file, first, keys)
                if frames is not None:
                    yield from frames
                    return
        with opened(self.files[0]) as file:
            for number, frame in enumerate(decode(file, self.seek)):
                if number >= self.lead + first:
                    yield frame

    def _decode_after_seeking(
        self, file: "InputContainer", first: int, keys: list[int]
    ) -> "Iterator[VideoFrame] | None":
        """Returns the frames from `first` on, None if seeking does not reach exactly that one."""
        wanted, step = self.frames[first].time, 1
        assert wanted is not None
        while len(keys) > 1:
            frames, anchored = decode(file, self.frames[keys[-1]].time), False
            for frame in frames:
                time = time_of(frame)
                anchored |= frame.key_frame and time is not None and time <= wanted
                if time is not None and time >= wanted:
                    if anchored and time == wanted:
                        return chain([frame], frames)
                    break
            # The file's index led too far, or the frame needs others before the key frame.
            keys, step = keys[:-step], 2 * step
        return None

    def by_key_frame(self, numbers: Iterable[int]) -> list[list[int]]:
        """Groups ascending frame numbers by the key frame from which they are decoded."""

        def key_of(number: int) -> int:
            return bisect_right(self._keys, number) if self._can_seek else 0

        return [list(group) for _, group in groupby(numbers, key=key_of)]

    @functools.cached_property
    def _keys(self) -> list[int]:
        return [number for number, frame in enumerate(self.frames) if frame.is_key]

    @functools.cached_property
    def _can_seek(self) -> bool:
        return not self.is_joined and all(
            a.time is not None and b.time is not None and a.time < b.time
            for a, b in pairwise(self.frames)
        )


def survey(name: str, files: Sequence[Path], excerpt: Excerpt = WHOLE) -> Survey:
    """Decodes a video, or an excerpt of it, once and returns its frames and properties.

    name: in messages. files: one video or image, or the images of a sequence. The results for a few
    files are cached until the files change.

    Raises ValueError for a file that is not a video, cannot be decoded to its end, or changes its
    size, aspect or kind of HDR, and for an excerpt that is empty.
    """
    states = tuple((path.stat().st_size, path.stat().st_mtime_ns) for path in files)
    return _survey(name, tuple(files), excerpt, states)


@functools.lru_cache(maxsize=8)
def _survey(
    name: str, files: tuple[Path, ...], excerpt: Excerpt, states: tuple[tuple[int, int], ...]
) -> Survey:
    if len(files) == 1:
        return _survey_file(name, files[0], excerpt)
    images: list[Survey] = []
    for k, path in enumerate(files):
        images.append(_survey_file(path.name, path, WHOLE))
        if len(images[-1].frames) > 1:
            raise ValueError(
                f"{name}: {path.name} has {len(images[-1].frames)} frames: a sequence consists of "
                "still images. Read it as a video of its own"
            )
        _check_change(name, k, images[0].frames[0].form, images[-1].frames[0].form)
    return Survey(
        files=files,
        header=Header(),
        frames=tuple(replace(image.frames[0], time=k) for k, image in enumerate(images)),
        timing=timing(name, range(len(files)), Header.unit, Header.fps, 1),
        has_alpha=any(image.has_alpha for image in images),
        interlaced=any(image.interlaced for image in images),
    )


def _check_change(name: str, number: int, first: Form, form: Form) -> None:
    """Raises ValueError for a frame that differs so that a cut is needed before it."""
    kinds = first.color.hdr or "SDR", form.color.hdr or "SDR"
    change = None
    if form.size != first.size:
        sizes = (f"{width}x{height}" for width, height in (first.size, form.size))
        change = "frame size from {} to {}".format(*sizes)
    elif form.aspect != first.aspect:
        change = f"pixels' aspect from {first.aspect} to {form.aspect}"
    elif kinds[0] != kinds[1]:
        change = "range from {} to {}".format(*kinds)
    if change:
        raise ValueError(
            f"{name} changes its {change} at frame {number}: cut it there, or treat a folder of "
            "images as stills"
        )


def _survey_file(name: str, path: Path, excerpt: Excerpt) -> Survey:
    from av.error import FFmpegError

    check_readable(path)
    seek, step = excerpt.start, 1.0
    while True:  # seeks further back while decoding begins after the excerpt's first frame
        with captured_log() as log:
            try:
                with opened(path) as file:
                    header = _header(name, file, log)
                    # Decoders have tried parts of the first frames, which is of no interest.
                    log[:] = [line for line in log if line[1] == file.format.name]
                    result = _decoded(name, path, file, header, excerpt, seek, log)
            except FFmpegError as error:
                raise _refusal(name, log, str(error.strerror)) from None
        if result is not None:
            return result
        seek, step = seek - step, 2 * step


def _decoded(
    name: str,
    path: Path,
    file: "InputContainer",
    header: Header,
    excerpt: Excerpt,
    seek: float,
    log: Log,
) -> Survey | None:
    """Decodes from `seek` seconds of the file's timestamps, 0 or less for its beginning.

    Returns None if decoding began too late for the excerpt.
    """
    findings, form_of = Findings(), FormReader(file.streams[header.video_stream])  # type: ignore[arg-type]
    target = int(seek / header.unit) if seek > 0 else None
    start, end = excerpt.ticks(header.unit)
    frames: list[StoredFrame] = []
    anchored, lead, following = target is None, 0, None
    has_alpha = interlaced = False
    for frame in decode(file, target, findings):
        time = time_of(frame)
        if excerpt.is_trimmed:
            if time is None:
                raise ValueError(
                    f"{name} has no timestamps to trim it by; give it some: ffmpeg -i INPUT "
                    "-c copy OUTPUT.mkv"
                )
            anchored |= frame.key_frame and time <= start
            if time < start:
                lead += 1
                continue
            if end is not None and time >= end:
                following = time
                break
            if not anchored:
                return None
        try:
            form = form_of(frame)
        except ValueError as error:
            raise ValueError(f"{name} {error}") from None
        frames.append(StoredFrame(time, frame.key_frame, form))
        if form is not frames[len(frames) - 2].form:
            _check_change(name, len(frames) - 1, frames[0].form, form)
        interlaced |= frame.interlaced_frame
        has_alpha = has_alpha or form.is_transparent(frame)
        if frame.is_corrupt:
            findings.damage.append(f"corrupt frame {len(frames) - 1}")
    if not anchored and not frames:
        return None
    if not frames and (lead or following is not None):
        raise ValueError(
            f"the trim of {name} is empty: no frame begins {excerpt}; choose a time within the file"
        )
    _tell_damage(name, len(frames), findings, log)
    last = findings.durations.get(frames[-1].time or 0, 0)
    if excerpt.is_trimmed and frames[-1].time is not None:
        last = last if following is None else following - frames[-1].time
        last = last if end is None else min(last, end - frames[-1].time)
    times = [frame.time for frame in frames]
    if not excerpt.is_trimmed:
        if header.start < 0:  # in FFmpeg 7 often the priming of the sound, which is not heard
            first = min((time for time in times if time is not None), default=0)
            header = replace(header, start=min(Fraction(0), first * header.unit))
        begin = round(header.start / header.unit)
        times = [None if time is None else time - begin for time in times]
    return Survey(
        files=(path,),
        header=header,
        seek=target,
        lead=lead,
        frames=tuple(frames),
        timing=timing(name, times, header.unit, header.fps, last),
        has_alpha=has_alpha,
        interlaced=interlaced,
        is_joined=findings.is_joined,
    )


def _tell_damage(name: str, count: int, findings: Findings, log: Log) -> None:
    """Logs a warning for damage. Raises ValueError for a file that ends in the middle."""
    errors = [*_errors(log), *findings.damage]
    if not count:
        reason = errors[0] if errors else "no reason given"
        raise ValueError(f"{name} is truncated or damaged: no frame can be decoded ({reason})")
    told = [text for _, _, text in log]
    if any(_CUT_OFF.search(line) for line in (*told, *findings.damage)):
        raise ValueError(
            f"{name} is truncated: it breaks off in frame {count}. Copy it again, "
            f"or keep the frames before that: ffmpeg -i INPUT -c:v ffv1 -c:a copy OUTPUT.mkv"
        )
    if errors:
        _LOG.warning("%s is damaged; ffmpeg conceals it: %s", name, errors[0])


def _errors(log: Log) -> list[str]:
    return [f"{source}: {text.strip()}" for level, source, text in log if level <= 16]


def _refusal(name: str, log: Log, reason: str) -> ValueError:
    text = " ".join(text for _, _, text in log)
    if _INCOMPLETE.search(text) and "misdetection possible" not in text:
        return ValueError(f"{name} is truncated: its index is incomplete. Copy it again")
    reason = next(iter(_errors(log)), reason)
    return ValueError(f"{name} is not a video that ffmpeg can read ({reason})")


def _header(name: str, file: "InputContainer", log: Log) -> Header:
    if file.format.name == "tty":  # text files, as video of their letters
        raise _refusal(name, log, "it is text")
    stream = video_stream(file)
    if stream is None:
        kinds = ", ".join(sorted({s.type for s in file.streams}))
        raise ValueError(f"{name} has no video stream, only {kinds}: choose a video")
    if not stream.codec_context:
        raise _refusal(name, log, "no decoder for its video")
    if len(file.streams.video) > 1:
        _LOG.warning("%s has further video streams or a cover, which are left out", name)
    return Header(
        video_stream=stream.index,
        streams=tuple(
            Stream(s.index, s.type.capitalize(), _codec_of(s))
            for s in file.streams
            if s.type in ("audio", "subtitle", "attachment")
        ),
        tags=frozenset(map(str.lower, file.metadata)),
        start=Fraction(file.start_time or 0, 1_000_000),
        unit=Fraction(stream.time_base or Header.unit),
        fps=Fraction(stream.guessed_rate or stream.average_rate or Header.fps),
    )


def _codec_of(stream: Any) -> str:
    context = stream.codec_context
    return context.codec.canonical_name if context else "unknown"
