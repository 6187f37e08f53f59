"""Results are judged by what ffmpeg, or this package's reader, finds in the files."""

import re
import subprocess
from fractions import Fraction
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from torch import Tensor

from star_core.video_io import VideoSource, open_sink, open_stills, open_video
from star_core.video_io.encoder import Encoder
from star_core.video_io.encoding import quantize
from star_core.video_io.planes import PlanarFormat


def ffmpeg(*arguments: object) -> str:
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, check=True, text=True).stdout


def description(path: Path) -> str:
    """What ffmpeg says about a file."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-i", str(path)]
    return subprocess.run(command, capture_output=True, text=True).stderr


def packets(path: Path, stream: str) -> str:
    """A checksum over the stored data of a stream."""
    return ffmpeg("-i", path, "-map", f"0:{stream}", "-c", "copy", "-f", "streamhash", "-")


def clip(path: Path, *options: object, frames: int = 4, size: str = "48x32") -> VideoSource:
    source = f"testsrc2=s={size}:r=25,trim=end_frame={frames}"
    ffmpeg("-f", "lavfi", "-i", source, *options, path)
    return open_video(path)


@pytest.fixture
def rich(tmp_path) -> VideoSource:
    """Half a second with two audio tracks, subtitles, chapters and metadata."""
    (tmp_path / "s.srt").write_text("1\n00:00:00,100 --> 00:00:00,300\nhello\n")
    chapters = "".join(
        f"[CHAPTER]\nTIMEBASE=1/1000\nSTART={start}\nEND={start + 240}\ntitle=part {start}\n"
        for start in (0, 240)
    )
    meta = f";FFMETADATA1\ntitle=Home\nodd key=odd value\n{chapters}"
    (tmp_path / "m.txt").write_text(meta)
    inputs = [f"testsrc2=s=48x32:r=25,trim=end_frame={12}", "sine=d=0.5", "sine=f=880:d=0.5"]
    path = tmp_path / "rich.mkv"
    ffmpeg(
        *(word for source in inputs for word in ("-f", "lavfi", "-i", source)),
        *("-i", tmp_path / "s.srt", "-i", tmp_path / "m.txt"),
        *("-map", 0, "-map", 1, "-map", 2, "-map", 3, "-map_metadata", 4),
        *("-c:v", "ffv1", "-pix_fmt", "bgr0", "-c:a:0", "aac", "-c:a:1", "libopus"),
        *("-metadata:s:a:0", "language=fra", "-metadata:s:a:1", "title=Kommentar", path),
    )
    return open_video(path)


def copy(source: VideoSource, path: Path, **options) -> Path:
    """Write the source's own frames."""
    size = {"width": source.info.width, "height": source.info.height}
    with open_sink(path, **size, source=source, alpha=source.info.has_alpha, **options) as sink:
        for frame in source:
            sink.write(frame)
    return path


def stack(source: VideoSource | Path) -> Tensor:
    return torch.stack(list(open_video(source) if isinstance(source, Path) else source))


@pytest.mark.parametrize(
    ("pixel_format", "name"),
    [("bgr0", "out.mkv"), ("bgra", "out.mkv"), ("bgr0", "out"), ("bgra", "out_%03d.png")],
)
def test_lossless_outputs_return_every_bit(tmp_path, pixel_format, name):
    codes = np.random.default_rng(0).integers(0, 256, (3, 5, 7, 4), dtype=np.uint8)
    raw = ["-f", "rawvideo", "-pix_fmt", "bgra", "-s", "7x5", "-i", tmp_path / "raw"]
    (tmp_path / "raw").write_bytes(codes.tobytes())
    ffmpeg(*raw, "-c:v", "ffv1", "-pix_fmt", pixel_format, tmp_path / "in.mkv")
    source = open_video(tmp_path / "in.mkv")
    result = stack(copy(source, tmp_path / name))
    channels = [2, 1, 0, 3] if pixel_format == "bgra" else [2, 1, 0]
    expected = torch.from_numpy(codes[..., channels]).permute(0, 3, 1, 2)
    assert torch.equal((result * 255).round(), expected.float())


