"""Sources are made by ffmpeg itself, so that what is read back is known."""

import logging
import subprocess
from fractions import Fraction
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from av import VideoFrame
from torch import Tensor

from star_core.video_io import open_stills, open_video
from star_core.video_io.planes import has_alpha, planar_format

HEVC_HDR = ["-c:v", "libx265", "-x265-params", "log-level=error", "-pix_fmt", "yuv420p10le"]


def ffmpeg(*arguments: object, data: bytes | None = None) -> bytes:
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", *map(str, arguments)]
    return subprocess.run(command, input=data, capture_output=True, check=True).stdout


def pattern(path: Path, *options: object, size: str = "48x32", frames: int = 4) -> Path:
    """A moving test picture of `frames` frames, 25 a second, with `options` for the output."""
    source = f"testsrc2=s={size}:r=25,trim=end_frame={frames}"
    ffmpeg("-f", "lavfi", "-i", source, *options, path.absolute())
    return path


def raw(path: Path, planes: np.ndarray, pixel_format: str, size: str, *options: object) -> Path:
    """Known code values, stored without loss."""
    source = ["-f", "rawvideo", "-pix_fmt", pixel_format, "-s", size, "-r", 25, "-i", "-"]
    ffmpeg(*source, *options, "-c:v", "ffv1", path, data=planes.tobytes())
    return path


def frames_of(path: Path, **options) -> Tensor:
    return torch.stack(list(open_video(path, **options)))


def test_rgb_is_read_bit_for_bit(tmp_path):
    codes = np.random.default_rng(0).integers(0, 256, (2, 5, 7, 3), dtype=np.uint8)
    video = frames_of(raw(tmp_path / "a.mkv", codes, "rgb24", "7x5", "-pix_fmt", "bgr0"))
    assert video.shape == (2, 3, 5, 7) and video.dtype == torch.float32
    assert torch.equal(video * 255, torch.from_numpy(codes).permute(0, 3, 1, 2).float())


@pytest.mark.parametrize(
    ("size", "tags", "matrix", "red_luma"),
    [
        ("64x576", [], "smpte170m", 0.299),
        ("1280x8", [], "bt709", 0.2126),
        ("8x577", [], "bt709", 0.2126),
        ("64x48", ["-vf", "setparams=colorspace=bt709"], "bt709", 0.2126),
        ("1280x8", ["-vf", "setparams=colorspace=smpte170m"], "smpte170m", 0.299),
        ("64x48", ["-vf", "setparams=colorspace=bt2020nc"], "bt2020nc", 0.2627),
    ],
)
def test_matrix_is_the_tag_or_else_judged_by_size(tmp_path, size, tags, matrix, red_luma):
    width, height = map(int, size.split("x"))
    # Pure red in that matrix.
    y, cr = round(16 + 219 * red_luma), 240
    cb = round(
        128 - 112 * red_luma / (1 - {0.299: 0.114, 0.2126: 0.0722, 0.2627: 0.0593}[red_luma])
    )
    plane = np.ones((height, width), np.uint8)
    source = np.stack([plane * y, plane * cb, plane * cr])
    path = raw(tmp_path / "a.mkv", source, "yuv444p", size, *tags)
    clip = open_video(path)
    assert clip.info.color.matrix == matrix
    red = next(iter(clip))[:, 0, 0]
    assert torch.allclose(red, torch.tensor([1.0, 0, 0]), atol=1.5 / 255)


