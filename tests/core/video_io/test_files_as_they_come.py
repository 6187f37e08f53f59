"""Cameras, screen recorders and image editors write files in which something is unusual."""

import gc
import logging
import os
import re
import shutil
import struct
import subprocess
import sys
import zlib
from fractions import Fraction
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from torch import Tensor

from star_core.video_io import VideoSource, open_sink, open_video
from star_core.video_io.decoding import decode
from star_core.video_io.timing import timing

TS = ("-c:v", "mpeg2video", "-b:v", "500k", "-c:a", "mp2")


def ffmpeg(*arguments: object, data: bytes | None = None) -> bytes:
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", *map(str, arguments)]
    return subprocess.run(command, input=data, capture_output=True, check=True).stdout


def log_of(*arguments: object) -> str:
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True).stderr


def film(path: Path, *options: object, frames: int = 6, rate: int = 25) -> Path:
    picture = f"testsrc2=s=48x32:r={rate},trim=end_frame={frames}"
    ffmpeg("-f", "lavfi", "-i", picture, *options, path)
    return path


def raw(path: Path, codes: np.ndarray, pixel_format: str, size: str, *options: object) -> Path:
    source = ["-f", "rawvideo", "-pix_fmt", pixel_format, "-s", size, "-r", 25, "-i", "-"]
    ffmpeg(*source, *options, path, data=codes.tobytes())
    return path


def stack(source: VideoSource | Path) -> Tensor:
    return torch.stack(list(open_video(source) if isinstance(source, Path) else source))


def copy(source: VideoSource, path: Path, **options) -> Path:
    info = source.info
    with open_sink(path, width=info.width, height=info.height, source=source, **options) as sink:
        for frame in source:
            sink.write(frame)
    return path


def packet_times(path: Path, stream: str) -> list[float]:
    """The times of a stream's packets, on the clock of all its file's streams."""
    options = ["-copyts", "-i", path, "-map", "0", "-c", "copy", "-f", "framecrc", "-"]
    lines = ffmpeg(*options).decode().splitlines()
    units = {
        m[1]: float(m[2]) / float(m[3])
        for line in lines
        if (m := re.match(r"#tb (\d+): (\d+)/(\d+)", line))
    }
    rows = [line.split(",") for line in lines if not line.startswith("#")]
    return sorted(int(row[2]) * units[stream] for row in rows if row[0].strip() == stream)


@pytest.mark.parametrize("name", ["tc.mov", "tc.mp4"])
def test_a_track_of_timecode_is_no_hindrance(tmp_path, name):
    sound = ["-f", "lavfi", "-i", "sine=d=0.24", "-c:a", "aac"] if name == "tc.mov" else []
    path = film(tmp_path / name, *sound, "-timecode", "01:00:00:00")
    assert "Data: none (tmcd" in log_of("-i", path)
    source = open_video(path)
    assert len(source) == 6
    assert [stream.codec for stream in source.header.streams] == ["aac"] * bool(sound)
    log = log_of("-i", copy(source, tmp_path / "a.mkv"))
    assert re.search("timecode *: 01:00:00:00", log, re.IGNORECASE)
    assert ("Audio: aac" in log) == bool(sound)


def screen_recording(path: Path, times: list[int]) -> Path:
    """Frames at times in ms, in a file whose nominal rate is 60."""
    expression = "+".join(f"eq(N\\,{n})*{time}" for n, time in enumerate(times))
    return film(
        path,
        *("-bsf:v", f"setts=ts='{expression}':duration=16", "-enc_time_base", "1/1000"),
        *("-fps_mode", "passthrough", "-c:v", "libx264", "-bf", 0),
        frames=len(times),
        rate=60,
    )