@pytest.mark.parametrize("alpha", [False, True])
@pytest.mark.parametrize("bits", [10, 12, 16])
def test_matroska_keeps_the_bits_of_the_source(tmp_path, bits, alpha):
    channels, layout = 3 + alpha, PlanarFormat("rgb", bits, alpha)
    codes = np.random.default_rng(0).integers(0, 2**bits, (2, channels, 5, 7), dtype=np.uint16)
    raw = ["-f", "rawvideo", "-pix_fmt", layout.name, "-s", "7x5", "-i", tmp_path / "raw"]
    (tmp_path / "raw").write_bytes(codes.tobytes())
    ffmpeg(*raw, "-c:v", "ffv1", tmp_path / "in.mkv")
    source = open_video(tmp_path / "in.mkv")
    assert source.info.bit_depth == bits
    out = open_video(copy(source, tmp_path / "out.mkv"))
    assert out.info.bit_depth == bits and torch.equal(stack(out), stack(source))


@pytest.mark.parametrize(
    ("name", "options", "stored"),
    [
        ("a.mkv", {}, r"ffv1.*bgr0\(pc, gbr/bt709/bt709"),
        ("a.mp4", {}, r"h264.*yuv420p\(tv, smpte170m/bt709/bt709"),
        ("a.mp4", {"codec": "h264"}, r"h264.*yuv420p\("),
        ("a.mp4", {"codec": "h265"}, r"hevc.*hvc1.*yuv420p10le\(tv, smpte170m/bt709/bt709"),
        ("a.mov", {}, r"prores \(HQ\).*yuv422p10le\(tv, smpte170m/bt709/bt709"),
        ("a.mov", {"alpha": True}, r"prores \(4444\).*yuva444p1\dle\(tv, smpte170m/bt709/bt709"),
        ("a.mkv", {"alpha": True}, r"ffv1.*bgra\(pc"),
        ("a.webm", {}, r"vp9.*yuv420p\(tv, smpte170m/bt709/bt709"),
    ],
)
def test_format_follows_the_extension_and_is_tagged(tmp_path, name, options, stored):
    # Smooth colours: what differs then is more than subsampling of chroma.
    y, x = torch.meshgrid(torch.linspace(0, 1, 32), torch.linspace(0, 1, 48), indexing="ij")
    frame = torch.stack([x, y, 1 - x, y][: 4 if options.get("alpha") else 3])
    with open_sink(tmp_path / name, width=48, height=32, fps=Fraction(25), **options) as sink:
        for _ in range(3):
            sink.write(frame)
    assert re.search(stored, description(tmp_path / name))
    result = stack(tmp_path / name)
    assert result.shape == (3, *frame.shape)
    assert (result - frame).abs().mean() < 2 / 255
    assert (result - frame).mean().abs() < 0.3 / 255


@pytest.mark.parametrize(("height", "matrix"), [(576, "smpte170m"), (578, "bt709")])
def test_matrix_changes_with_the_size_and_colours_stay(tmp_path, height, matrix):
    source = clip(tmp_path / "in.mkv", "-c:v", "ffv1", "-pix_fmt", "yuv444p", frames=1)
    assert source.info.color.matrix == "smpte170m"
    red = torch.tensor([0.9, 0.1, 0.2])[:, None, None].expand(3, height, 64)
    with open_sink(tmp_path / "a.mp4", width=64, height=height, source=source) as sink:
        sink.write(red)
    assert f"(tv, {matrix}/" in description(tmp_path / "a.mp4").replace(
        "(tv, bt709,", "(tv, bt709/"
    )
    assert (stack(tmp_path / "a.mp4") - red).abs().mean() < 1 / 255


@pytest.mark.parametrize(
    ("primaries", "transfer"),
    [("smpte170m", "iec61966-2-1"), ("bt470bg", "bt470m"), ("bt2020", "bt2020-10")],
)
def test_primaries_and_transfer_of_the_source_are_kept(tmp_path, primaries, transfer):
    tags = f"setparams=color_primaries={primaries}:color_trc={transfer}:colorspace=bt709"
    source = clip(tmp_path / "in.mkv", "-vf", f"format=yuv420p,{tags}", "-c:v", "ffv1", frames=1)
    color = open_video(copy(source, tmp_path / "a.mp4")).info.color
    assert (color.primaries, color.transfer) == (primaries, transfer)


