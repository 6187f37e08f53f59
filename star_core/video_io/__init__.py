"""Reads and writes video frame by frame, preserving timing, colour, sound and subtitles."""

from .color import Color
from .excerpt import WHOLE, Excerpt
from .reader import VideoInfo, VideoSource, open_stills, open_video
from .targets import OutputExists
from .writer import VideoSink, open_sink

__all__ = [
    "WHOLE",
    "OutputExists",
    "Color",
    "Excerpt",
    "VideoInfo",
    "VideoSink",
    "VideoSource",
    "open_sink",
    "open_stills",
    "open_video",
]
