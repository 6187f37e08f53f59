"""VMAF (Netflix), by the libvmaf in ffmpeg."""

import json
import os
import re
import subprocess
import tempfile
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from ..video_io.ffmpeg import complaint, filters, messages, running
from .meters import Meter


class VMAF(Meter):
    """Scores from 0 to 100 by ffmpeg's default model (vmaf_v0.6.1), one for each frame.

    ffmpeg gets the luma of both videos in 8 bits, frame by frame, and keeps what it needs of them.
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
        # One stream for both, a reference frame before each restored one: a second pipe would
        # need a name, and those differ between systems.
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
        return ValueError(f"VMAF could not be computed: {complaint(messages(self.log))}")


def _planes(frame: Tensor) -> bytes:
    """A frame's luma, and chroma that says grey, as yuv420p.

    BT.709, as most video has it: then the luma of an 8-bit file comes back exactly, and so does its
    score. By BT.601 the scores differ by up to 1.5.
    """
    h, w = frame.shape[-2:]
    weights = torch.tensor((0.2126, 0.7152, 0.0722), dtype=frame.dtype, device=frame.device)
    y = torch.einsum("c, c h w -> h w", weights, frame[:3]) * 219 + 16
    y = y.round().clamp(0, 255).to(torch.uint8)
    return y.cpu().numpy().tobytes() + bytes([128]) * (2 * ((h + 1) // 2) * ((w + 1) // 2))


def _quoted(value: str) -> str:
    """A filter's option in a graph: escaped as an option, then as a part of the graph."""
    return re.sub(r"([\\'\[\],;])", r"\\\1", re.sub(r"([\\':])", r"\\\1", value))
