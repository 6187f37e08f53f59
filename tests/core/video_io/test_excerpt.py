"""An excerpt is a video of its own: what the file has outside it is neither seen nor decoded."""

import re
import subprocess
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from torch import Tensor

from star_core.model import Prompts, find_model, load
from star_core.parity import DEFAULT
from star_core.pipeline import Settings
from star_core.resume import work_folder
from star_core.sampling_defaults import SamplingDefaults
from star_core.star_checkpoint import FAITHFUL
from star_core.upscale import Job, ShotSettings, upscale
from star_core.video_io import Excerpt, VideoSource, open_sink, open_video

RATE = 25
H264 = ["-c:v", "libx264", "-g", "12", "-bf", "3"]
FILES = {
    "closed.mp4": H264,
    "open.mp4": [*H264, "-x264-params", "open-gop=1"],
    "h265.mkv": ["-c:v", "libx265", "-x265-params", "log-level=error:keyint=12:open-gop=1"],
    "vp9.webm": ["-c:v", "libvpx-vp9", "-g", "12"],
    # Its clock begins at 1.4 s, and seeking in it lands on a key frame that comes too late.
    "late.ts": H264,
}


def ffmpeg(*arguments: object) -> bytes:
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, check=True).stdout


def film(path: Path, *options: object, frames: int = 60, rate: int = RATE) -> Path:
    picture = f"testsrc2=s=48x32:r={rate},trim=end_frame={frames}"
    ffmpeg("-f", "lavfi", "-i", picture, *options, path)
    return path


