"""Random numbers of one explicit generator."""

from typing import Any

import torch


class SeededRandom:
    """Python numbers drawn one after the other from a torch generator."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        """Draws a number uniformly from [low, high)."""
        return low + (high - low) * torch.rand((), generator=self.generator).item()

    def normal(self, scale: float = 1.0) -> float:
        """Draws a normal number with mean 0 and standard deviation `scale`."""
        return scale * torch.randn((), generator=self.generator).item()

    def below(self, limit: int) -> int:
        """Draws an integer from 0 to limit - 1."""
        return int(torch.randint(limit, (), generator=self.generator))

    def chance(self, probability: float) -> bool:
        """Returns True with the given probability, from 0 to 1."""
        return self.uniform() < probability

    def choice(self, weights: dict[Any, float]) -> Any:
        """Draws a key of `weights` with probability proportional to its value."""
        index = torch.multinomial(
            torch.tensor(list(weights.values()), dtype=torch.float64), 1, generator=self.generator
        )
        return list(weights)[int(index)]
