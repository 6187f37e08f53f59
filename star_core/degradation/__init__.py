"""Simulates the degradation of real video on clean clips, and estimates it from degraded ones."""

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
