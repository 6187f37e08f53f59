"""A VIDEO as the core reads one: a file, and an excerpt of it."""

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

# Of the host's colour spaces, ffmpeg's numbers of primaries and transfer.
HDR = {"HDR": (9, 18), "HDR PQ": (9, 16)}


@contextmanager
def file_of(video: Any, sound: str = "flac") -> Iterator[tuple[Path, Excerpt]]:
    """The file behind a VIDEO, and what of it the VIDEO is, while the block lasts.

    For one that is no excerpt of a file, a lossless copy. sound: how that of a copy is stored, in
    24 bit.
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
    """What of its file a VIDEO is; None where the frames are not simply some of the file's."""
    start, duration = trim_of(video)
    width, height = video.get_dimensions()
    corner = crop_corner_of(video)
    if corner is not None:
        return Excerpt(start=start, duration=duration or None, crop=(width, height, *corner))
    with av.open(video.get_stream_source()) as file:  # it rewinds what get_dimensions has read
        stored = file.streams.video[0] if file.streams.video else None
    if stored and (width, height) != (stored.width, stored.height):
        return None
    return Excerpt(start=start, duration=duration or None)


def _write(path: Path, video: Any, codec: str) -> None:
    """Frames as FFV1 with the VIDEO's bits, and sound; the same bytes for the same VIDEO."""
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
        sound = heard = None
        if audio:
            waveform, sample_rate = audio["waveform"][0].float().cpu(), int(audio["sample_rate"])
            waveform = waveform[:, : math.ceil(len(pictures) * sample_rate / rate)]
            layout = {1: "mono", 2: "stereo", 6: "5.1"}.get(len(waveform))
            if layout is None:
                raise ValueError(f"sound of {len(waveform)} channels cannot be stored: mix it down")
            sound = file.add_stream(codec, rate=sample_rate, layout=layout)
            sound.codec_context.format = "s32"
            heard = av.AudioFrame.from_ndarray(
                waveform.clamp(-1, 1).contiguous().numpy(), format="fltp", layout=layout
            )
            heard.sample_rate, heard.pts = sample_rate, 0
        for picture in pictures:
            file.mux(stream.encode(_frame(picture, stream.pix_fmt)))
        file.mux(stream.encode(None))
        if sound is not None:
            file.mux(sound.encode(heard))
            file.mux(sound.encode(None))


def _stored_format(bits: int, *, alpha: bool) -> str:
    """The pixel format of FFV1 that keeps R'G'B' of so many bits."""
    if bits <= 8:
        return "bgra" if alpha else "bgr0"
    return f"gbr{'a' if alpha else ''}p{10 if bits <= 10 else 16}le"


def _frame(picture: Tensor, pixel_format: str) -> Any:
    """(h w c) in [0, 1] -> the host's frame."""
    height, width, channels = picture.shape
    picture = picture.detach().float().clamp(0, 1).cpu()
    if not pixel_format.startswith("gbr"):
        pixels = (picture * 255).round().byte().numpy()
        whole = av.VideoFrame.from_ndarray(pixels, format="rgba" if channels > 3 else "rgb24")
        return whole.reformat(format=pixel_format)
    frame = av.VideoFrame(width, height, pixel_format)
    peak = 1023 if "p10" in pixel_format else 65535
    codes = (picture * peak).round().numpy().astype("<u2")
    for plane, channel in zip(frame.planes, (1, 2, 0, 3), strict=False):
        rows = np.zeros((height, plane.line_size // 2), "<u2")
        rows[:, :width] = codes[..., channel]
        plane.update(rows.tobytes())
    return frame
