from dataclasses import replace

import pytest
import torch

from star_core import demo
from star_core.cli import main
from star_core.degradation import HEAVY, degrade_video
from star_core.video_io import open_sink, open_video


def write(path, frames):
    from fractions import Fraction

    height, width = frames.shape[-2:]
    with open_sink(path, width=width, height=height, fps=Fraction(25)) as sink:
        for frame in frames:
            sink.write(frame)


@pytest.fixture
def small_data(tmp_path, monkeypatch):
    """A demo of 32x24 pixels instead of the shipped one."""
    generator = torch.Generator().manual_seed(0)
    write(tmp_path / demo.GROUND_TRUTH, torch.rand(6, 3, 24, 32, generator=generator))
    write(tmp_path / demo.DEGRADED, torch.rand(6, 3, 6, 8, generator=generator))
    monkeypatch.setattr(demo, "DATA", tmp_path)
    monkeypatch.setattr(demo, "DETAILS", [(range(4, 16), range(8, 24))])
    return tmp_path


def test_the_shipped_clip_is_large_enough_and_degraded_by_the_documented_recipe():
    truth = torch.stack(list(open_video(demo.DATA / demo.GROUND_TRUTH)))
    degraded = torch.stack(list(open_video(demo.DATA / demo.DEGRADED)))
    frames, _, height, width = truth.shape
    assert frames >= 24 and width >= 640
    assert degraded.shape == (frames, 3, height // 4, width // 4)
    # other machines round otherwise, and JPEG makes steps of it
    assert (degraded - degrade_video(truth, HEAVY, demo.SEED)[0]).abs().mean() < 1 / 255


@pytest.mark.parametrize(("options", "frames"), [(["--quick"], demo.QUICK_FRAMES), ([], 6)])
def test_the_demo_leaves_a_restored_clip_a_comparison_and_a_picture(
    small_data, tmp_path, capsys, options, frames
):
    out = tmp_path / "out"
    assert main(["demo", "--out", str(out), *options]) == 0
    printed = capsys.readouterr().out
    for words in ("PSNR", "SSIM", "warping error", "bicubic", "restored", str(out)):
        assert words in printed
    bar = 24  # labels
    sizes = {
        "restored.mp4": (frames, 3, 24, 32),
        "side_by_side.mp4": (frames, 3, 24 + bar, 3 * 32),
        "comparison.png": (1, 3, 24 + bar + 24, 3 * 32),
    }
    assert {path.name for path in out.iterdir()} == set(sizes)
    for name, size in sizes.items():
        assert torch.stack(list(open_video(out / name))).shape == size


def test_without_opencv_the_demo_leaves_out_the_warping_error(small_data, tmp_path, monkeypatch):
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None)
    result = demo.demo(tmp_path / "out", quick=True)
    assert set(result.bicubic) == set(result.restored) == {"psnr", "ssim"}
    assert "opencv" in str(result)


def test_numbers_are_those_of_the_bicubic_and_the_restored_clip(small_data, tmp_path, monkeypatch):
    """The film itself as result would be perfect; bicubic stays what it is."""
    truth = list(open_video(small_data / demo.GROUND_TRUTH))

    def upscale(job, settings, get_model, *, on_progress, on_frame):
        write(job.out, torch.stack(truth))
        for frame in truth[: job.frames[1]]:
            on_frame(frame)

    monkeypatch.setattr(demo, "upscale", upscale)
    result = demo.demo(tmp_path / "out", quick=True)
    assert result.restored["ssim"] > 0.999 > 0.9 > result.bicubic["ssim"]
    assert "restored" in str(replace(result, seconds=1.0))


def test_labels_are_written_in_white_on_black():
    frame = torch.full((3, 5, 200), 0.5)
    for text in demo.LABELS:
        label = demo._label(text, frame)
        assert label.shape == (3, 24, 200) and set(label.unique().tolist()) == {0.0, 1.0}
