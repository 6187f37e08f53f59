"""STAR: spatial-temporal augmentation with text-to-video models for video super-resolution."""

__version__ = "0.1.0"  # as in pyproject.toml
