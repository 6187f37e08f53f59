"""Less work for nearly the same result: what may be left out, and what is kept to leave it out."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Shortcuts:
    """Work that is left out at the same number of evaluations; as it is here, none.

    guidance: timesteps (low, high), 0 to 1000, from low up to below high, at which the negative
        prompt counts (Kynkäänniemi et al. 2024, arXiv:2404.07724).
    attention_window: side in latents of the windows within which the finest attention in space
        stays; None for whole frames.
    reuse: what lies below the finest level is taken from an evaluation at most so many timesteps
        back (Ma et al. 2023, arXiv:2312.00858); 0 for never.
    """

    guidance: tuple[int, int] = (0, 1000)
    attention_window: int | None = None
    reuse: int = 0

    def __post_init__(self) -> None:
        low, high = self.guidance
        if not 0 <= low <= high <= 1000:
            raise ValueError(
                f"guidance must run between two timesteps from 0 to 1000, low to high, got {low} "
                f"to {high}"
            )
        if self.attention_window is not None and self.attention_window < 1:
            raise ValueError(
                f"an attention window holds at least 1 latent, got {self.attention_window}"
            )
        if not 0 <= self.reuse <= 1000:
            raise ValueError(f"features are reused within 0 to 1000 timesteps, got {self.reuse}")


# What --fast means. Not yet known on real weights.
FAST = Shortcuts(guidance=(100, 1000), attention_window=64, reuse=50)


@dataclass(kw_only=True)
class DeepFeatures:
    """What a network found below its finest level, kept for evaluations soon after.

    One for each prompt and each window of frames; the tiles of a frame have each their own place.
    within: see `Shortcuts.reuse`.
    """

    within: int
    _kept: dict[object, Tensor] = field(default_factory=dict)
    _since: list[int] = field(default_factory=list)

    def recall(self, place: object, t: Tensor) -> Tensor | None:
        """What was kept a little before timesteps t (b,), which run down; None if nothing was."""
        now = t.tolist()
        ages = [then - n for then, n in zip(self._since, now, strict=False)]
        fresh = len(self._since) == len(now) and all(0 < age <= self.within for age in ages)
        return self._kept.get(place) if fresh else None

    def keep(self, place: object, t: Tensor, features: Tensor) -> None:
        if self._since != t.tolist():
            self._kept.clear()
        self._kept[place], self._since = features, t.tolist()


def in_step(prompts: Sequence[DeepFeatures]) -> None:
    """Forgets features that are not all equally old: guidance multiplies how prompts differ."""
    if any(deep._since != prompts[0]._since for deep in prompts):
        for deep in prompts:
            deep._kept.clear()
            deep._since.clear()


@dataclass(frozen=True)
class BatchedFeatures:
    """Those of several prompts whose clips are one batch, in its order.

    They wait in main memory: a host reserves what one window needs, and keeps those of all.
    """

    prompts: Sequence[DeepFeatures]

    def recall(self, place: object, t: Tensor) -> Tensor | None:
        parts = zip(self.prompts, t.chunk(len(self.prompts)), strict=True)
        found = [deep.recall(place, part) for deep, part in parts]
        known = [features for features in found if features is not None]
        return torch.cat(known) if len(known) == len(found) else None

    def keep(self, place: object, t: Tensor, features: Tensor) -> None:
        count = len(self.prompts)
        for deep, part, own in zip(
            self.prompts, t.chunk(count), features.chunk(count), strict=True
        ):
            deep.keep(place, part, own.cpu())
