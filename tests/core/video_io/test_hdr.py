"""HDR and more than 8 bits: what comes in goes out, with its tags and its metadata."""

import subprocess
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from torch import Tensor

from star_core.cli import main
from star_core.video_io import VideoSource, open_sink, open_stills, open_video
from star_core.windows.geometry import upsample

STEP = 1 / 1023  # of 10 bits
TRANSFERS = {"PQ": "smpte2084", "HLG": "arib-std-b67"}
MASTERING = (0.68, 0.32, 0.265, 0.69, 0.15, 0.06, 0.3127, 0.329, 0.005, 1000)


def ffmpeg(*arguments: object, data: bytes | None = None) -> None:
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", *map(str, arguments)]
    subprocess.run(command, input=data, capture_output=True, check=True)


def recording(path: Path, kind: str = "PQ", size: str = "48x32", frames: int = 3) -> Path:
    """Smooth colours of BT.2020 in 10 bits, as a camera writes them."""
    picture = (
        f"nullsrc=s={size}:r=25,trim=end_frame={frames},format=yuv420p10le,"
        "geq=lum='64+876*(0.1+0.8*X/W)':cb='512+150*sin(Y/9+N)':cr='512+150*cos(X/9)',setparams="
        f"range=tv:colorspace=bt2020nc:color_primaries=bt2020:color_trc={TRANSFERS[kind]}"
    )
    display = (
        "master-display=G(13250,34500)B(7500,3000)R(34000,16000)WP(15635,16450)L(10000000,50)"
        ":max-cll=1000,400"
    )
    options = f"log-level=error:lossless=1:{display}"
    ffmpeg("-f", "lavfi", "-i", picture, "-c:v", "libx265", "-x265-params", options, path)
    return path


def stack(source: VideoSource | Path) -> Tensor:
    return torch.stack(list(open_video(source, hdr=True) if isinstance(source, Path) else source))


def copy(source: VideoSource, path: Path, **options) -> Path:
    info = source.info
    alpha = info.has_alpha
    with open_sink(
        path, width=info.width, height=info.height, source=source, alpha=alpha, **options
    ) as sink:
        for frame in source:
            sink.write(frame)
    return path


def upscaled(source: Path, out: Path, *options: object) -> Path:
    command = ["upscale", source, out, "--scale", 2, "--shots", "off", *options]
    assert main([str(word) for word in command]) == 0
    return out


@pytest.mark.parametrize("kind", TRANSFERS)
@pytest.mark.parametrize(
    ("name", "codec", "steps"),
    [("a.mkv", None, 0.51), ("a.mp4", "h265", 12), ("a.mov", None, 12), ("a.webm", None, 12)],
)
def test_hdr_comes_out_with_its_tags_and_its_metadata(tmp_path, kind, name, codec, steps):
    source = open_video(recording(tmp_path / "in.mp4", kind), hdr=True)
    assert source.info.color.hdr == kind and source.info.bit_depth == 10
    assert source.info.color.mastering == pytest.approx(MASTERING)
    result = open_video(copy(source, tmp_path / name, codec=codec), hdr=True)
    found, expected = result.info.color, source.info.color
    matrix = "gbr" if name == "a.mkv" else "bt2020nc"
    assert (found.matrix, found.primaries, found.transfer) == (matrix, "bt2020", TRANSFERS[kind])
    assert found.mastering == pytest.approx(MASTERING) and found.light_level == (1000, 400)
    assert result.info.bit_depth == 10
    difference = (stack(result) - stack(source)).abs()
    assert (difference.max() if steps < 1 else difference.mean()) < steps * STEP
    assert replace(found, matrix="", full_range=False) == replace(
        expected, matrix="", mastering=found.mastering
    )


def test_h264_and_other_files_of_8_bits_are_refused_for_hdr(tmp_path):
    source = open_video(recording(tmp_path / "in.mp4"), hdr=True)
    with pytest.raises(ValueError, match=r"HDR \(PQ\) needs 10 bits: choose codec h265"):
        copy(source, tmp_path / "a.mp4", codec="h264")
    info = open_video(copy(source, tmp_path / "a.mp4"), hdr=True).info
    assert info.color.hdr and info.bit_depth == 10


@pytest.mark.parametrize("kind", TRANSFERS)
def test_strength_0_is_the_bicubic_enlargement_of_the_code_values(tmp_path, kind):
    source = recording(tmp_path / "in.mp4", kind)
    out = upscaled(source, tmp_path / "out.mkv", "--strength", 0)
    expected = upsample(stack(source), (96, 64), "bicubic").clamp(0, 1)
    assert (stack(out) - expected).abs().max() <= STEP
    assert open_video(out, hdr=True).info.color.hdr == kind


def test_a_restored_pq_video_stays_near_its_source(tmp_path):
    source = recording(tmp_path / "in.mp4")
    out = stack(upscaled(source, tmp_path / "out.mkv", "--strength", 1))
    expected = upsample(stack(source), (96, 64), "bicubic").clamp(0, 1)
    assert (out - expected).abs().mean() < 0.05
    assert not torch.equal(out, stack(upscaled(source, tmp_path / "0.mkv", "--strength", 0)))


