"""Progress on stderr."""

import sys
import time
from collections.abc import Sequence


class Progress:
    """What is being done and the time that it will still take, on stderr.

    One line that is rewritten in a terminal; elsewhere a line every ten seconds.
    """

    def __init__(
        self, stages: Sequence[str] = ("encode", "denoise", "decode"), *, unit: str = ""
    ) -> None:
        self.stages = stages
        self.unit = unit
        self.terminal = sys.stderr.isatty()
        self.at = ("", 0)
        self.first = 0
        self.began = self.shown = 0.0

    def __call__(self, stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        if done == 0 or stage != self.at[0]:
            self.first, self.began = done, now
        elif (stage, done) == self.at or (
            now - self.shown < (0.2 if self.terminal else 10) and done < total
        ):
            return
        self.at, self.shown = (stage, done), now
        number = self.stages.index(stage) + 1
        line = f"{number}/{len(self.stages)} {stage} {done}/{total}{self.unit}"
        if done > self.first:
            left = (now - self.began) / (done - self.first) * (total - done)
            line += f", {clock(left)} left"
        end = "\n" if done == total or not self.terminal else ""
        sys.stderr.write(("\r\x1b[K" if self.terminal else "") + line + end)
        sys.stderr.flush()


def clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