def clock(path: Path) -> list[float]:
    """The file's own time of each frame."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-copyts", "-i", path, "-map", "0:v"]
    command += ["-fps_mode", "passthrough", "-vf", "showinfo", "-f", "null", "-"]
    log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return [float(time) for time in re.findall(r" pts_time:(\S+)", log)]


def stack(source: VideoSource | Path) -> Tensor:
    return torch.stack(list(open_video(source) if isinstance(source, Path) else source))


def copied(source: VideoSource, path: Path) -> Path:
    info = source.info
    with open_sink(path, width=info.width, height=info.height, source=source) as sink:
        for frame in source:
            sink.write(frame)
    return path


@pytest.mark.parametrize("name", FILES)
def test_its_frames_are_those_of_the_file_at_those_times(tmp_path, name):
    path = film(tmp_path / name, *FILES[name])
    times, frames = clock(path), stack(path)
    for first, count in ((0, 9), (11, 3), (12, 1), (23, 4), (58, 2)):
        # between two frames, as a person would choose
        excerpt = Excerpt(start=max(times[first] - 0.03, 0), duration=(count - 1) / RATE + 0.035)
        source = open_video(path, excerpt=excerpt)
        assert len(source) == count
        assert torch.equal(stack(source), frames[first : first + count]), first
        assert source.info.constant_rate and source.info.fps == RATE
        assert source.info.timestamps == pytest.approx([k / RATE for k in range(count)], abs=1e-6)
    assert len(open_video(path, excerpt=Excerpt(start=times[40] - 0.01))) == 20


def test_few_frames_a_second_have_key_frames_that_seeking_misses(tmp_path):
    path = film(tmp_path / "a.mp4", *H264, rate=4)
    frames = stack(path)
    for first in range(8, 16):
        source = open_video(path, excerpt=Excerpt(start=first / 4, duration=0.5))
        assert torch.equal(stack(source), frames[first : first + 2]), first


def test_frames_outside_are_not_decoded(tmp_path, caplog):
    """Those of the file are destroyed, all but the wanted and what the decoder reads ahead."""
    path = film(tmp_path / "a.mkv", "-c:v", "mjpeg", "-threads", 1, "-pix_fmt", "yuvj420p")
    wanted = stack(path)[30:40]
    data = bytearray(path.read_bytes())
    starts = [match.start() for match in re.finditer(b"\xff\xd8\xff", data)]
    assert len(starts) == 60
    for number, start in enumerate(starts):
        if not 29 <= number < 50:
            data[start : start + 100] = bytes(100)
    path.write_bytes(data)
    source = open_video(path, excerpt=Excerpt(start=30 / RATE, duration=10 / RATE))
    assert torch.equal(stack(source), wanted)
    assert not caplog.records


def test_a_part_of_an_excerpt_is_counted_from_its_first_frame(tmp_path):
    path = film(tmp_path / "a.mp4", *H264)
    excerpt, frames = Excerpt(start=17 / RATE, duration=0.8), stack(path)
    for source in (
        open_video(path, excerpt=excerpt, frames=(2, 5)),
        open_video(path, excerpt=excerpt).cut(range(2, 5)),
    ):
        assert torch.equal(stack(source), frames[19:22])
    with pytest.raises(ValueError, match="frames 19:21 are not in a.mp4, which has 0:20"):
        open_video(path, excerpt=excerpt, frames=(19, 21))


def test_frames_of_a_variable_rate_keep_their_distances(tmp_path):
    held = r"setpts='PTS+if(gt(N\,20)\,0.48/TB\,0)'"
    path = film(tmp_path / "a.mp4", "-vf", held, "-fps_mode", "vfr", *H264)
    frames = stack(path)
    source = open_video(path, excerpt=Excerpt(start=18 / RATE, duration=1.0))
    assert torch.equal(stack(source), frames[18:31])
    times = [(k + (12 if k > 20 else 0) - 18) / RATE for k in range(18, 31)]
    assert source.info.timestamps == pytest.approx(times, abs=1e-4)
    # The excerpt ends while a frame is held, and so does its last frame.
    source = open_video(path, excerpt=Excerpt(start=18 / RATE, duration=0.3))
    assert len(source) == 3 and source.timing.end == pytest.approx(0.3, abs=1e-4)


@pytest.mark.parametrize(
    ("name", "codec"), [("in.mov", "pcm_s16le"), ("in.mp4", "aac"), ("in.ts", "aac")]
)
@pytest.mark.parametrize("out", ["out.mkv", "out.mov"])
def test_its_sound_is_cut_with_it_and_stays_in_step(tmp_path, name, codec, out):
    """A click at 0.1 s and every 0.2 s from there."""
    clicks = r"exp(-200*mod(t+0.1\,0.2))*sin(2000*2*PI*t):d=2.4:s=48000"
    path = film(tmp_path / name, "-f", "lavfi", "-i", f"aevalsrc={clicks}", *H264, "-c:a", codec)
    source = open_video(path, excerpt=Excerpt(start=clock(path)[0] + 0.79, duration=0.5))
    copy = copied(source, tmp_path / out)
    assert len(open_video(copy)) == len(source) == 13
    padded = ["-map", "0:a", "-af", "aresample=async=1:first_pts=0", "-ac", 1]
    wave = np.frombuffer(ffmpeg("-i", copy, *padded, "-f", "s16le", "-"), np.int16)
    packet = 1024 / 48000
    assert len(wave) / 48000 == pytest.approx(13 / RATE, abs=packet)
    loud = np.abs(wave.astype(int))
    for moment in (0.1, 0.3):  # of the excerpt, whose first frame is that of 0.8 s
        near = loud[int((moment - 0.09) * 48000) : int((moment + 0.09) * 48000)]
        assert near.argmax() / 48000 == pytest.approx(0.09, abs=0.002)


def test_a_crop_is_of_the_upright_stored_picture(tmp_path):
    path = film(tmp_path / "a.mkv", "-c:v", "ffv1", "-pix_fmt", "bgr0", frames=3)
    source = open_video(path, excerpt=Excerpt(crop=(20, 11, 7, 3)))
    assert (source.info.width, source.info.height) == (20, 11)
    assert torch.equal(stack(source), stack(path)[..., 3:14, 7:27])
    assert not source.is_cut and len(source) == 3
    turned = tmp_path / "turned.mov"
    ffmpeg("-display_rotation", 90, "-i", path, "-c", "copy", turned)
    source = open_video(turned, excerpt=Excerpt(crop=(20, 40, 0, 8)))
    assert torch.equal(stack(source), stack(turned)[..., 8:48, 0:20])


def test_a_crop_of_oblong_pixels_is_stretched_after_it_is_cut(tmp_path):
    path = film(tmp_path / "a.mkv", "-vf", "setsar=2", "-c:v", "ffv1", frames=1)
    source = open_video(path, excerpt=Excerpt(crop=(20, 16, 10, 8)))
    assert (source.info.width, source.info.height) == (40, 16)
    assert (stack(source) - stack(path)[..., 8:24, 20:60]).abs()[..., 4:-4].max() < 1e-5


@pytest.mark.parametrize(
    ("excerpt", "words"),
    [
        (Excerpt(start=10), "the trim of a.mp4 is empty: no frame begins from 10 s on"),
        (Excerpt(start=0.41, duration=0.02), "no frame begins from 0.41 s to 0.43 s; choose"),
        (
            Excerpt(crop=(48, 32, 2, 0)),
            "crop 48x32[+]2[+]0 is not inside the frame, which is displayed as 48x32",
        ),
        (Excerpt(crop=(0, 8, 0, 0)), "crop 0x8"),
    ],
)
def test_nothing_is_left_out_of_an_error(tmp_path, excerpt, words):
    path = film(tmp_path / "a.mp4", *H264)
    with pytest.raises(ValueError, match=words):
        open_video(path, excerpt=excerpt)


def test_frames_without_times_cannot_be_trimmed(tmp_path):
    path = film(tmp_path / "a.h264", *H264)  # frames alone, in no container
    with pytest.raises(ValueError, match="no timestamps to trim it by; give it some: ffmpeg"):
        open_video(path, excerpt=Excerpt(start=1))


def test_times_are_rounded_as_comfyui_rounds_them():
    excerpt = Excerpt(start=1.0339, duration=0.5)
    assert excerpt.ticks(Fraction(1, 1000)) == (1033, 1533)
    assert Excerpt(start=1).ticks(Fraction(1, 25)) == (25, None)


def restored(job: Job) -> Tensor:
    sampling = SamplingDefaults(solver_mode="normal", steps=2, cfg=1.0)
    scene = ShotSettings(settings=Settings(sampling=sampling), prompts=Prompts(preset=FAITHFUL))

    def get_model(prompts):
        return load(
            find_model("tiny"), prompts, behaviour=DEFAULT, device="cpu", dtype=torch.float32
        )

    upscale(job, scene, get_model)
    return stack(job.out)


def test_a_job_sees_nothing_outside_its_excerpt(tmp_path):
    """Neither windows nor borders reach beyond it: the result is that of a file of this part."""
    path = film(tmp_path / "a.mkv", "-c:v", "ffv1", "-pix_fmt", "bgr0", frames=9)
    excerpt = Excerpt(start=3 / RATE, duration=3 / RATE, crop=(32, 24, 8, 4))
    part = copied(open_video(path, excerpt=excerpt), tmp_path / "part.mkv")
    result = restored(Job(source=path, excerpt=excerpt, out=tmp_path / "b.mkv", scale=2))
    assert result.shape == (3, 3, 48, 64)
    assert torch.equal(result, restored(Job(source=part, out=tmp_path / "c.mkv", scale=2)))


@pytest.mark.parametrize(
    "other", [{"start": 4 / RATE}, {"duration": 3.2 / RATE}, {"crop": (32, 24, 8, 2)}]
)
def test_the_work_on_another_excerpt_is_not_gone_on_with(tmp_path, caplog, other):
    path = film(tmp_path / "a.mkv", "-c:v", "ffv1", "-pix_fmt", "bgr0", frames=9)
    excerpt = Excerpt(start=3 / RATE, duration=3 / RATE, crop=(32, 24, 8, 4))
    job = Job(source=path, excerpt=excerpt, out=tmp_path / "b.mkv", scale=2, keep_work=True)
    first = restored(job)
    assert list(work_folder(job.out).glob("*.safetensors"))
    again = restored(replace(job, overwrite=True))
    assert "continuing with" in caplog.text and torch.equal(again, first)
    restored(replace(job, overwrite=True, excerpt=replace(excerpt, **other)))
    assert "starting from scratch" in caplog.text
