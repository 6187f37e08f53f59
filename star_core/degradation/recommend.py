"""Recommends settings for a clip from its estimated degradation."""

from dataclasses import dataclass
from typing import Literal

from ..sampling_defaults import SamplingDefaults
from .estimate import Degradation


@dataclass(frozen=True, kw_only=True)
class Recommendation:
    """Recommended settings for one clip.

    checkpoint: the published one that fits. noise_level, cfg, strength: see `settings.Settings`.
    positive, negative: words to add to the prompts, "" for none. shrink: the factor, from 1, by
    which to downscale the input first; the size of the result stays.
    """

    checkpoint: Literal["light_deg", "heavy_deg"]
    noise_level: int
    cfg: float
    strength: float
    positive: str
    negative: str
    shrink: float

    def __str__(self) -> str:
        parts = [f"noise level {self.noise_level}", f"cfg {self.cfg:g}"]
        parts += [f"strength {self.strength:g}"] if self.strength < 1 else []
        parts += [f"input shrunk by {self.shrink:g} first"] if self.shrink > 1 else []
        parts += [f'prompt + "{self.positive}"'] if self.positive else []
        parts += [f'negative + "{self.negative}"'] if self.negative else []
        return f"{self.checkpoint}: {', '.join(parts)}"


def recommend(
    degradation: Degradation, defaults: SamplingDefaults, *, scale: float = 4.0
) -> Recommendation:
    """Returns recommended settings for a model with these defaults.

    scale: the size of the result divided by that of the input. For models of several evaluations,
    such as the published checkpoints, noise level and cfg follow the severity by a rule of thumb. A
    model of one evaluation, such as the built-in one, gets the strength that its file states for
    the scale, or 1 if noise or compression is strong.
    """
    severity = _severity(degradation)
    noise_level, cfg, strength = defaults.noise_level, defaults.cfg, 1.0
    if defaults.solver_mode == "normal" and defaults.steps == 1:
        # Changing a nearly intact clip loses much, and most where it is not enlarged.
        strength = 1.0 if _distortion(degradation) > 0.8 else defaults.usual_strength(scale)
    else:
        noise_level = round(noise_level * (0.85 + 0.15 * severity))
        cfg = 1 + (cfg - 1) * (0.8 + 0.2 * severity)
    faults = {
        "out of focus": degradation.resolution < 0.5,
        "noise, grain": degradation.noise > 4,
        "blocking, compression artifacts": degradation.quality < 60,
    }
    return Recommendation(
        checkpoint="heavy_deg" if severity > 0.5 else "light_deg",
        noise_level=noise_level,
        cfg=round(cfg, 2),
        strength=round(strength, 2),
        positive="sharp focus" if degradation.resolution < 0.5 else "",
        negative=", ".join(words for words, present in faults.items() if present),
        shrink=_shrink(degradation),
    )


def _severity(degradation: Degradation) -> float:
    """Returns the worst of blur, noise and compression, from 0 (none) to 1 (very strong)."""
    blur = (1 - degradation.resolution) / 0.8
    return min(max(blur, _distortion(degradation)), 1.0)


def _distortion(degradation: Degradation) -> float:
    """Returns the worse of noise and compression, from 0 to 1."""
    return min(max(degradation.noise / 12, (100 - degradation.quality) / 70), 1.0)


def _shrink(degradation: Degradation) -> float:
    """Returns the factor: averaging removes noise where there is no detail to lose."""
    if degradation.resolution > 0.25 or _distortion(degradation) < 0.3:
        return 1.0
    return min(max(round(0.8 / degradation.resolution) / 2, 2.0), 4.0)
