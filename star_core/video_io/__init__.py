"""Video in and out: streaming, with timing, colour, sound and subtitles kept."""

from .color import Color
from .excerpt import WHOLE, Excerpt
from .reader import VideoInfo, VideoSource, open_stills, open_video
from .targets import AlreadyThere
from .writer import VideoSink, open_sink

__all__ = [
    "WHOLE",
    "AlreadyThere",
    "Color",
    "Excerpt",
    "VideoInfo",
    "VideoSink",
    "VideoSource",
    "open_sink",
    "open_stills",
    "open_video",
]
