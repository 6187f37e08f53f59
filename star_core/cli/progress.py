"""Progress on stderr."""

import sys
import time
from collections.abc import Sequence


class Progress:
    """Prints the current stage and the estimated time left on stderr.

    One line that is rewritten in a terminal; elsewhere a line every ten seconds.
    """

    def __init__(
        self,
        stages: Sequence[str] = ("encode", "denoise", "decode"),
        *,
        unit: str = "",
        patience: float = 0,
    ) -> None:
        """patience: seconds before the first line is printed."""
        self.stages = stages
        self.unit = unit
        self.speak = time.monotonic() + patience
        self.terminal = sys.stderr.isatty()
        self.at = ("", 0)
        self.began: dict[str, tuple[float, int]] = {}  # in a long clip, stages take turns
        self.shown = 0.0

    def __call__(self, stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        if done == 0 or stage not in self.began:
            self.began[stage] = now, done
        elif (stage, done) == self.at or (
            now - self.shown < (0.2 if self.terminal else 10) and done < total
        ):
            return
        if now < self.speak:
            return
        self.at, self.shown = (stage, done), now
        number = self.stages.index(stage) + 1
        line = f"{number}/{len(self.stages)} {stage} {done}/{total}{self.unit}"
        began, first = self.began[stage]
        if done > first:
            line += f", {clock((now - began) / (done - first) * (total - done))} left"
        end = "\n" if done == total or not self.terminal else ""
        sys.stderr.write(("\r\x1b[K" if self.terminal else "") + line + end)
        sys.stderr.flush()


def clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class StepReport:
    """A line on stderr every 50 steps or 30 seconds. Time left is that of the run at hand."""

    def __init__(self) -> None:
        self.start, self.first, self.last, self.shown = 0.0, 0, -1, 0.0

    def __call__(self, step: int, steps: int, parts: dict[str, float]) -> None:
        if step != self.last + 1:  # another run, or one that goes on
            self.start, self.first = time.monotonic(), step
            self.shown = self.start
        self.last, now = step, time.monotonic()
        if step % 50 and step < steps and now < self.shown + 30:
            return
        self.shown = now
        left = (time.monotonic() - self.start) / max(step - self.first, 1) * (steps - step)
        losses = ", ".join(f"{name} {value:.4f}" for name, value in parts.items())
        sys.stderr.write(f"step {step}/{steps}, {losses}, {clock(left)} left\n")
