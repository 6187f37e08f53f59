"""VMAF (Netflix), computed by the libvmaf in ffmpeg."""

import json
import os
import re
import subprocess
import tempfile
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from ..video_io.ffmpeg import filters, first_error, messages, running
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
        self.process: subprocess.Popen[bytes] | None = None
        self.count = 0

    def add(self, restored: Tensor, reference: Tensor | None) -> None:
        """Sends the next frame (3 h w) in [0, 1] and its reference to ffmpeg."""
        assert reference is not None
        if self.process is None:
            self._start(restored.shape[-1], restored.shape[-2])
        assert self.process is not None and self.process.stdin is not None
        try:
            for frame in (reference, restored):
                self.process.stdin.write(_planes(frame))
        except OSError:
            raise self._failure() from None
        self.count += 1

    def result(self) -> list[float]:
        """Returns the score of each frame."""
        if self.process is None:
            return []
        assert self.process.stdin is not None
        try:
            self.process.stdin.close()
        except OSError:
            raise self._failure() from None
        if self.process.wait():
            raise self._failure()
        report = json.loads(self.report.read_text(encoding="utf-8"))
        scores = [frame["metrics"]["vmaf"] for frame in report["frames"]]
        assert len(scores) == self.count
        return scores

    def __exit__(self, *_: object) -> None:
        self.resources.close()

    def _start(self, width: int, height: int) -> None:
        folder = Path(self.resources.enter_context(tempfile.TemporaryDirectory()))
        self.report = folder / "vmaf.json"
        self.log = self.resources.enter_context((folder / "log").open("w+b"))
        # One stream for both, a reference frame before each restored one: a second pipe would need
        # a name, which differs between systems.
        graph = (
            "split[a][b];[a]select=mod(n\\,2),setpts=N[restored];"
            "[b]select=1-mod(n\\,2),setpts=N[reference];"
            "[restored][reference]libvmaf=log_fmt=json:shortest=1"
            f":n_threads={os.cpu_count() or 1}:log_path={_quoted(self.report.as_posix())}"
        )
        raw = ["-f", "rawvideo", "-pix_fmt", "yuv420p", "-s", f"{width}x{height}", "-i", "-"]
        self.process = self.resources.enter_context(
            running([*raw, "-lavfi", graph, "-f", "null", "-"], stdin=True, log=self.log)
        )

    def _failure(self) -> ValueError:
        assert self.process is not None
        self.process.wait()
        self.log.seek(0)
        return ValueError(f"VMAF could not be computed: {first_error(messages(self.log))}")


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
