"""Meters, which measure a video in one pass over its frames."""

import math
from abc import abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager

from torch import Tensor

Measure = Callable[[Tensor, Tensor], float]
# Neighbouring frames: two of (c h w), or (2 c h w).
Pair = tuple[Tensor, Tensor] | Tensor


class Meter(AbstractContextManager["Meter"]):
    """Measures one video, a context manager: its resources are released when the block ends."""

    @abstractmethod
    def add(self, restored: Tensor, reference: Tensor | None) -> None:
        """Adds the next frame (3 h w) in [0, 1] and its ground truth, None without one."""

    @abstractmethod
    def result(self) -> list[float] | float:
        """Returns a value for each frame, nan where there is none, or one for the whole video."""

    def __exit__(self, *_: object) -> None:
        """Releases nothing by default."""


class FrameMeter(Meter):
    """Measures each frame (c h w) by a function of the restored frame and its reference."""

    def __init__(self, measure: Measure) -> None:
        self.measure = measure
        self.values: list[float] = []

    def add(self, restored: Tensor, reference: Tensor | None) -> None:
        """Measures the next frame (3 h w) in [0, 1], without a reference against itself."""
        self.values.append(self.measure(restored, restored if reference is None else reference))

    def result(self) -> list[float]:
        """Returns a value for each frame."""
        return self.values


class PairMeter(Meter):
    """Measures each pair of neighbouring frames (c h w) by a function of restored, reference."""

    def __init__(self, measure: Callable[[Pair, Pair], float]) -> None:
        self.measure = measure
        self.values: list[float] = []
        self.previous: tuple[Tensor, Tensor] | None = None

    def add(self, restored: Tensor, reference: Tensor | None) -> None:
        """Measures the next frame (3 h w) in [0, 1] with the previous one."""
        current = restored, restored if reference is None else reference
        if self.previous is None:
            self.values.append(math.nan)
        else:
            self.values.append(self.measure(*zip(self.previous, current, strict=True)))
        self.previous = current

    def result(self) -> list[float]:
        """Returns a value for each frame, nan for the first."""
        return self.values
