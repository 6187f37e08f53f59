"""Less work for nearly the same result: what may be left out, and what is kept to leave it out."""

from dataclasses import dataclass, field

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
    _kept: dict[object, tuple[list[int], Tensor]] = field(default_factory=dict)

    def recall(self, place: object, t: Tensor) -> Tensor | None:
        """What was kept a little before timesteps t (b,), which run down; None if nothing was."""
        then, features = self._kept.get(place, ([], None))
        now = t.tolist()
        fresh = [0 < a - b <= self.within for a, b in zip(then, now, strict=False)]
        return features if len(then) == len(now) and all(fresh) else None

    def keep(self, place: object, t: Tensor, features: Tensor) -> None:
        self._kept[place] = (t.tolist(), features)