def test_one_doubled_timestamp_does_not_change_the_others(tmp_path, caplog):
    times = [round(1000 * k / 15) for k in range(12)]
    doubled = [*times[:7], times[6], *times[8:]]
    source = open_video(screen_recording(tmp_path / "a.mkv", doubled))
    assert "1 of 12 timestamps" in caplog.text
    out = open_video(copy(source, tmp_path / "b.mkv"))
    for found in (source, out):
        others = [time for k, time in enumerate(found.info.timestamps) if k != 7]
        assert others == pytest.approx([t / 1000 for t in times[:7] + times[8:]], abs=1e-3)
        assert times[6] / 1000 < found.info.timestamps[7] < times[8] / 1000


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ([0, None, 80, 200], [0, 40, 80, 200]),
        ([0, 40, 30, 35, 200], [0, 30, 35, 117.5, 200]),
        ([0, 90, 9000, 150, 200], [0, 90, 120, 150, 200]),
        ([None, 50, 90, None], [10, 50, 90, 130]),
        ([None, 50, None], [10, 50, 90]),
    ],
)
def test_frames_without_a_good_time_lie_between_their_neighbours(caplog, times, expected):
    found = timing("a.mkv", times, Fraction(1, 1000), Fraction(25), 40)
    if times == [0, 40, 30, 35, 200]:  # as many are kept as possible
        assert sorted(found.timestamps) == list(found.timestamps)
        assert {0.03, 0.035} <= set(found.timestamps)
    else:
        assert [1000 * time for time in found.timestamps] == pytest.approx(expected, abs=0.7)
    bad = sum(time is None for time in times) or 1
    assert f"{bad} of {len(times)} timestamps" in caplog.text


def test_the_nominal_rate_counts_where_there_are_no_times(tmp_path, caplog):
    info = open_video(film(tmp_path / "a.h264", "-c:v", "libx264", rate=50)).info
    assert info.timestamps == pytest.approx([k / 50 for k in range(6)])
    assert "no timestamps" in caplog.text


def test_times_closer_than_matroska_can_store_are_refused(tmp_path):
    path = film(tmp_path / "a.mp4", "-video_track_timescale", 4000, rate=2000)
    source = open_video(path)
    assert np.diff(source.info.timestamps) == pytest.approx(0.0005)
    with pytest.raises(ValueError, match=r"0\.5 ms apart.*write \.mp4 or \.mov"):
        open_sink(tmp_path / "b.mkv", width=48, height=32, source=source)
    info = open_video(copy(source, tmp_path / "b.mp4")).info
    assert info.timestamps == pytest.approx(source.info.timestamps, abs=1e-6)


def joined_recordings(tmp_path: Path, picture: int, sound: int) -> Path:
    """Two recordings; the first has `picture` seconds of picture and `sound` of sound."""
    beep = r"aevalsrc='if(lt(t\,0.1)\,sin(12000*t)\,0)':d=1"
    recordings = []
    for name, video, audio in (
        ("1.ts", f"testsrc2=s=48x32:r=25:d={picture}", f"sine=d={sound}"),
        ("2.ts", "color=white:s=48x32:r=25:d=1", beep),
    ):
        ffmpeg("-f", "lavfi", "-i", video, "-f", "lavfi", "-i", audio, *TS, tmp_path / name)
        recordings.append((tmp_path / name).read_bytes())
    (tmp_path / "joined.ts").write_bytes(b"".join(recordings))
    return tmp_path / "joined.ts"


@pytest.mark.parametrize(("picture", "sound"), [(1, 2), (2, 1)])
def test_picture_and_sound_of_joined_recordings_stay_together(tmp_path, caplog, picture, sound):
    path = joined_recordings(tmp_path, picture, sound)
    ffmpeg("-i", path, "-c", "copy", tmp_path / "plain.mkv")
    out = copy(open_video(path), tmp_path / "out.mkv")
    for stream in "01":
        expected = packet_times(tmp_path / "plain.mkv", stream)
        assert packet_times(out, stream) == pytest.approx(expected, abs=0.0015)
    assert "damaged" not in caplog.text


def test_a_cut_of_joined_recordings_takes_their_sound(tmp_path):
    path = joined_recordings(tmp_path, 1, 2)
    source = open_video(path)
    part = copy(source.cut(range(30, 45)), tmp_path / "part.mkv")
    assert (stack(part) - stack(source)[30:45]).abs().max() < 0.6 / 255
    whole = packet_times(copy(source, tmp_path / "whole.mkv"), "1")
    begin = source.info.timestamps[30]
    expected = [time - begin for time in whole if time >= begin]
    found = packet_times(part, "1")
    assert found[-1] == pytest.approx(0.6, abs=0.06)
    assert found == pytest.approx(expected[: len(found)], abs=0.0015)


def test_the_range_may_change_within_a_video(tmp_path, caplog):
    grey = "nullsrc=s=48x32:r=25:d=0.2,geq=lum=60:cb=128:cr=128,format=yuv420p"
    for span in ("tv", "pc"):
        tagged = f"{grey},setparams=range={span}:colorspace=bt709"
        ffmpeg("-f", "lavfi", "-i", tagged, "-c:v", "libx264", "-qp", 0, tmp_path / f"{span}.ts")
    parts = [(tmp_path / f"{span}.ts").read_bytes() for span in ("tv", "pc")]
    (tmp_path / "a.ts").write_bytes(b"".join(parts))
    levels = (stack(tmp_path / "a.ts") * 255).round()[:, 0, 5, 5].tolist()
    assert levels == [51] * 5 + [60] * 5
    assert not caplog.records