def variable_rate(path: Path, times: list[int]) -> VideoSource:
    """A clip with timestamps in ms."""
    expression = "+".join(f"eq(N\\,{n})*{time}" for n, time in enumerate(times))
    return clip(
        path,
        *("-vf", f"settb=1/1000,setpts={expression}", "-fps_mode", "passthrough"),
        *("-enc_time_base", "1/1000", "-c:v", "ffv1"),
        frames=len(times),
    )


@pytest.mark.parametrize(
    ("name", "codec"),
    [("a.mkv", None), ("a.mp4", None), ("a.mov", None), ("a.webm", None), ("b.mp4", "h265")],
)
def test_timestamps_of_variable_rate_sources_are_kept(tmp_path, name, codec):
    times = [0, 40, 47, 180, 500, 501, 900]
    source = variable_rate(tmp_path / "in.mkv", times)
    info = open_video(copy(source, tmp_path / name, codec=codec)).info
    assert info.timestamps == pytest.approx([time / 1000 for time in times], abs=0.001)


def test_a_late_first_frame_stays_late(tmp_path):
    sound = ["-f", "lavfi", "-i", "sine=d=0.5", "-c:a", "aac"]
    source = clip(tmp_path / "in.mp4", *sound, "-vf", "setpts=PTS+0.2/TB", "-bf", 0)
    assert source.info.timestamps[0] == pytest.approx(0.2, abs=0.03)
    for name in ("a.mkv", "a.mp4"):
        info = open_video(copy(source, tmp_path / name)).info
        assert info.timestamps == pytest.approx(source.info.timestamps, abs=0.001)


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.mov", "a.webm"])
def test_constant_rates_stay_exact(tmp_path, name):
    source = clip(tmp_path / "in.mkv", "-r", "30000/1001", frames=9)
    info = open_video(copy(source, tmp_path / name)).info
    assert info.constant_rate and info.fps == Fraction(30000, 1001)
    assert "29.97 fps" in description(tmp_path / name)


def test_sound_subtitles_chapters_and_metadata_are_carried_untouched(tmp_path, rich):
    out = copy(rich, tmp_path / "out.mkv")
    for stream in ("a:0", "a:1", "s:0"):
        assert packets(out, stream) == packets(rich.path, stream)
    text = description(out)
    for tag in ("title *: Home", "ODD_KEY *: odd value", r"Audio: aac", r"\(fra\)", "Kommentar"):
        assert re.search(tag, text), tag
    assert re.findall(r"start (\S+), end (\S+)", text) == [
        ("0.000000", "0.240000"),
        ("0.240000", "0.480000"),
    ]
    assert "part 240" in text


@pytest.mark.parametrize("name", ["out.mp4", "out.mov"])
def test_what_a_container_can_carry_of_it_is_carried(tmp_path, rich, name):
    plain = tmp_path / "plain.mkv"
    ffmpeg("-i", rich.path, "-map", "0:v", "-map", "0:a:0", "-c", "copy", plain)
    out = copy(open_video(plain), tmp_path / name)
    assert packets(out, "a:0") == packets(plain, "a:0")
    text = description(out)
    for tag in (
        "title *: Home",
        "odd value",
        r"\(fra\)",
        "start 0.240000, end 0.480000",
        "part 240",
    ):
        assert re.search(tag, text), tag


@pytest.mark.parametrize("name", ["out.mp4", "out.mov", "out.mkv"])
def test_date_and_language_are_carried_once(tmp_path, name):
    date = "2020-01-02T03:04:05.000000Z"
    tags = ["-metadata", f"creation_time={date}", "-metadata:s:v:0", "language=fra"]
    text = description(copy(clip(tmp_path / "in.mp4", *tags), tmp_path / name))
    assert re.search(rf"  creation_time *: {date}$", text, re.MULTILINE)
    assert "(fra): Video" in text or name == "out.mov"


