"""Progress on stderr."""

import sys
import time


class Progress:
    """What is being done and the time that it will still take, on stderr.

    One line that is rewritten in a terminal; elsewhere a line every ten seconds.
    """

    STAGES = ("encode", "denoise", "decode")

    def __init__(self) -> None:
        self.began = self.shown = 0.0
        self.terminal = sys.stderr.isatty()

    def __call__(self, stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        if done == 0:
            self.began = now
        elif now - self.shown < (0.2 if self.terminal else 10) and done < total:
            return
        self.shown = now
        line = f"{self.STAGES.index(stage) + 1}/{len(self.STAGES)} {stage} {done}/{total}"
        if done:
            line += f", {clock((now - self.began) / done * (total - done))} left"
        end = "\n" if done == total or not self.terminal else ""
        sys.stderr.write(("\r\x1b[K" if self.terminal else "") + line + end)
        sys.stderr.flush()


def clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
