"""Which settings a clip calls for, from what it has suffered."""

from dataclasses import dataclass
from typing import Literal

from ..backbones import SamplingDefaults
from .estimate import Degradation


@dataclass(frozen=True, kw_only=True)
class Recommendation:
    """Settings for one clip; `dataclasses.replace` overrides any of them.

    checkpoint: the published one that fits. noise_level, cfg, strength: as in `pipeline.Settings`.
    positive, negative: words to add to the prompts, "" for none. shrink: make the input smaller by
    this factor first, from 1; the size asked for stays.
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
    """Settings relative to a model's own.

    scale: how much larger the result is to be than the input, from 1; it bounds `shrink`. For the
    published checkpoints (many evaluations, guidance) noise level and cfg follow the severity, a
    rule of thumb. A model of one evaluation, as the built-in one, has no use for them: it gets
    less strength on what is nearly intact, and a smaller input; measured, see docs/degradation.md.
    """
    severity = _severity(degradation)
    single = defaults.steps == 1 and defaults.solver_mode == "normal"
    noise_level, cfg, strength = defaults.noise_level, defaults.cfg, 1.0
    if single:
        strength = 0.5 if severity < 0.15 else 1.0
    elif defaults.cfg > 1:
        noise_level = min(round(defaults.noise_level * (0.85 + 0.15 * severity)), 1000)
        cfg = 1 + (defaults.cfg - 1) * (0.8 + 0.2 * severity)
    faults = {
        "blurring, out of focus": degradation.resolution < 0.5,
        "noise, grain": degradation.noise > 4,
        "blocking, compression artifacts": degradation.quality < 60,
    }
    return Recommendation(
        checkpoint="heavy_deg" if severity > 0.5 else "light_deg",
        noise_level=noise_level,
        cfg=round(cfg, 2),
        strength=strength,
        positive="sharp focus" if degradation.resolution < 0.5 else "",
        negative=", ".join(words for words, found in faults.items() if found),
        shrink=_shrink(degradation.resolution, scale),
    )


def _severity(degradation: Degradation) -> float:
    """0 intact to 1 as bad as STAR's heavy degradation: the worst of the three."""
    return min(
        max(
            (1 - degradation.resolution) / 0.8,
            degradation.noise / 15,
            (100 - degradation.quality) / 80,
        ),
        1.0,
    )


def _shrink(resolution: float, scale: float) -> float:
    """How far a picture may be shrunk without losing what it shows; in halves."""
    return 1.0 if resolution > 0.45 else min(int(1.6 / resolution) / 2, 4.0)
