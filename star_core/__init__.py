"""STAR: spatial-temporal augmentation with text-to-video models for video super-resolution."""
