"""Converts a VIDEO to what the core reads: a file, and an excerpt of it."""

import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from io import BytesIO
from pathlib import Path
from typing import Any

import av
import folder_paths
import numpy as np
import torch
from comfy_api.latest import Input
from torch import Tensor

from ..star_core.video_io import WHOLE, Excerpt
from .host_features import alpha_of, bit_depth_of, color_space_of, crop_corner_of, trim_of

# The host's colour spaces, with ffmpeg's numbers of primaries and transfer.
HDR = {"HDR": (9, 18), "HDR PQ": (9, 16)}


@contextmanager
def file_of(video: Any, sound: str = "flac") -> Iterator[tuple[Path, Excerpt]]:
    """Yields the file of a VIDEO and the excerpt of it that the VIDEO is.

    A VIDEO that is not an excerpt of a file is written to a lossless copy, which is deleted after
    the block. sound: audio codec of the copy, with 24 bits.
    """
    stream = excerpt = None
    if type(video).get_stream_source is not Input.Video.get_stream_source:
        stream = video.get_stream_source()
        excerpt = _excerpt_of(video)
    if excerpt and isinstance(stream, str):
        yield Path(stream), excerpt
        return
    Path(folder_paths.get_temp_directory()).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder_paths.get_temp_directory()) as folder:
        path = Path(folder) / "video"
        if excerpt and isinstance(stream, BytesIO):
            path.write_bytes(stream.getbuffer())
        else:
            path = path.with_suffix(".mkv")
            _write(path, video, sound)
        yield path, excerpt or WHOLE


def _excerpt_of(video: Any) -> Excerpt | None:
    """Returns the excerpt of its file that a VIDEO is; None if the frames were changed."""
    start, duration = trim_of(video)
    width, height = video.get_dimensions()
    corner = crop_corner_of(video)
    if corner is not None:
        return Excerpt(start=start, duration=duration or None, crop=(width, height, *corner))
    with av.open(
        video.get_stream_source()
    ) as file:  # rewinds the stream that get_dimensions has read
        stored = file.streams.video[0] if file.streams.video else None
    if stored and (width, height) != (stored.width, stored.height):
        return None
    return Excerpt(start=start, duration=duration or None)


def _write(path: Path, video: Any, codec: str) -> None:
    """Writes frames as FFV1 in the VIDEO's bit depth, and sound; reproducible byte by byte."""
    components = video.get_components()
    audio, pictures = components.audio, components.images
    alpha = alpha_of(components)
    if alpha is not None:
        alpha = alpha.reshape(*pictures.shape[:3], 1)
        pictures = torch.cat([pictures[..., :3], alpha.to(pictures)], dim=-1)
    bits = bit_depth_of(video)
    rate = Fraction(components.frame_rate).limit_denominator(1001)
    with av.open(path, "w", options={"fflags": "+bitexact"}) as file:
        stream = file.add_stream("ffv1", rate=rate)
        stream.height, stream.width = pictures.shape[1:3]
        stream.pix_fmt = _stored_format(bits, alpha=pictures.shape[-1] > 3)
        if (hdr := HDR.get(color_space_of(video))) is not None:
            stream.codec_context.color_primaries, stream.codec_context.color_trc = hdr
        sound = samples = None
        if audio:
            waveform, sample_rate = audio["waveform"][0].float().cpu(), int(audio["sample_rate"])
            waveform = waveform[:, : math.ceil(len(pictures) * sample_rate / rate)]
            layout = {1: "mono", 2: "stereo", 6: "5.1"}.get(len(waveform))
            if layout is None:
                raise ValueError(
                    f"sound with {len(waveform)} channels cannot be stored: mix it down"
                )
            sound = file.add_stream(codec, rate=sample_rate, layout=layout)
            sound.codec_context.format = "s32"
            samples = av.AudioFrame.from_ndarray(
                waveform.clamp(-1, 1).contiguous().numpy(), format="fltp", layout=layout
            )
            samples.sample_rate, samples.pts = sample_rate, 0
        for picture in pictures:
            file.mux(stream.encode(_frame(picture, stream.pix_fmt)))
        file.mux(stream.encode(None))
        if sound is not None:
            file.mux(sound.encode(samples))
            file.mux(sound.encode(None))


def _stored_format(bits: int, *, alpha: bool) -> str:
    """Returns the pixel format of FFV1 that stores R'G'B' of so many bits without loss."""
    if bits <= 8:
        return "bgra" if alpha else "bgr0"
    return f"gbr{'a' if alpha else ''}p{10 if bits <= 10 else 16}le"


def _frame(picture: Tensor, pixel_format: str) -> Any:
    """Converts a picture (h w c) in [0, 1] to a frame of PyAV."""
    height, width, channels = picture.shape
    picture = picture.detach().float().clamp(0, 1).cpu()
    if not pixel_format.startswith("gbr"):
        pixels = (picture * 255).round().byte().numpy()
        packed = av.VideoFrame.from_ndarray(pixels, format="rgba" if channels > 3 else "rgb24")
        return packed.reformat(format=pixel_format)
    frame = av.VideoFrame(width, height, pixel_format)
    peak = 1023 if "p10" in pixel_format else 65535
    codes = (picture * peak).round().numpy().astype("<u2")
    for plane, channel in zip(frame.planes, (1, 2, 0, 3), strict=False):
        rows = np.zeros((height, plane.line_size // 2), "<u2")
        rows[:, :width] = codes[..., channel]
        plane.update(rows.tobytes())
    return frame
