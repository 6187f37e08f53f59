"""Times at which frames are shown: a constant rate if the timestamps fit one, else their own."""

import logging
from dataclasses import dataclass
from fractions import Fraction

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
        times = (*self.timestamps, self.end)
        return Timing(
            timestamps=tuple(time - times[start] for time in times[start:stop]),
            end=times[stop] - times[start],
            fps=self.fps,
            constant_rate=self.constant_rate,
            time_base=self.time_base,
        )


def constant_timing(count: int, fps: Fraction) -> Timing:
    """Returns the timing of `count` frames at a constant rate, from 0."""
    return _regular(0.0, count, fps, float(1 / fps))


def timing(
    name: str, times: list[tuple[int | None, int]], clock: tuple[int, int, int, int]
) -> Timing:
    """Returns the timing of decoded frames.

    name: the file's name in messages. times: pts (None if unknown) and duration of each frame, in
    units of the time base. clock: time base and nominal rate as two fractions (numerator,
    denominator, numerator, denominator).
    """
    base, scale, rate, per = clock
    unit = Fraction(base, scale)
    nominal = Fraction(rate, per) if rate and per else Fraction(25)
    seconds = [float(pts * unit) for pts, _ in times if pts is not None]
    increasing = all(a < b for a, b in zip(seconds, seconds[1:], strict=False))
    if len(seconds) < len(times) or not increasing:
        _LOG.warning("%s has no usable timestamps: its nominal %s fps are used", name, nominal)
        return _regular(seconds[0] if seconds else 0.0, len(times), nominal, float(1 / nominal))

    first, span = seconds[0], seconds[-1] - seconds[0]
    last = float(times[-1][1] * unit)
    average = Fraction((len(seconds) - 1) / span).limit_denominator(1001) if span else nominal
    for fps in (nominal, average):
        if fps and all(abs(time - first - k / fps) <= _TOLERANCE for k, time in enumerate(seconds)):
            return _regular(first, len(seconds), fps, last)
    # Finer clocks exist, but not every container can store them.
    fine = unit if unit.denominator <= 10**6 else Fraction(1, 90000)
    return Timing(tuple(seconds), seconds[-1] + (last or 1 / average), average, False, fine)


def _regular(first: float, count: int, fps: Fraction, last: float) -> Timing:
    """Returns an exact grid. A last frame that is shown longer than others keeps its duration."""
    scale = fps.numerator
    while scale < 10000:
        scale *= 2
    timestamps = tuple(first + float(k / fps) for k in range(count))
    regular = float(1 / fps)
    duration = last if last - regular > 0.002 else regular
    return Timing(timestamps, timestamps[-1] + duration, fps, True, Fraction(1, scale))