def test_the_widest_layout_of_a_sequence_holds_all_of_it(tmp_path, caplog):
    picture = np.random.default_rng(0).integers(0, 256, (4, 6, 4), dtype=np.uint8)
    deep = np.full((4, 6), 12345, np.uint16)
    raw(tmp_path / "1.png", picture[..., 0], "gray", "6x4", "-frames:v", 1)
    raw(tmp_path / "2.png", picture[..., :3], "rgb24", "6x4", "-frames:v", 1)
    raw(tmp_path / "3.png", picture, "rgba", "6x4", "-frames:v", 1)
    raw(tmp_path / "4.png", deep, "gray16le", "6x4", "-pix_fmt", "gray16be", "-frames:v", 1)
    source = open_video(tmp_path)
    assert source.info.has_alpha and source.info.bit_depth == 16
    gray, rgb, rgba, deep_gray = stack(source)
    codes = torch.from_numpy(picture).permute(2, 0, 1) / 255
    assert torch.allclose(gray[:3], codes[:1].expand(3, 4, 6)) and (gray[3] == 1).all()
    assert torch.allclose(rgb[:3], codes[:3]) and (rgb[3] == 1).all()
    assert torch.allclose(rgba, codes)
    assert torch.allclose(deep_gray[:3], torch.tensor(12345 / 65535))
    assert not caplog.records


def oriented(path: Path, tag: int) -> Path:
    """A JPEG image with an orientation tag, as cameras write it."""
    entry = struct.pack(">HHIHH", 0x112, 3, 1, tag, 0)
    exif = b"Exif\0\0MM\0*" + struct.pack(">IH", 8, 1) + entry + bytes(4)
    data = path.read_bytes()
    path.write_bytes(data[:2] + struct.pack(">HH", 0xFFE1, len(exif) + 2) + exif + data[2:])
    return path


def test_each_image_is_turned_as_it_says(tmp_path):
    a = np.zeros((32, 48, 3), np.uint8)
    a[:16, :, 0], a[16:, :24, 1] = 255, 255
    for k in range(4):
        raw(tmp_path / f"{k}.jpg", a, "rgb24", "48x32", "-pix_fmt", "yuvj444p", "-q:v", 2)
    oriented(tmp_path / "1.jpg", 3)
    oriented(tmp_path / "2.jpg", 2)
    plain, turned, mirrored, last = stack(tmp_path)
    assert torch.equal(last, plain)
    assert torch.equal(turned, plain.flip(1, 2))
    assert torch.equal(mirrored, plain.flip(2))


@pytest.mark.parametrize("tag", range(1, 9))
def test_every_exif_orientation_is_heeded(tmp_path, tag):
    picture = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    path = raw(tmp_path / "a.jpg", picture, "rgb24", "24x16", "-pix_fmt", "yuvj444p", "-q:v", 2)
    plain = stack(path)[0]
    # Exif 2.32, table 7: where the 0th row and the 0th column of the stored image are.
    upright = {
        1: plain,
        2: plain.flip(2),
        3: plain.flip(1, 2),
        4: plain.flip(1),
        5: plain.transpose(1, 2),
        6: plain.transpose(1, 2).flip(2),
        7: plain.transpose(1, 2).flip(1, 2),
        8: plain.transpose(1, 2).flip(1),
    }
    assert torch.equal(stack(oriented(path, tag))[0], upright[tag])


def test_a_turn_that_changes_the_size_is_named(tmp_path):
    picture = np.zeros((16, 24, 3), np.uint8)
    for k in range(3):
        raw(tmp_path / f"{k}.jpg", picture, "rgb24", "24x16", "-pix_fmt", "yuvj444p")
    oriented(tmp_path / "2.jpg", 6)
    with pytest.raises(ValueError, match="from 24x16 to 16x24 at frame 2: cut it there"):
        open_video(tmp_path)


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        (["-vf", "setsar=1"], ["-vf", "setsar=2"], "aspect from 1 to 2"),
        (
            ["-vf", "setparams=color_trc=bt709"],
            ["-vf", "setparams=color_trc=smpte2084"],
            "range from SDR to PQ",
        ),
    ],
)
def test_a_change_of_aspect_or_of_hdr_is_named(tmp_path, first, second, words):
    for name, options in (("1.ts", first), ("2.ts", second)):
        film(tmp_path / name, *options, "-c:v", "libx264")
    joined = tmp_path / "joined.ts"
    joined.write_bytes((tmp_path / "1.ts").read_bytes() + (tmp_path / "2.ts").read_bytes())
    with pytest.raises(ValueError, match=rf"changes its.*{words} at frame 6: cut it there"):
        open_video(joined)


