"""Compares quality, time and memory of the built-in model with those of well-known methods."""

from .cases import CLIPS, HELD_OUT, METRICS, RECIPES
from .methods import METHODS
from .report import write_report
from .run import Result, run

__all__ = ["CLIPS", "HELD_OUT", "METHODS", "METRICS", "RECIPES", "Result", "run", "write_report"]
