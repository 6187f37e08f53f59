"""`upscale --frames` and `--crop`."""

import subprocess
import wave
from functools import partial

import torch

from star_core.windows.geometry import minimal_padding
from tests.command_line import frames_of, upscaled, write_clip


def test_previews_show_what_the_whole_run_shows(tmp_path, capsys):
    """Exact: one evaluation of the network, and a margin that covers the frame."""
    source = write_clip(tmp_path / "in.mkv", 7, 12, 16)
    common = ["--scale", "1.5", "--chunk-frames", "3"]
    upscaled(capsys, source, tmp_path / "whole.mkv", *common)
    preview = ["--frames", "3:5", "--crop", "7x5+4+2"]
    report = upscaled(capsys, source, tmp_path / "part.mkv", *common, *preview)
    whole, span = frames_of(tmp_path / "whole.mkv"), frames_of(tmp_path / "part.mkv")
    assert span.shape == (report["frames"], 3, report["height"], report["width"])
    assert (span - whole[3:5, :, 3:11, 6:17]).abs().max() <= 1 / 255


def test_sound_of_a_preview_is_cut_with_its_frames(tmp_path, capsys):
    import imageio_ffmpeg

    video = write_clip(tmp_path / "silent.mkv", 10, 8, 8)
    with wave.open(str(tmp_path / "tone.wav"), "wb") as tone:
        tone.setparams((1, 2, 8000, 0, "NONE", ""))
        tone.writeframes(bytes(16000))
    ffmpeg = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error"]
    both = ["-i", str(video), "-i", str(tmp_path / "tone.wav")]
    source = tmp_path / "loud.mkv"
    subprocess.run([*ffmpeg, *both, "-c", "copy", str(source)], check=True)
    out = tmp_path / "part.mkv"
    span = ["--frames", "4:6", "--chunk-frames", "4"]
    upscaled(capsys, source, out, "--scale", 1, *span)
    sound = subprocess.run(
        [*ffmpeg, "-i", str(out), "-map", "0:a", "-f", "s16le", "-"],
        capture_output=True,
        check=True,
    ).stdout
    assert 0.15 < len(sound) / 16000 < 0.3


def test_reference_takes_previews_for_clips_of_their_own(tmp_path, capsys, monkeypatch):
    seen = {}

    def restore(frames, model, vae, shots, canvas, **options):
        (shot,) = shots
        seen.update(canvas=canvas, span=shot.span, behaviour=shot.settings.behaviour.name)
        height, width = canvas.size[::-1]
        for frame in frames:
            assert frame.shape == (3, 5, 7)
            yield torch.zeros(3, height, width)

    monkeypatch.setattr("star_core.upscale.restore", restore)
    fitting = partial(minimal_padding, vae_factor=4, levels=2)  # the reference's is not for tiny
    monkeypatch.setattr("star_core.windows.canvas.reference_padding", fitting)
    source = write_clip(tmp_path / "in.mkv", 7, 12, 16)
    preview = ["--frames", "3:5", "--crop", "7x5+4+2", "--scale", "2", "--reference"]
    report = upscaled(capsys, source, tmp_path / "out.mkv", *preview)
    assert seen["behaviour"] == "reference"
    assert seen["canvas"].size == (14, 10) and seen["span"].needed == range(2)
    assert (report["width"], report["height"], report["frames"]) == (14, 10, 2)
