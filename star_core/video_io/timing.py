"""Times at which frames are shown: a constant rate if the timestamps fit one, else their own."""

import logging
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

_LOG = logging.getLogger(__name__)
# Matroska rounds to 1 ms, so times of a constant rate are off by up to half of that.
_TOLERANCE = 0.0006


@dataclass(frozen=True)
class Timing:
    """Timestamps of a clip.

    timestamps: seconds since the start of the file, strictly increasing; the first need not be 0,
        because sound may begin earlier.
    end: the time in seconds at which the last frame ends.
    fps: the rate if it is constant, else the average rate.
    constant_rate: whether the timestamps fit one rate.
    time_base: a unit, in seconds, in which an encoder can express the timestamps.
    """

    timestamps: tuple[float, ...]
    end: float
    fps: Fraction
    constant_rate: bool
    time_base: Fraction

    def cut(self, start: int, stop: int) -> "Timing":
        """Returns the timing of frames start..stop-1, the first at 0."""
        *times, end = (*self.timestamps[start : stop + 1], self.end)[: stop - start + 1]
        return Timing(
            timestamps=tuple(time - times[0] for time in times),
            end=end - times[0],
            fps=self.fps,
            constant_rate=self.constant_rate,
            time_base=self.time_base,
        )


def constant_timing(count: int, fps: Fraction) -> Timing:
    """Returns the timing of `count` frames at a constant rate, from 0."""
    return _regular(0.0, count, fps, float(1 / fps))


def timing(
    name: str, times: Sequence[int | None], unit: Fraction, nominal: Fraction, last: int
) -> Timing:
    """Returns the timing of decoded frames.

    name: the file's name in messages. times: timestamps in the order in which frames are shown,
    None where one is missing. unit: of timestamps, in seconds. nominal: the rate that the file
    states. last: duration of the last frame in units, 0 if it is unknown.

    Timestamps that are missing, equal or go backwards are placed between their neighbours.
    """
    valid = _increasing(times)
    if not valid:
        _LOG.warning("%s has no timestamps: its nominal %s fps are used", name, nominal)
        return constant_timing(len(times), nominal)
    if len(valid) < len(times):
        _LOG.warning(
            "%s: %d of %d timestamps are missing or do not increase; these frames are placed "
            "between their neighbours",
            *(name, len(times) - len(valid), len(times)),
        )
        unit_of_all = min(unit, Fraction(1, 90000))
    else:
        unit_of_all = unit
    stated = [(times[k] or 0) * unit.numerator / unit.denominator for k in valid]
    seconds = _placed(valid, stated, len(times), nominal)
    first, span = seconds[0], seconds[-1] - seconds[0]
    average = Fraction((len(seconds) - 1) / span).limit_denominator(1001) if span else nominal
    duration = float(last * unit)
    for fps in filter(None, (nominal, average)):
        regular = float(1 / fps)
        if all(abs(time - first - k * regular) <= _TOLERANCE for k, time in enumerate(seconds)):
            return _regular(first, len(seconds), fps, duration)
    # Finer clocks exist, but not every container can store them.
    fine = unit_of_all if unit_of_all.denominator <= 10**6 else Fraction(1, 90000)
    return Timing(tuple(seconds), seconds[-1] + (duration or 1 / average), average, False, fine)


def _increasing(times: Sequence[int | None]) -> list[int]:
    """Returns the indices of the longest series of increasing times, the first of equal ones."""
    tails: list[int] = []  # the least time that ends a series of each length
    ends: list[int] = []  # its index
    before: list[int | None] = []
    for k, time in enumerate(times):
        length = 0 if time is None else bisect_left(tails, time)
        before.append(ends[length - 1] if length else None)
        if time is None or (length < len(tails) and tails[length] == time):
            continue
        tails[length : length + 1] = [time]
        ends[length : length + 1] = [k]
    series = []
    k = ends[-1] if ends else None
    while k is not None:
        series.append(k)
        k = before[k]
    return series[::-1]


def _placed(
    valid: Sequence[int], seconds: Sequence[float], count: int, nominal: Fraction
) -> list[float]:
    """Returns `count` times: those at the indices `valid`, and others evenly between them."""
    placed: list[float] = []
    for (a, start), (b, end) in pairwise(zip(valid, seconds, strict=True)):
        placed += [start + (end - start) * k / (b - a) for k in range(b - a)]
    step = (seconds[-1] - seconds[0]) / (valid[-1] - valid[0]) if len(valid) > 1 else 1 / nominal
    before = [seconds[0] - float(step) * k for k in range(valid[0], 0, -1)]
    after = range(count - valid[0] - len(placed))
    return before + placed + [seconds[-1] + float(step) * k for k in after]


def _regular(first: float, count: int, fps: Fraction, last: float) -> Timing:
    """Returns an exact grid. A last frame that is shown longer than others keeps its duration."""
    scale = fps.numerator
    while scale < 10000:
        scale *= 2
    timestamps = tuple(first + float(k / fps) for k in range(count))
    regular = float(1 / fps)
    duration = last if last - regular > 0.002 else regular
    return Timing(timestamps, timestamps[-1] + duration, fps, True, Fraction(1, scale))