@pytest.mark.parametrize(
    ("name", "streams"), [("out.mp4", "subtitle"), ("out.mov", "audio.*subtitle")]
)
def test_streams_that_a_container_cannot_carry_are_refused_at_once(tmp_path, rich, name, streams):
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match=rf"cannot carry .*{streams}.*\.mkv"):
        open_sink(tmp_path / name, width=48, height=32, source=rich)
    assert sorted(tmp_path.iterdir()) == before


def test_mp4_subtitles_become_srt_in_matroska(tmp_path, rich):
    ffmpeg(
        "-i",
        rich.path,
        "-map",
        "0:v",
        "-map",
        "0:s",
        "-c:v",
        "mpeg4",
        "-c:s",
        "mov_text",
        tmp_path / "a.mp4",
    )
    out = copy(open_video(tmp_path / "a.mp4"), tmp_path / "out.mkv")
    assert "hello" in ffmpeg("-i", out, "-map", "0:s", "-f", "srt", "-")


def test_a_cut_takes_its_part_of_the_sound_and_chapters(tmp_path, rich):
    source = open_video(rich.path, frames=(3, 9))  # 0.12 to 0.36 s
    out = copy(source, tmp_path / "out.mkv")
    assert torch.equal(stack(out), stack(rich)[3:9])
    assert open_video(out).info.timestamps[0] < 0.001
    text = description(out)
    assert re.findall(r"start (\S+), end (\S+)", text) == [
        ("0.000000", "0.120000"),
        ("0.120000", "0.240000"),
    ]
    seconds = 60 * float(text.split("Duration: 00:")[1][:2]) + float(
        text.split("Duration: 00:00:")[1][:5]
    )
    assert seconds == pytest.approx(0.24, abs=0.05)


@pytest.mark.parametrize("name", ["out.mkv", "out.mov"])
def test_the_sound_of_a_cut_stays_in_step(tmp_path, name):
    # A sound whose value is the time.
    sound = ["-f", "lavfi", "-i", "aevalsrc=t:d=0.6:s=8000", "-c:a", "pcm_s16le"]
    clip(tmp_path / "in.mov", *sound, frames=15)
    out = copy(open_video(tmp_path / "in.mov", frames=(5, 15)), tmp_path / name)
    padded = ["-map", "0:a", "-af", "aresample=async=1:first_pts=0"]
    ffmpeg("-i", out, *padded, "-f", "s16le", tmp_path / "a.raw")
    wave = np.frombuffer((tmp_path / "a.raw").read_bytes(), np.int16) / 32767
    assert wave[8000 // 10] == pytest.approx(0.2 + 0.1, abs=0.002)


def test_odd_sizes_keep_full_chroma_and_say_so(tmp_path, caplog):
    source = clip(tmp_path / "in.mkv", "-vf", "scale=37:33,setsar=1", "-pix_fmt", "yuv444p")
    for codec, stored in ((None, "yuv444p("), ("h265", "yuv444p10le(")):
        out = copy(source, tmp_path / f"{codec}.mp4", codec=codec)
        assert stored in description(out)
        assert "37x33 is odd" in caplog.text
        assert open_video(out).info.width == 37
    assert open_video(copy(source, tmp_path / "a.mov")).info.height == 33


@pytest.mark.parametrize("size", ["1x1", "1x9", "16x2"])
@pytest.mark.parametrize("name", ["a.mkv", "a.mp4", "a.mov"])
def test_the_smallest_sizes_can_be_written(tmp_path, name, size):
    width, height = map(int, size.split("x"))
    with open_sink(tmp_path / name, width=width, height=height, fps=Fraction(25)) as sink:
        for _ in range(2):
            sink.write(torch.rand(3, height, width))
    assert stack(tmp_path / name).shape == (2, 3, height, width)


def test_stills_keep_their_names_and_sizes(tmp_path):
    (tmp_path / "in").mkdir()
    clip(tmp_path / "in" / "b.jpg", frames=1)
    clip(tmp_path / "in" / "a 7%.png", frames=1, size="20x30")
    for still in open_stills(tmp_path / "in"):
        copy(still, tmp_path / "out" / f"{still.path.stem}.png")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a 7%.png", "b.png"]
    stills = open_stills(tmp_path / "out")
    assert [(still.info.width, still.info.height) for still in stills] == [(20, 30), (48, 32)]


def test_one_png_cannot_hold_a_video(tmp_path):
    source = clip(tmp_path / "in.mkv")
    with pytest.raises(ValueError, match="holds one frame"):
        open_sink(tmp_path / "a.png", width=48, height=32, source=source)


def test_new_frames_replace_all_old_ones(tmp_path):
    folder = tmp_path / "out"
    copy(clip(tmp_path / "long.mkv", frames=4), folder)
    (folder / "notes.txt").write_text("keep me")
    short = clip(tmp_path / "short.mkv", frames=2)
    with pytest.raises(ValueError, match="exists already"):
        copy(short, folder)
    assert len(list(folder.iterdir())) == 5
    copy(short, folder, overwrite=True)
    assert sorted(path.name for path in folder.iterdir()) == ["00001.png", "00002.png", "notes.txt"]


@pytest.mark.parametrize("name", ["a.mkv", "out/00001.png"])
def test_an_existing_file_is_kept_unless_overwritten(tmp_path, name):
    source = clip(tmp_path / "in.mkv", frames=1)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match="exists already"):
        copy(source, tmp_path / name)
    assert (tmp_path / name).read_text() == "mine"
    copy(source, tmp_path / name, overwrite=True)
    assert len(open_video(tmp_path / name)) == 1


