"""Real-world degradation of clean video, seeded and recorded."""

from .pipeline import COMPRESSION, HEAVY, MILD, TRAINING, Recipe, degrade_video

__all__ = ["COMPRESSION", "HEAVY", "MILD", "TRAINING", "Recipe", "degrade_video"]
