"""How a metric is fed: one pair of frames after the other, as far back as it must remember."""

import math
from abc import abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor

Measure = Callable[[Tensor, Tensor], float]


class Meter(AbstractContextManager["Meter"]):
    """Takes the frames of one video in their order; what it holds is freed when its block ends."""

    @abstractmethod
    def add(self, restored: Tensor, reference: Tensor | None) -> None:
        """A frame (3 h w) in [0, 1] and its ground truth; None if there is none."""

    @abstractmethod
    def result(self) -> list[float] | float:
        """A value for each frame, nan where there is none, or one for the whole video."""

    def __exit__(self, *_: object) -> None:
        """Nothing is held."""


class OfFrames(Meter):
    """measure(restored, reference) of each frame (c h w)."""

    def __init__(self, measure: Measure) -> None:
        self.measure = measure
        self.values: list[float] = []

    def add(self, restored: Tensor, reference: Tensor | None) -> None:
        self.values.append(self.measure(restored, restored if reference is None else reference))

    def result(self) -> list[float]:
        return self.values


class OfNeighbours(Meter):
    """measure(restored, reference) of each frame with the one before it (2 c h w)."""

    def __init__(self, measure: Measure) -> None:
        self.measure = measure
        self.values: list[float] = []
        self.before: tuple[Tensor, Tensor] | None = None

    def add(self, restored: Tensor, reference: Tensor | None) -> None:
        now = restored, restored if reference is None else reference
        if self.before is None:
            self.values.append(math.nan)
        else:
            pairs = (torch.stack(p) for p in zip(self.before, now, strict=True))
            self.values.append(self.measure(*pairs))
        self.before = now

    def result(self) -> list[float]:
        return self.values