def test_a_result_may_replace_its_source(tmp_path):
    source = clip(tmp_path / "a.mkv", "-c:v", "ffv1", "-pix_fmt", "bgr0")
    before = stack(source)
    copy(source, tmp_path / "a.mkv", overwrite=True)
    assert torch.equal(stack(tmp_path / "a.mkv"), before)


@pytest.mark.parametrize("name", ["a.avi", "a.gif", "a.jpg", "a.matroska"])
def test_other_extensions_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match=r"cannot write .*\.mkv"):
        open_sink(tmp_path / name, width=8, height=8, fps=Fraction(25))


@pytest.mark.parametrize(("name", "codec"), [("a.mkv", "h265"), ("a.mp4", "vp9"), ("out", "h264")])
def test_codecs_without_a_place_are_refused(tmp_path, name, codec):
    with pytest.raises(ValueError, match=r"h264 and h265 go into \.mp4"):
        open_sink(tmp_path / name, width=8, height=8, fps=Fraction(25), codec=codec)


def test_alpha_is_not_dropped_in_silence(tmp_path):
    with pytest.raises(ValueError, match=r"cannot carry alpha.*\.mkv"):
        open_sink(tmp_path / "a.mp4", width=8, height=8, fps=Fraction(25), alpha=True)


@pytest.mark.parametrize(
    "name", ["none/a.mkv", "file/a.mkv", "folder.mp4", "x" * 300 + ".mkv", "none/none/%05d.png"]
)
def test_places_that_cannot_be_written_are_named_at_once(tmp_path, name):
    (tmp_path / "file").write_text("not a folder")
    (tmp_path / "folder.mp4").mkdir()
    with pytest.raises(ValueError, match="cannot be written|is a folder"):
        open_sink(tmp_path / name, width=8, height=8, fps=Fraction(25))


@pytest.mark.parametrize(
    ("name", "error"),
    [("a.mkv", KeyboardInterrupt), ("a.mp4", RuntimeError), ("out/%05d.png", KeyboardInterrupt)],
)
def test_an_interruption_leaves_nothing_behind(tmp_path, monkeypatch, name, error):
    started = []

    class Recorded(subprocess.Popen):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            started.append(self)

    monkeypatch.setattr(subprocess, "Popen", Recorded)
    with (
        pytest.raises(error),
        open_sink(tmp_path / name, width=48, height=32, fps=Fraction(25)) as sink,
    ):
        for _ in range(5):
            sink.write(torch.rand(3, 32, 48))
        raise error
    assert list(tmp_path.iterdir()) == []
    assert started and all(process.returncode is not None for process in started)


def test_nothing_has_its_name_before_it_is_complete(tmp_path):
    with open_sink(tmp_path / "a.mkv", width=8, height=8, fps=Fraction(25)) as sink:
        sink.write(torch.rand(3, 8, 8))
        assert not (tmp_path / "a.mkv").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["a.mkv"]


