"""How well, how fast and in how much memory clips are restored, beside methods that people know."""

from .cases import CLIPS, HELD_OUT, METRICS, RECIPES
from .methods import METHODS
from .report import write_report
from .run import Result, run

__all__ = ["CLIPS", "HELD_OUT", "METHODS", "METRICS", "RECIPES", "Result", "run", "write_report"]
