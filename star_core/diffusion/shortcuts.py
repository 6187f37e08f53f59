"""Shortcuts: work that can be skipped for nearly the same result, and the features it reuses."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Shortcuts:
    """Work that a run skips at the same number of network evaluations; the defaults skip none.

    guidance: range (low, high) of timesteps, 0 to 1000, without high, in which guidance is used
        (Kynkäänniemi et al. 2024, arXiv:2404.07724).
    attention_window: side, in latents, of the windows that limit spatial attention at the finest
        level; None for whole frames.
    reuse: features below the finest level are reused from an evaluation at most this many timesteps
        earlier (Ma et al. 2023, arXiv:2312.00858); 0 for no reuse.
    cache: an evaluation is left out where the prediction is expected to have changed by at most
        this fraction since the last one that was computed, see `step_cache`; 0 computes all.
    """

    guidance: tuple[int, int] = (0, 1000)
    attention_window: int | None = None
    reuse: int = 0
    cache: float = 0.0

    def __post_init__(self) -> None:
        low, high = self.guidance
        if not 0 <= low <= high <= 1000:
            raise ValueError(
                f"guidance must be a range of timesteps from 0 to 1000, low to high, got {low} to "
                f"{high}"
            )
        if self.attention_window is not None and self.attention_window < 1:
            raise ValueError(
                f"an attention window must have at least 1 latent, got {self.attention_window}"
            )
        if not 0 <= self.reuse <= 1000:
            raise ValueError(f"reuse must be from 0 to 1000 timesteps, got {self.reuse}")
        if not 0 <= self.cache <= 1:
            raise ValueError(f"cache must be from 0 to 1, got {self.cache}")

    @property
    def remembers(self) -> bool:
        """True if an evaluation depends on earlier ones of the same run."""
        return bool(self.reuse or self.cache)


# The preset of --fast. Its effect on the published weights has not been measured yet.
FAST = Shortcuts(guidance=(100, 1000), attention_window=64, reuse=50)


@dataclass(kw_only=True)
class DeepFeatures:
    """Features of a network below its finest level, cached for evaluations soon after.

    There is one object for each prompt and each window of frames. Within it, every tile of the
    frame has its own entry. max_age: largest age in timesteps, see `Shortcuts.reuse`.
    """

    max_age: int
    _features: dict[object, Tensor] = field(default_factory=dict)
    _timesteps: list[int] = field(default_factory=list)

    def recall(self, place: object, t: Tensor) -> Tensor | None:
        """Returns the cached features of a tile; None if there are none or they are too old.

        place: key of the tile. t: current timesteps (b,), which decrease during a run.
        """
        now = t.tolist()
        ages = [then - n for then, n in zip(self._timesteps, now, strict=False)]
        fresh = len(self._timesteps) == len(now) and all(0 < age <= self.max_age for age in ages)
        return self._features.get(place) if fresh else None

    def keep(self, place: object, t: Tensor, features: Tensor) -> None:
        """Caches the features of a tile, computed at timesteps t (b,), and drops older ones."""
        if self._timesteps != t.tolist():
            self._features.clear()
        self._features[place], self._timesteps = features, t.tolist()


def clear_unless_in_step(prompts: Sequence[DeepFeatures]) -> None:
    """Clears all features if those of the prompts were computed at different timesteps.

    Guidance multiplies the difference between prompts, so their features must be equally old.
    """
    if any(deep._timesteps != prompts[0]._timesteps for deep in prompts):
        for deep in prompts:
            deep._features.clear()
            deep._timesteps.clear()


@dataclass(frozen=True)
class BatchedFeatures:
    """The features of several prompts that are evaluated as one batch, in its order.

    They are stored in system RAM, because a host reserves VRAM for one window only, while features
    of all windows are cached.
    """

    prompts: Sequence[DeepFeatures]

    def recall(self, place: object, t: Tensor) -> Tensor | None:
        """Returns the cached features of a tile for the whole batch; None if any are missing.

        place: key of the tile. t: current timesteps (b,), those of each prompt in order.
        """
        chunks = zip(self.prompts, t.chunk(len(self.prompts)), strict=True)
        features = [deep.recall(place, chunk) for deep, chunk in chunks]
        cached = [each for each in features if each is not None]
        return torch.cat(cached) if len(cached) == len(features) else None

    def keep(self, place: object, t: Tensor, features: Tensor) -> None:
        """Caches the batch's features of a tile, computed at timesteps t (b,), for each prompt."""
        count = len(self.prompts)
        for deep, timesteps, own in zip(
            self.prompts, t.chunk(count), features.chunk(count), strict=True
        ):
            deep.keep(place, timesteps, own.cpu())
