import json
import subprocess

import imageio_ffmpeg
import pytest
import torch

from star_core.metrics import compare, vmaf
from star_core.metrics.vmaf import VMAF
from star_core.video_io.ffmpeg import filters
from tests.metric_inputs import pictures

needs_vmaf = pytest.mark.skipif("libvmaf" not in filters(), reason="this ffmpeg has no libvmaf")
SIZE = 48, 65


def clip(frames=4):
    """Restored and true frames of a moving picture, their luma a whole number in 8 bits."""
    both = [pictures(*SIZE, moved=3 * f) for f in range(frames)]
    grey = [[p.mean(0, keepdim=True).expand(3, -1, -1) for p in pair] for pair in both]
    return [[torch.round(pair[side] * 219) / 219 for pair in grey] for side in (0, 1)]


def y4m(path, frames):
    h, w = SIZE
    chroma = bytes([128]) * (2 * ((h + 1) // 2) * ((w + 1) // 2))
    lumas = [(frame[0] * 219 + 16).round().byte().numpy().tobytes() for frame in frames]
    path.write_bytes(
        f"YUV4MPEG2 W{w} H{h} F25:1 Ip A1:1 C420jpeg\n".encode()
        + b"".join(b"FRAME\n" + y + chroma for y in lumas)
    )


@needs_vmaf
def test_vmaf_is_that_of_ffmpeg_on_the_two_files(tmp_path):
    restored, truth = clip()
    y4m(tmp_path / "restored.y4m", restored)
    y4m(tmp_path / "truth.y4m", truth)
    inputs = ["-i", "restored.y4m", "-i", "truth.y4m"]
    graph = ["-lavfi", "libvmaf=log_fmt=json:log_path=log.json", "-f", "null", "-"]
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", *inputs, *graph]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    frames = json.loads((tmp_path / "log.json").read_text())["frames"]
    scores = compare(restored, truth, metrics=["vmaf"]).per_frame["vmaf"]
    assert scores == [frame["metrics"]["vmaf"] for frame in frames]
    assert max(scores) < 99


@needs_vmaf
def test_vmaf_writes_where_a_path_has_signs_of_the_filter_graph(tmp_path, monkeypatch):
    odd = tmp_path / "it's, [a]; b:c"
    odd.mkdir()
    monkeypatch.setattr(vmaf.tempfile, "tempdir", str(odd))
    _, truth = clip(2)
    assert min(compare(truth, truth, metrics=["vmaf"]).per_frame["vmaf"]) > 90
    assert not list(odd.iterdir())


def test_an_ffmpeg_without_vmaf_is_told(monkeypatch):
    monkeypatch.setattr(vmaf, "filters", frozenset)
    with pytest.raises(ValueError, match="update imageio-ffmpeg"):
        VMAF()


@needs_vmaf
def test_vmaf_that_fails_says_why_and_leaves_no_process():
    meter, frame = VMAF(), torch.rand(3, 2, 2)
    with meter, pytest.raises(ValueError, match="VMAF could not be computed: .+"):
        meter.add(frame, frame)
        meter.result()
    assert meter.ffmpeg is not None and meter.ffmpeg._process.poll() is not None
