"""The size, the number and the content of the frames that `upscale` writes."""

import pytest

from star_core.model import BUILT_IN
from star_core.star_checkpoint import load_model
from star_core.video_io import open_video
from star_core.windows.geometry import upsample
from tests.command_line import frames_of, refused, upscaled, write_clip

AWKWARD = [
    ((16, 16), 1, ["--scale", "1"]),
    ((17, 19), 2, ["--scale", "2.3"]),
    ((1, 1), 1, ["--scale", "4"]),
    ((33, 5), 2, ["--scale", "3.999"]),
    ((7, 31), 3, []),
    ((64, 2), 1, ["--scale", "1.5"]),
    ((21, 13), 4, ["--out-size", "43x29"]),
    ((18, 18), 2, ["--out-size", "18x37"]),
    ((20, 12), 9, ["--scale", "1.01", "--chunk-frames", "4"]),
    ((12, 20), 5, ["--scale", "2", "--chunk-frames", "2", "--chunk-overlap", "0"]),
    ((15, 15), 2, ["--scale", "3.3", "--tile", "32:8"]),
    ((11, 9), 3, ["--scale", "2.5", "--noise-level", "0"]),
]


@pytest.mark.parametrize(("size", "frames", "options"), AWKWARD)
def test_awkward_sizes_come_out_exactly(tmp_path, capsys, size, frames, options):
    width, height = size
    source = write_clip(tmp_path / "in.mkv", frames, height, width)
    report = upscaled(capsys, source, tmp_path / "out.mkv", *options)
    if "--out-size" in options:
        expected = tuple(map(int, options[1].split("x")))
    else:
        scale = float(options[1]) if options else 4
        expected = int(width * scale + 0.5), int(height * scale + 0.5)
    info = open_video(tmp_path / "out.mkv").info
    assert (info.width, info.height, info.frame_count) == (*expected, frames)
    assert (report["width"], report["height"], report["frames"]) == (*expected, frames)
    assert info.timestamps == pytest.approx(open_video(source).info.timestamps, abs=1e-3)


def test_strength_0_is_the_bicubic_input_to_one_level(tmp_path, capsys, clip):
    upscaled(capsys, clip, tmp_path / "out.mkv", "--strength", 0, "--scale", 2)
    bicubic = upsample(frames_of(clip), (32, 24), "bicubic").clamp(0, 1)
    assert (frames_of(tmp_path / "out.mkv") - bicubic).abs().max() <= 1 / 255


def test_what_is_not_enlarged_is_changed_as_little_as_the_model_file_says(tmp_path, capsys, clip):

    def strength(scale, *options):
        out = tmp_path / f"{scale}{len(options)}.mkv"
        return upscaled(capsys, clip, out, "--scale", scale, *options)["strength"]

    own = load_model(BUILT_IN["tiny"][0]).sampling.same_size_strength
    assert own < 1
    assert strength(1) == pytest.approx(own)
    assert strength(1.5) == pytest.approx((1 + own) / 2)
    assert strength(2) == strength(1, "--strength", 1) == 1


def test_alpha_is_carried_where_the_output_can(tmp_path, capsys):
    source = write_clip(tmp_path / "in.mkv", 2, 8, 10, channels=4)
    upscaled(capsys, source, tmp_path / "out.mkv", "--scale", 2)
    alpha = upsample(frames_of(source)[:, 3:], (20, 16), "bicubic").clamp(0, 1)
    assert (frames_of(tmp_path / "out.mkv")[:, 3:] - alpha).abs().max() <= 1 / 255
    assert ".mkv" in refused(capsys, "upscale", source, tmp_path / "out.mp4")
