"""The part of a file that is read as the video."""

from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True, kw_only=True)
class Excerpt:
    """A part of a file in time and space; readers ignore everything outside it.

    start, duration: in seconds of the file's own timestamps, whose first need not be 0; duration
    None for everything from `start`. A frame belongs to the excerpt if it begins at `start` or
    later and before the end.
    crop: (width, height, x, y) in upright pixels as stored, None for the whole frame.
    """

    start: float = 0.0
    duration: float | None = None
    crop: tuple[int, int, int, int] | None = None

    @property
    def is_trimmed(self) -> bool:
        """True if the excerpt may begin later or end earlier than the file."""
        return self.start > 0 or self.duration is not None

    @property
    def end(self) -> float | None:
        """The end in seconds of the file's timestamps; None for the end of the file."""
        return None if self.duration is None else self.start + self.duration

    def ticks(self, unit: Fraction) -> tuple[int, int | None]:
        """Returns start and end in units of `unit` seconds, rounded down as ComfyUI rounds them."""
        return int(self.start / unit), None if self.end is None else int(self.end / unit)

    def __str__(self) -> str:
        return f"from {self.start:g} s " + ("on" if self.end is None else f"to {self.end:g} s")


WHOLE = Excerpt()