def test_video_of_an_unknown_kind_is_refused(tmp_path):
    path = film(tmp_path / "clip.mp4")
    before, _, after = path.read_bytes().rpartition(b"avc1")  # in the description of the samples
    path.write_bytes(before + b"zzzz" + after)
    with pytest.raises(ValueError, match="clip.mp4 is not a video that .*no decoder"):
        open_video(path)


def test_an_animated_image_in_a_sequence_is_named(tmp_path):
    for k in range(3):
        film(tmp_path / f"{k}.png", *(["-f", "apng"] if k == 1 else []), frames=2 if k == 1 else 1)
    with pytest.raises(ValueError, match=r"1\.png has 2 frames: a sequence consists of still"):
        open_video(tmp_path)
    assert len(open_video(tmp_path / "1.png")) == 2


def test_an_animated_webp_image_is_named(tmp_path):
    path = film(tmp_path / "1.webp", "-c:v", "libwebp_anim")
    for source in (path, tmp_path):
        with pytest.raises(ValueError, match=r"1\.webp is an animated WebP image"):
            open_video(source)


def tiff(path: Path, order: str, kinds: list[int]) -> Path:
    """Grey images 8x8 in one file, one for each of `kinds`, the values of NewSubfileType."""
    pixels, length = 8, 2 + 12 * 8 + 4  # where pixels lie, and the length of a page's description
    data = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(f"{order}I", pixels + 64)
    data += bytes(range(64))
    for kind in kinds:
        fields = {254: kind, 256: 8, 257: 8, 258: 8, 259: 1, 262: 1, 273: pixels, 279: 64}
        follows = 0 if kind == kinds[-1] else len(data) + length
        data += struct.pack(f"{order}H", len(fields))
        data += b"".join(struct.pack(f"{order}HHII", tag, 4, 1, v) for tag, v in fields.items())
        data += struct.pack(f"{order}I", follows)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("order", "<>")
def test_an_image_of_several_pages_is_named(tmp_path, order):
    for number in (1, 3):
        tiff(tmp_path / f"{number}.tif", order, [0])
    tiff(tmp_path / "2.tif", order, [0, 1, 4])  # with a thumbnail and a mask
    assert len(open_video(tmp_path)) == len(open_video(tmp_path / "2.tif")) + 2 == 3
    path = tiff(tmp_path / "2.tif", order, [0, 1, 2])
    for source in (path, tmp_path):
        with pytest.raises(ValueError, match=r"2\.tif is a TIFF image of several pages"):
            open_video(source)


def test_images_may_have_very_large_numbers(tmp_path):
    for number in (10**19, 10**19 + 1):
        film(tmp_path / "a.png", frames=1).rename(tmp_path / f"shot{number}.png")
    assert len(open_video(tmp_path)) == 2


def test_images_may_have_a_colour_profile(tmp_path):
    path = film(tmp_path / "a.png", frames=1)
    data = path.read_bytes()
    chunk = b"iCCP" + b"a profile\0\0" + zlib.compress(bytes(128))
    profile = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    path.write_bytes(data[:33] + profile + data[33:])
    copies = [Path(shutil.copyfile(path, tmp_path / f"{k}.png")) for k in range(4)]
    for copied in copies:  # memory that is freed twice ends the process when it is used again
        assert len(open_video(copied)) == 1
        gc.collect()


def test_changes_of_format_are_no_damage(tmp_path, caplog):
    for k in range(20):
        grey = np.full((32, 48), 20 + 10 * k, np.uint8)
        codes = grey if k < 10 else np.repeat(grey[..., None], 3, axis=2)
        raw(tmp_path / f"{k:03}.png", codes, "gray" if k < 10 else "rgb24", "48x32")
    levels = (stack(tmp_path) * 255).round()[:, 0, 0, 0].tolist()
    assert levels == [20 + 10 * k for k in range(20)]
    assert not caplog.records


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have Unicode names only")
@pytest.mark.parametrize("suffix", ["mp4", "png"])
def test_names_need_not_be_utf8(tmp_path, suffix):
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9." + suffix.encode()))
    film(tmp_path / f"a.{suffix}", frames=1).rename(path)
    assert len(open_video(path)) == 1
    assert len(open_video(copy(open_video(path), tmp_path / "b.mkv"))) == 1


