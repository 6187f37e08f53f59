"""Compares clips side by side in a browser: one HTML file contains everything."""

from .page import write_page
from .scenes import Scene, find_scenes
from .votes import pool, wilson

__all__ = ["Scene", "find_scenes", "pool", "wilson", "write_page"]