@pytest.mark.parametrize(
    ("width", "height", "siting"),
    [(32, 24, "left"), (31, 23, "left"), (31, 24, "center"), (32, 23, "topleft")],
)
def test_chroma_lands_where_it_was_sampled(tmp_path, width, height, siting):
    def smooth(x, y):
        return 128 + 50 * np.sin(x / 7) * np.cos(y / 5)

    across = {"left": 0, "center": 0.5, "topleft": 0}[siting]
    down = {"left": 0.5, "center": 0.5, "topleft": 0}[siting]
    y, x = np.mgrid[: (height + 1) // 2, : (width + 1) // 2]
    chroma = np.rint(smooth(2 * x + across, 2 * y + down) * 4).astype(np.uint16)
    luma = np.full((height, width), 4 * 126, np.uint16)
    source = np.concatenate([luma.ravel(), np.full(chroma.size, 512, np.uint16), chroma.ravel()])
    options = [
        "-vf",
        f"setparams=chroma_location={siting}:colorspace=bt709",
        "-chroma_sample_location",
    ]
    path = raw(tmp_path / "a.mkv", source, "yuv420p10le", f"{width}x{height}", *options, siting)
    red = next(iter(open_video(path)))[0].numpy()
    y, x = np.mgrid[:height, :width]
    expected = (126 - 16) / 219 + 2 * (1 - 0.2126) * (smooth(x, y) - 128) / 224
    inside = (slice(3, -3), slice(3, -3))
    assert np.abs(red - expected)[inside].max() < 0.6 / 255


def catmull_rom(count: int, size: int, offset: float) -> np.ndarray:
    """Weights (size, count) that interpolate `count` samples, at offset, offset + 2, ...; the first
    and the last are repeated beyond the ends."""
    weights = np.zeros((size, count))
    for place in range(size):
        first, f = divmod((place - offset) / 2, 1)
        taps = -f + 2 * f**2 - f**3, 2 - 5 * f**2 + 3 * f**3, f + 4 * f**2 - 3 * f**3, f**3 - f**2
        for tap, weight in enumerate(taps):
            weights[place, int(np.clip(first - 1 + tap, 0, count - 1))] += weight / 2
    return weights


@pytest.mark.parametrize(("width", "height"), [(16, 12), (15, 11)])
@pytest.mark.parametrize("down", [1, 2])
def test_every_pixel_is_converted_exactly(tmp_path, width, height, down):
    rng = np.random.default_rng(0)
    luma = rng.integers(100, 140, (height, width), np.uint8)
    small = -(-height // down), -(-width // 2)
    chroma = rng.integers(90, 170, (2, *small), np.uint8)
    codes = np.concatenate([luma.ravel(), chroma.ravel()])
    pixel_format = {1: "yuv422p", 2: "yuv420p"}[down]
    tags = ["-vf", "setparams=chroma_location=left:colorspace=bt709"]
    path = raw(tmp_path / "a.mkv", codes, pixel_format, f"{width}x{height}", *tags)
    rows = catmull_rom(small[0], height, 0.5) if down == 2 else np.eye(height)
    y = (luma - 16) / 219
    cb, cr = (rows @ (c / 1.0 - 128) @ catmull_rom(small[1], width, 0).T / 112 for c in chroma)
    red, blue = y + (1 - 0.2126) * cr, y + (1 - 0.0722) * cb
    green = (y - 0.2126 * red - 0.0722 * blue) / 0.7152
    expected = np.stack([red, green, blue]).clip(0, 1)
    assert np.abs(next(iter(open_video(path))).numpy() - expected).max() < 0.03 / 255


@pytest.mark.parametrize("pixel_format", ["yuvj420p", "yuv420p"])
def test_range_of_the_source_is_heeded(tmp_path, pixel_format):
    full = pixel_format == "yuvj420p"
    codes = np.full(16 * 16 * 3 // 2, 128, np.uint8)
    codes[:256] = 255 if full else 235
    tags = ["-color_range", "pc" if full else "tv"]
    path = raw(tmp_path / "a.mkv", codes, pixel_format, "16x16", *tags)
    assert torch.allclose(frames_of(path), torch.ones(1), atol=1e-5)


@pytest.mark.parametrize(
    ("pixel_format", "bits", "planes", "black", "white"),
    [
        ("yuv444p10le", 10, 3, 64, 940),
        ("yuv444p12le", 12, 3, 256, 3760),
        ("gray16le", 16, 1, 0, 65535),
        ("gray10le", 10, 1, 0, 1023),
        ("gbrp10le", 10, 3, 0, 1023),
        ("gbrp16le", 16, 3, 0, 65535),
        ("gray", 8, 1, 0, 255),
    ],
)
def test_every_bit_of_a_deep_source_is_kept(tmp_path, pixel_format, bits, planes, black, white):
    ramp = np.linspace(black, white, 64).round().astype(np.uint8 if bits == 8 else np.uint16)
    neutral = np.full_like(ramp, 2 ** (bits - 1))
    source = np.stack([ramp, *([neutral if "yuv" in pixel_format else ramp] * (planes - 1))])
    clip = open_video(raw(tmp_path / "a.mkv", source, pixel_format, "16x4"))
    assert clip.info.bit_depth == bits
    expected = torch.from_numpy((ramp.astype(np.float32) - black) / (white - black)).view(4, 16)
    # libswscale's coefficients for Y'CbCr have 13 bits; a step of 12 bits is 2.4e-4
    tolerance = 1e-4 if "yuv" in pixel_format else 1e-6
    assert torch.allclose(next(iter(clip)), expected, atol=tolerance)


@pytest.mark.parametrize(
    ("pixel_format", "planar"),
    [
        ("nv12", "yuv420p"),
        ("p010le", "yuv420p10le"),
        ("yuyv422", "yuv422p"),
        ("yuv411p", "yuv444p"),
        ("ayuv64le", "yuva444p16le"),
        ("rgb24", "gbrp"),
        ("pal8", "gbrap"),
        ("ya8", "gbrap"),
        ("rgba64be", "gbrap16le"),
        ("monow", "gray"),
        ("gray12le", "gray12le"),
    ],
)
def test_every_pixel_format_has_a_planar_one_that_holds_it(pixel_format, planar):
    assert planar_format(pixel_format, alpha=has_alpha(pixel_format)).name == planar


@pytest.mark.parametrize("pixel_format", ["p010le", "y210le"])
def test_formats_are_converted_exactly_every_time(pixel_format):
    frame = VideoFrame(24, 16, pixel_format)
    codes = [
        np.random.default_rng(0).integers(0, 1024, (16 // k, plane.line_size // 2), np.uint16)
        for k, plane in enumerate(frame.planes, 1)
    ]
    for plane, values in zip(frame.planes, codes, strict=True):
        plane.update((values << 6).tobytes())
    layout, luma = planar_format(pixel_format, alpha=False), codes[0]
    luma = luma[:, :24] if pixel_format == "p010le" else luma[:, :48:2]
    for _ in range(4000):  # what threads do to each other, they do rarely
        assert np.array_equal(layout.planes(frame)[0], luma)


def test_alpha_is_read_where_it_is_used(tmp_path):
    codes = np.random.default_rng(1).integers(0, 256, (1, 4, 6, 4), dtype=np.uint8)
    path = raw(tmp_path / "a.mkv", codes, "rgba", "6x4", "-pix_fmt", "bgra")
    clip = open_video(path)
    assert clip.info.has_alpha
    assert torch.equal(next(iter(clip)) * 255, torch.from_numpy(codes[0]).permute(2, 0, 1).float())


def test_alpha_that_is_opaque_throughout_is_dropped(tmp_path):
    codes = np.full((1, 4, 6, 4), 255, np.uint8)
    path = raw(tmp_path / "a.mkv", codes, "rgba", "6x4", "-pix_fmt", "bgra")
    clip = open_video(path)
    assert not clip.info.has_alpha
    assert next(iter(clip)).shape == (3, 4, 6)


def test_webm_alpha_is_read(tmp_path):
    path = tmp_path / "a.webm"
    source = "testsrc2=s=32x32:d=0.1,format=yuva420p,geq=lum=lum(X\\,Y):a=X*8"
    ffmpeg("-f", "lavfi", "-i", source, "-c:v", "libvpx-vp9", "-auto-alt-ref", 0, path)
    alpha = frames_of(path)[0, 3]
    assert torch.allclose(alpha[16], torch.arange(32) * 8 / 255, atol=0.05)


def test_every_frame_of_a_variable_rate_file_comes_once_with_its_time(tmp_path):
    times = [0, 40, 47, 180, 500, 501, 900]  # ms
    expression = "+".join(f"eq(N\\,{n})*{time}" for n, time in enumerate(times))
    options = ["-vf", f"settb=1/1000,setpts={expression}", "-fps_mode", "passthrough"]
    options += ["-enc_time_base", "1/1000"]
    path = pattern(tmp_path / "a.mkv", *options, "-c:v", "ffv1", frames=7)
    clip = open_video(path)
    assert clip.info.frame_count == len(clip) == 7
    assert not clip.info.constant_rate
    assert clip.info.timestamps == pytest.approx([time / 1000 for time in times], abs=1e-9)
    video = torch.stack(list(clip))
    assert torch.equal(video, frames_of(pattern(tmp_path / "b.mkv", "-c:v", "ffv1", frames=7)))


@pytest.mark.parametrize(
    ("suffix", "rate"), [("mkv", "30000/1001"), ("mp4", "24"), ("ts", "24"), ("webm", "50")]
)
def test_constant_rate_is_recognised_behind_rounded_timestamps(tmp_path, suffix, rate):
    path = tmp_path / f"a.{suffix}"
    ffmpeg("-f", "lavfi", "-i", f"testsrc2=s=48x32:r={rate},trim=end_frame=9", path)
    info = open_video(path).info
    assert info.frame_count == 9
    assert info.constant_rate and info.fps == Fraction(rate)
    assert np.diff(info.timestamps) == pytest.approx(float(1 / Fraction(rate)))


@pytest.mark.parametrize(("quarters", "size"), [(1, "48:32"), (2, "47:31"), (3, "47:32")])
def test_frames_are_turned_upright(tmp_path, quarters, size):
    vp9 = ["-c:v", "libvpx-vp9", "-pix_fmt", "yuv420p"]
    stored = pattern(tmp_path / "a.mp4", *vp9, "-vf", f"scale={size},setsar=1")
    assert frames_of(stored).shape[2:] == tuple(map(int, size.split(":")[::-1]))
    turned = tmp_path / "b.mp4"
    ffmpeg("-display_rotation", 90 * quarters, "-i", stored, "-c", "copy", turned)
    expected = torch.rot90(frames_of(stored), quarters, (2, 3))
    clip = open_video(turned)
    assert (clip.info.height, clip.info.width) == expected.shape[2:]
    assert torch.allclose(torch.stack(list(clip)), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("rotation", "aspect", "width"), [(0, "4/3", 64), (0, "1/2", 24), (90, "2/1", 96)]
)
def test_pixels_become_square_at_the_displayed_size(tmp_path, rotation, aspect, width):
    stored = pattern(tmp_path / "a.mp4", "-vf", f"setsar={aspect}", frames=1)
    ffmpeg("-display_rotation", rotation, "-i", stored, "-c", "copy", tmp_path / "b.mp4")
    clip = open_video(tmp_path / "b.mp4")
    size = (clip.info.width, clip.info.height)
    assert size == ((32, width) if rotation else (width, 32))
    assert next(iter(clip)).shape[1:] == size[::-1]


def interlaced(path: Path, frames: int = 4) -> Path:
    """A bar that moves 3 pixels between the two fields of each frame."""
    position = 3 * np.arange(2 * frames)[:, None]
    fields = np.where(np.abs(np.arange(48) - 8 - position) < 5, 235, 16).astype(np.uint8)
    woven = np.stack([fields[k // 2 * 2 + np.arange(32) % 2] for k in range(0, 2 * frames, 2)])
    return raw(path, woven, "gray", "48x32", "-pix_fmt", "yuv444p", "-vf", "setfield=tff")


def test_interlaced_frames_become_whole(tmp_path):
    path = interlaced(tmp_path / "a.mkv")
    woven, whole = frames_of(path, deinterlace="off"), frames_of(path)
    assert open_video(path).info.interlaced
    assert whole.shape == woven.shape

    def combing(video: Tensor) -> Tensor:
        return (video[..., 1:, :] - video[..., :-1, :]).abs().mean()

    assert combing(whole) < 0.2 * combing(woven)


def test_progressive_frames_are_not_deinterlaced(tmp_path):
    path = pattern(tmp_path / "a.mp4")
    assert torch.equal(frames_of(path), frames_of(path, deinterlace="off"))


@pytest.mark.parametrize("make", [interlaced, pattern])
def test_a_cut_shows_what_the_whole_shows(tmp_path, make):
    path = make(tmp_path / "a.mkv", frames=6)
    cut = open_video(path, frames=(2, 5))
    assert cut.info.frame_count == 3
    assert cut.info.timestamps == pytest.approx([0, 0.04, 0.08])
    assert torch.equal(torch.stack(list(cut)), frames_of(path)[2:5])
    assert torch.equal(frames_of(path, frames=(4, None)), frames_of(path)[4:])


def test_a_source_can_be_read_again(tmp_path):
    clip = open_video(pattern(tmp_path / "a.mp4"))
    assert torch.equal(torch.stack(list(clip)), torch.stack(list(clip)))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux's list of open files")
def test_an_abandoned_iteration_leaves_no_file_open(tmp_path):
    path = pattern(tmp_path / "a.mp4", frames=50)

    def is_open() -> bool:
        return any(link.resolve() == path for link in Path("/proc/self/fd").iterdir())

    frames = iter(open_video(path))
    next(frames)
    assert is_open()
    frames.close()  # type: ignore[attr-defined]
    assert not is_open()


@pytest.mark.parametrize("name", ["%05d.png", "shot_%03d.png", "50%% off %d.png"])
def test_image_sequences_are_videos(tmp_path, name):
    folder = tmp_path / "100% frames"
    folder.mkdir()
    sequence = str(folder).replace("%", "%%") + "/" + name
    pattern(Path(sequence), "-start_number", 7, frames=11)
    whole = frames_of(pattern(tmp_path / "a.mkv", "-c:v", "ffv1", "-pix_fmt", "bgr0", frames=11))
    for path in (folder / name, folder):
        clip = open_video(path)
        assert clip.info.frame_count == 11
        assert torch.equal(torch.stack(list(clip)), whole)


def test_a_gap_in_a_sequence_is_named(tmp_path):
    pattern(tmp_path / "%03d.png")
    (tmp_path / "002.png").unlink()
    with pytest.raises(ValueError, match=r"002\.png is missing.*without gaps"):
        open_video(tmp_path)


def test_stills_of_any_size_are_clips_of_their_own(tmp_path):
    pattern(tmp_path / "b.jpg", frames=1)
    pattern(tmp_path / "a 7%.png", size="20x30", frames=1)
    (tmp_path / "notes.txt").write_text("not an image")
    stills = open_stills(tmp_path)
    assert [still.path.name for still in stills] == ["a 7%.png", "b.jpg"]
    assert [next(iter(still)).shape for still in stills] == [(3, 30, 20), (3, 32, 48)]
    with pytest.raises(ValueError, match="stills"):
        open_video(tmp_path)


@pytest.mark.parametrize("name", ["-i a:b.mp4", "100%d.mp4", 'it\'s "a" ü.mkv'])
def test_any_file_name_works(tmp_path, name, monkeypatch):
    ffmpeg_safe = pattern(tmp_path / "safe.mkv")
    ffmpeg_safe.rename(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    assert len(open_video(name)) == 4


def test_a_cover_is_not_taken_for_the_video(tmp_path, caplog):
    cover = pattern(tmp_path / "cover.png", size="80x80", frames=1)
    video = pattern(tmp_path / "a.mp4")
    both = tmp_path / "both.mp4"
    ffmpeg(
        "-i",
        cover,
        "-i",
        video,
        "-map",
        0,
        "-map",
        1,
        "-c",
        "copy",
        "-disposition:v:0",
        "attached_pic",
        both,
    )
    assert open_video(both).info.width == 48
    assert "cover" in caplog.text


@pytest.mark.parametrize(
    ("name", "share"),
    [
        ("a.mp4", 0.5),  # the index is missing
        ("a.mp4", 0.9),  # the index is cut
        ("index_first.mp4", 0.75),
        *((f"a.{suffix}", 0.6) for suffix in ("mkv", "avi", "webm", "png", "jpg", "webp", "gif")),
    ],
)
def test_truncated_files_are_refused(tmp_path, name, share):
    options = ["-movflags", "faststart"] if name.startswith("index_first") else []
    frames = 1 if name[2:] in ("png", "jpg", "webp") else 25
    path = pattern(tmp_path / name, *options, frames=frames)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ValueError, match="truncated"):
        open_video(path)


def test_damage_inside_a_file_is_reported_but_restored(tmp_path, caplog):
    path = pattern(tmp_path / "a.mkv", size="96x64", frames=30)
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 400] = bytes(400)
    path.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        open_video(path)
    assert "damaged" in caplog.text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.mp4", None, "does not exist"),
        ("empty.mp4", b"", "empty"),
        ("text.mp4", b"not a video " * 50, "not a video"),
        ("text.txt", b"not a video " * 50, "not a video"),
        ("noise.mkv", bytes(range(256)) * 20, "not a video"),
        ("zeros.mp4", bytes(4000), "not a video"),
    ],
)
def test_what_is_no_video_is_named(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        open_video(tmp_path / name)


def test_a_file_without_video_is_named(tmp_path):
    ffmpeg("-f", "lavfi", "-i", "sine=d=0.1", tmp_path / "a.wav")
    with pytest.raises(ValueError, match="no video stream, only audio"):
        open_video(tmp_path / "a.wav")


def test_a_folder_without_images_is_named(tmp_path):
    with pytest.raises(ValueError, match="contains no images"):
        open_video(tmp_path)
    with pytest.raises(ValueError, match=r"no image in .* is named like"):
        open_video(tmp_path / "%05d.png")
    with pytest.raises(ValueError, match="contains no images"):
        open_stills(tmp_path)


@pytest.mark.parametrize("frames", [(0, 5), (-1, 2), (2, 2), (3, 1), (4, None)])
def test_frames_outside_the_video_are_refused(tmp_path, frames):
    path = pattern(tmp_path / "a.mp4")
    with pytest.raises(ValueError, match="0:4"):
        open_video(path, frames=frames)


@pytest.mark.parametrize(("transfer", "name"), [("smpte2084", "PQ"), ("arib-std-b67", "HLG")])
def test_hdr_is_refused_with_a_conversion_that_works(tmp_path, transfer, name):
    tags = f"setparams=color_primaries=bt2020:color_trc={transfer}:colorspace=bt2020nc:range=tv"
    path = pattern(
        tmp_path / "a.mkv", "-vf", f"format=yuv420p10le,{tags}", "-c:v", "ffv1", frames=1
    )
    with pytest.raises(ValueError, match=rf"HDR \({name}\).*Convert it first: ffmpeg") as error:
        open_video(path)
    command = str(error.value).split("Convert it first: ffmpeg ")[1].split()
    converted = tmp_path / "SDR.mkv"
    ffmpeg(*[{"INPUT": path, "SDR.mkv": converted}.get(word, word) for word in command])
    assert open_video(converted).info.color.transfer == "bt709"


def test_a_change_of_size_is_refused(tmp_path):
    pattern(tmp_path / "%d.png", frames=2)
    pattern(tmp_path / "2.png", size="20x20", frames=1)
    with pytest.raises(ValueError, match="changes its frame size from 48x32 to 20x20 at frame 1"):
        open_video(tmp_path)
