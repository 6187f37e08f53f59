"""VMAF (Netflix), computed by the libvmaf in ffmpeg."""

import json
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import Tensor

from ..video_io.ffmpeg import FFmpeg, filters
from .meters import Meter


class VMAF(Meter):
    """Measures a score from 0 to 100 for each frame, by ffmpeg's default model (vmaf_v0.6.1).

    The luma of both videos is sent to ffmpeg in 8 bits, frame by frame. Raises ValueError for an
    ffmpeg without libvmaf, or if it fails.
    """

    def __init__(self) -> None:
        if "libvmaf" not in filters():
            raise ValueError(
                "VMAF needs an ffmpeg with libvmaf: update imageio-ffmpeg, or name one with "
                "IMAGEIO_FFMPEG_EXE"
            )
        self.resources = ExitStack()
        self.ffmpeg: FFmpeg | None = None
        self.count = 0

    def add(self, restored: Tensor, reference: Tensor | None) -> None:
        """Sends the next frame (3 h w) in [0, 1] and its reference to ffmpeg."""
        assert reference is not None
        if self.ffmpeg is None:
            self.ffmpeg = self._start(restored.shape[-1], restored.shape[-2])
        with _told():
            for frame in (reference, restored):
                self.ffmpeg.write(_planes(frame))
        self.count += 1

    def result(self) -> list[float]:
        """Returns the score of each frame."""
        if self.ffmpeg is None:
            return []
        with _told():
            self.ffmpeg.finish()
        report = json.loads(self.report.read_text(encoding="utf-8"))
        scores = [frame["metrics"]["vmaf"] for frame in report["frames"]]
        assert len(scores) == self.count
        return scores

    def __exit__(self, *_: object) -> None:
        self.resources.close()

    def _start(self, width: int, height: int) -> FFmpeg:
        folder = self.resources.enter_context(tempfile.TemporaryDirectory())
        self.report = Path(folder) / "vmaf.json"
        # One stream for both, a reference frame before each restored one: a second pipe would need
        # a name, which differs between systems.
        graph = (
            "split[a][b];[a]select=mod(n\\,2),setpts=N[restored];"
            "[b]select=1-mod(n\\,2),setpts=N[reference];"
            "[restored][reference]libvmaf=log_fmt=json:shortest=1"
            f":n_threads={os.cpu_count() or 1}:log_path={_quoted(self.report.as_posix())}"
        )
        raw = ["-f", "rawvideo", "-pix_fmt", "yuv420p", "-s", f"{width}x{height}", "-i", "-"]
        return self.resources.enter_context(FFmpeg([*raw, "-lavfi", graph, "-f", "null", "-"]))


@contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"VMAF could not be computed: {error}") from None


def _planes(frame: Tensor) -> bytes:
    """Returns a frame's luma, and grey chroma, as yuv420p.

    BT.709, as in most video, reproduces the luma of an 8-bit file exactly, and so its score. With
    BT.601 the scores differ by up to 1.5.
    """
    h, w = frame.shape[-2:]
    weights = torch.tensor((0.2126, 0.7152, 0.0722), dtype=frame.dtype, device=frame.device)
    y = torch.einsum("c, c h w -> h w", weights, frame[:3]) * 219 + 16
    y = y.round().clamp(0, 255).to(torch.uint8)
    return y.cpu().numpy().tobytes() + bytes([128]) * (2 * ((h + 1) // 2) * ((w + 1) // 2))


def _quoted(value: str) -> str:
    """Escapes a filter's option, first as an option, then as a part of the graph."""
    return re.sub(r"([\\'\[\],;])", r"\\\1", re.sub(r"([\\':])", r"\\\1", value))