def linear(folder: Path, frames: int = 2, alpha: bool = False) -> Path:
    """Linear light up to 60 times white, and below black, as renderers write it."""
    folder.mkdir()
    channels = 3 + alpha
    light = np.random.default_rng(0).uniform(0, 2, (frames, channels, 16, 24)).astype("<f4")
    light[:, :3, 2:5, 3:7], light[:, :3, 8, 8] = 60, -0.25
    if alpha:
        light[:, 3] = light[:, 3] / 2
    kind = "gbrapf32le" if alpha else "gbrpf32le"
    raw = ["-f", "rawvideo", "-pix_fmt", kind, "-s", "24x16", "-r", 25, "-i", "-"]
    ffmpeg(
        *raw, "-c:v", "exr", folder / "%03d.exr", data=light[:, [1, 2, 0, 3][:channels]].tobytes()
    )
    return folder


def test_exr_is_read_and_written_bit_for_bit(tmp_path):
    source = open_video(linear(tmp_path / "in"), hdr=True)
    assert source.info.color.transfer == "linear"
    frames = stack(source)
    assert frames.max() == 60 and frames.min() == -0.25
    copy(source, tmp_path / "out" / "%05d.exr")
    assert torch.equal(stack(tmp_path / "out"), frames)


def test_transparent_exr_is_refused(tmp_path):
    source = open_video(linear(tmp_path / "in", alpha=True), hdr=True)
    with pytest.raises(ValueError, match="EXR is written without transparency: remove it first"):
        copy(source, tmp_path / "%05d.exr")


def test_values_beyond_white_are_enlarged_like_others(tmp_path):
    source = linear(tmp_path / "in")
    out = stack(upscaled(source, tmp_path / "out" / "%05d.exr", "--strength", 0).parent)
    expected = upsample(stack(source), (48, 32), "bicubic")
    assert torch.allclose(out, expected, atol=1e-5) and out.max() > 60 and out.min() < -0.25


def test_restored_light_beyond_the_curve_is_kept(tmp_path):
    source = linear(tmp_path / "in")
    out = stack(upscaled(source, tmp_path / "out" / "%05d.exr", "--strength", 1).parent)
    assert out.isfinite().all() and out[:, :, 5:9, 8:12].max() > 40


def test_stills_of_linear_light_become_exr(tmp_path):
    out = upscaled(linear(tmp_path / "in"), tmp_path / "out", "--strength", 0, "--stills")
    assert sorted(path.name for path in out.iterdir()) == ["001.exr", "002.exr"]
    assert all(still.info.width == 48 for still in open_stills(out, hdr=True))


def test_linear_light_and_exr_belong_together(tmp_path):
    source = open_video(linear(tmp_path / "in"), hdr=True)
    for name in ("a.mkv", "frames"):
        with pytest.raises(ValueError, match=r"linear light is written as EXR.*%05d\.exr"):
            copy(source, tmp_path / name)
    with pytest.raises(ValueError, match="EXR holds linear light, which this video is not"):
        open_sink(tmp_path / "%05d.exr", width=8, height=8, fps=Fraction(25))


@pytest.mark.parametrize("read", [open_video, lambda path: open_stills(path)])
def test_linear_light_is_refused_where_only_sdr_is_measured(tmp_path, read):
    with pytest.raises(ValueError, match=r"is HDR \(linear light\)"):
        read(linear(tmp_path / "in"))


@pytest.mark.parametrize("alpha", [False, True])
def test_png_of_16_bits_stays_so(tmp_path, alpha):
    kind = "rgba64be" if alpha else "rgb48be"
    codes = np.random.default_rng(0).integers(0, 2**16, (2, 5, 7, 3 + alpha)).astype(">u2")
    raw = ["-f", "rawvideo", "-pix_fmt", kind, "-s", "7x5", "-r", 25, "-i", "-"]
    ffmpeg(*raw, tmp_path / "%d.png", data=codes.tobytes())
    source = open_video(tmp_path / "%d.png")
    expected = torch.from_numpy(codes.astype(np.float32)).movedim(3, 1) / 65535
    assert source.info.bit_depth == 16 and torch.allclose(stack(source), expected)
    copy(source, tmp_path / "out")
    assert torch.equal(stack(tmp_path / "out"), stack(source))


@pytest.mark.parametrize(
    ("name", "codec", "bits"),
    [
        ("a.mkv", None, 10),
        ("a.mp4", None, 10),
        ("a.mp4", "h265", 10),
        ("a.mp4", "h264", 8),
        ("a.mov", None, 10),
        ("a.webm", None, 10),
        ("a", None, 16),
    ],
)
def test_sdr_of_10_bits_stays_so_where_the_format_can(tmp_path, name, codec, bits):
    ramp = np.tile(np.linspace(64, 940, 48).round().astype("<u2"), (32, 1))
    planes = np.stack([ramp, np.full_like(ramp, 512), np.full_like(ramp, 512)])
    raw = ["-f", "rawvideo", "-pix_fmt", "yuv444p10le", "-s", "48x32", "-r", 25, "-i", "-"]
    ffmpeg(*raw, "-c:v", "ffv1", tmp_path / "in.mkv", data=planes.tobytes())
    source = open_video(tmp_path / "in.mkv")
    result = open_video(copy(source, tmp_path / name, codec=codec))
    assert result.info.bit_depth == bits and result.info.color.hdr is None
    assert (stack(result) - stack(source)).abs().mean() < 4 * STEP