def test_damage_in_a_transport_stream_is_told(tmp_path, caplog):
    path = film(tmp_path / "a.ts", "-c:v", "libx264", frames=30)
    data = bytearray(path.read_bytes())
    middle = len(data) // 2 // 188 * 188
    for packet in range(middle, middle + 6 * 188, 188):
        data[packet + 20 : packet + 180] = bytes(160)
    path.write_bytes(data)
    with caplog.at_level(logging.WARNING):
        open_video(path)
    assert "damaged" in caplog.text


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a.mp4", ["-c:v", "libx264", "-g", 12, "-bf", 3]),
        ("open.mp4", ["-c:v", "libx264", "-g", 12, "-x264-params", "open-gop=1"]),
        ("refresh.mkv", ["-c:v", "libx264", "-g", 12, "-x264-params", "intra-refresh=1"]),
        ("a.ts", ["-c:v", "libx264", "-g", 12]),
        ("a.mpg", ["-c:v", "mpeg2video", "-g", 12, "-bf", 2]),
        ("a.avi", ["-c:v", "mpeg4", "-g", 12, "-bf", 2]),
        ("a.webm", ["-c:v", "libvpx-vp9", "-g", 12]),
        ("a.gif", []),
    ],
)
def test_seeking_shows_what_decoding_from_the_beginning_shows(tmp_path, name, options):
    source = open_video(film(tmp_path / name, *options, frames=50))
    frames = stack(source)
    assert len(frames) == 50
    for first in (0, 1, 11, 12, 13, 30, 36, 47):
        part = range(first, min(first + 4, 50))
        assert torch.equal(stack(source.cut(part)), frames[first : part.stop]), first


def test_interlaced_frames_after_seeking_are_made_of_the_same_neighbours(tmp_path):
    fields = ["-vf", "tinterlace=mode=interleave_top", "-flags", "+ilme+ildct", "-g", 6]
    path = film(tmp_path / "a.mpg", *fields, "-c:v", "mpeg2video", frames=48, rate=50)
    source = open_video(path)
    assert source.info.interlaced
    frames = stack(source)
    for first in (1, 6, 7, 17):
        assert torch.equal(stack(source.cut(range(first, first + 3))), frames[first : first + 3])


@pytest.fixture
def decoded(monkeypatch) -> list[int]:
    """The timestamps of all frames that PyAV decodes for a reader."""
    times = []

    def counted(file, seek, *findings):
        for frame in decode(file, seek, *findings):
            times.append(frame.pts)
            yield frame

    monkeypatch.setattr("star_core.video_io.survey.decode", counted)
    return times


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_no_more_is_decoded_for_frames_at_the_end_than_at_the_beginning(tmp_path, name, decoded):
    path = film(tmp_path / name, "-c:v", "libx264", "-g", 50, "-sc_threshold", 0, frames=500)
    source, counts = open_video(path), []
    for start in (40, 440):
        decoded.clear()
        assert len(stack(source.cut(range(start, start + 10)))) == 10
        counts.append(len(decoded))
    assert max(counts) <= 100  # two groups of pictures


def test_a_file_is_decoded_once_for_its_properties(tmp_path):
    path = film(tmp_path / "a.mp4", frames=2)
    assert open_video(path).timing is open_video(path).timing
    film(tmp_path / "a.mp4", frames=3)
    assert len(open_video(path)) == 3


@pytest.mark.parametrize("keys", [6, 250])
def test_frames_that_are_picked_are_decoded_once(tmp_path, decoded, keys):
    path = film(tmp_path / "clip.mp4", "-c:v", "libx264", "-g", keys, "-sc_threshold", 0, frames=40)
    source = open_video(path, frames=(3, 37))
    whole = stack(source)
    decoded.clear()
    picked = [0, 2, 4, 14, 16, 33]
    assert torch.equal(torch.stack(list(source.frames_at(picked))), whole[picked])
    assert len(decoded) == len(set(decoded))
    assert len(decoded) < 30 or keys == 250
