"""Real-world degradation of clean video, seeded and recorded."""

from .pipeline import Degradation, Recipe, clean_target, degrade_video
from .recipes import (
    COMPRESSION,
    HEAVY,
    MILD,
    PRESETS,
    STAR_HEAVY,
    STAR_LIGHT,
    STAR_REFERENCE,
    TRAINING,
)

__all__ = [
    "COMPRESSION",
    "HEAVY",
    "MILD",
    "PRESETS",
    "STAR_HEAVY",
    "STAR_LIGHT",
    "STAR_REFERENCE",
    "TRAINING",
    "Degradation",
    "Recipe",
    "clean_target",
    "degrade_video",
]
