"""Random numbers of one explicit generator."""

from typing import Any

import torch


class SeededRandom:
    """Plain numbers, drawn one after the other from `generator`."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        return low + (high - low) * torch.rand((), generator=self.generator).item()

    def normal(self, scale: float = 1.0) -> float:
        return scale * torch.randn((), generator=self.generator).item()

    def below(self, limit: int) -> int:
        """A whole number from 0 to limit - 1."""
        return int(torch.randint(limit, (), generator=self.generator))

    def chance(self, probability: float) -> bool:
        return self.uniform() < probability

    def choice(self, weights: dict[Any, float]) -> Any:
        """A key, with probability proportional to its weight."""
        index = torch.multinomial(
            torch.tensor(list(weights.values()), dtype=torch.float64), 1, generator=self.generator
        )
        return list(weights)[int(index)]
