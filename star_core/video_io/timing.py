"""When frames are shown: constant rate where the timestamps bear it out, else each its own time."""

import logging
from dataclasses import dataclass
from fractions import Fraction

_LOG = logging.getLogger(__name__)
# Matroska rounds to 1 ms: a constant rate there is off by half of that.
_TOLERANCE = 0.0006


@dataclass(frozen=True)
class Timing:
    """Timestamps of a clip.

    timestamps: seconds since the start of the file, strictly increasing; the first need not be 0,
        sound may begin earlier.
    end: when the last frame has been shown, in seconds.
    fps: the rate if it is constant, else the average rate.
    time_base: a unit, in seconds, that expresses the timestamps.
    """

    timestamps: tuple[float, ...]
    end: float
    fps: Fraction
    constant_rate: bool
    time_base: Fraction

    def cut(self, start: int, stop: int) -> "Timing":
        """Frames start..stop-1, the first at 0."""
        times = (*self.timestamps, self.end)
        return Timing(
            timestamps=tuple(time - times[start] for time in times[start:stop]),
            end=times[stop] - times[start],
            fps=self.fps,
            constant_rate=self.constant_rate,
            time_base=self.time_base,
        )


def constant_timing(count: int, fps: Fraction) -> Timing:
    """`count` frames at a constant rate, from 0."""
    return _regular(0.0, count, fps, float(1 / fps))


def timing(
    name: str, times: list[tuple[int | None, int]], clock: tuple[int, int, int, int]
) -> Timing:
    """From pts and duration of each frame, and (time base, nominal rate) as two fractions."""
    base, scale, rate, per = clock
    unit = Fraction(base, scale)
    nominal = Fraction(rate, per) if rate and per else Fraction(25)
    seconds = [float(pts * unit) for pts, _ in times if pts is not None]
    increasing = all(a < b for a, b in zip(seconds, seconds[1:], strict=False))
    if len(seconds) < len(times) or not increasing:
        _LOG.warning("%s has no usable timestamps; its nominal %s fps are taken", name, nominal)
        return _regular(seconds[0] if seconds else 0.0, len(times), nominal, float(1 / nominal))

    first, span = seconds[0], seconds[-1] - seconds[0]
    last = float(times[-1][1] * unit)
    average = Fraction((len(seconds) - 1) / span).limit_denominator(1001) if span else nominal
    for fps in (nominal, average):
        if fps and all(abs(time - first - k / fps) <= _TOLERANCE for k, time in enumerate(seconds)):
            return _regular(first, len(seconds), fps, last)
    # Finer clocks than this exist, but not every container has room for them.
    fine = unit if unit.denominator <= 10**6 else Fraction(1, 90000)
    return Timing(tuple(seconds), seconds[-1] + (last or 1 / average), average, False, fine)


def _regular(first: float, count: int, fps: Fraction, last: float) -> Timing:
    """The exact grid. A last frame that is held longer than the others keeps its duration."""
    scale = fps.numerator
    while scale < 10000:
        scale *= 2
    timestamps = tuple(first + float(k / fps) for k in range(count))
    regular = float(1 / fps)
    held = last if last - regular > 0.002 else regular
    return Timing(timestamps, timestamps[-1] + held, fps, True, Fraction(1, scale))