def test_the_death_of_ffmpeg_is_reported(tmp_path):
    sink = open_sink(tmp_path / "a.mkv", width=256, height=256, fps=Fraction(25))
    with pytest.raises(ValueError, match="ffmpeg stopped with code"), sink:
        sink._encoder._process.kill()
        for _ in range(5):
            sink.write(torch.zeros(3, 256, 256))
    assert list(tmp_path.iterdir()) == []


def test_frames_that_are_not_finite_are_refused(tmp_path):
    frame = torch.full((3, 8, 8), float("nan"))
    with (
        pytest.raises(ValueError, match="frame 0 is not finite"),
        open_sink(tmp_path / "a.mkv", width=8, height=8, fps=Fraction(25)) as sink,
    ):
        sink.write(frame)


@pytest.mark.parametrize(
    "name", ["-y a:b.mp4", "100%d.mov", 'it\'s "a" ü.mkv', "5%% %03d.png", "50%"]
)
def test_any_file_name_works(tmp_path, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with open_sink(name, width=8, height=8, fps=Fraction(25)) as sink:
        sink.write(torch.rand(3, 8, 8))
    assert len(open_video(name)) == 1


LUMA = PlanarFormat("yuv", 8)


def codes(frame: Tensor, layout: PlanarFormat = LUMA, **options) -> np.ndarray:
    defaults = {"matrix": "bt709", "rounding": "round", "seed": 0, "index": 0}
    return np.frombuffer(quantize(frame, layout, **{**defaults, **options}), np.uint8)


def test_dither_is_right_on_average_and_leaves_exact_values_alone():
    grey = torch.full((3, 64, 64), 0.3)  # luma 81.7
    luma = codes(grey)[: 64 * 64]
    assert set(luma) == {81, 82}
    assert luma.mean() == pytest.approx(81.7, abs=0.03)
    assert set(codes(torch.zeros(3, 8, 8))[:64]) == {16}
    assert set(codes(torch.ones(3, 8, 8))[:64]) == {235}


def test_dither_depends_on_seed_and_frame_number_only():
    frame = torch.full((3, 16, 16), 0.3)
    assert np.array_equal(codes(frame, index=7), codes(frame, index=7))
    assert not np.array_equal(codes(frame, index=7), codes(frame, index=8))
    assert not np.array_equal(codes(frame, seed=1), codes(frame, seed=2))


def test_the_preview_of_a_cut_is_dithered_like_the_whole(tmp_path, monkeypatch):
    sent: dict[int, list[bytes]] = {}
    source = clip(tmp_path / "in.mkv", frames=4)
    for start in (0, 2):
        sink = open_sink(
            tmp_path / f"{start}.mp4",
            width=48,
            height=32,
            source=open_video(source.path, frames=(start, 4)),
        )
        sent[start] = []
        add = Encoder.add

        def record(self, data, time, duration, to=sent[start], add=add):
            to.append(data)
            add(self, data, time, duration)

        with monkeypatch.context() as patched, sink:
            patched.setattr(Encoder, "add", record)
            for _ in range(start, 4):
                sink.write(torch.full((3, 32, 48), 0.3))
    assert sent[0][2:] == sent[2] and sent[0][0] != sent[0][1]


def test_lossless_outputs_are_rounded_without_dither():
    frame = torch.full((3, 8, 8), 100.4 / 255)
    assert set(codes(frame, PlanarFormat("rgb"))) == {100}
    assert set(codes(torch.full((3, 8, 8), 100.6 / 255), PlanarFormat("rgb"))) == {101}


def test_truncation_is_the_reference_way():
    rgb = PlanarFormat("rgb")
    assert set(codes(torch.full((3, 8, 8), 100.9 / 255), rgb, rounding="truncate")) == {100}
    exact = (torch.arange(256) / 255).expand(3, 1, 256)
    assert np.array_equal(codes(exact, rgb, rounding="truncate")[:256], np.arange(256))
    grey = torch.full((3, 8, 8), 0.3)
    assert len(set(codes(grey, rounding="truncate")[:64])) == 1
