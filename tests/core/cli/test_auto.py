"""`upscale --auto`."""

import json
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from star_core.video_io import open_sink
from tests.command_line import frames_of, refused, run, upscaled, write_clip


@pytest.fixture(scope="module")
def blurred(tmp_path_factory) -> Path:
    """Coarse and noisy: what is shrunk first."""
    folder = tmp_path_factory.mktemp("clips")
    frames = frames_of(write_clip(folder / "coarse.mkv", 2, 64, 80))
    noise = torch.randn(frames.shape, generator=torch.Generator().manual_seed(0))
    with open_sink(folder / "blurred.mkv", width=80, height=64, fps=Fraction(10)) as sink:
        for frame in (0.1 + 0.8 * frames + 0.03 * noise).clamp(0, 1):
            sink.write(frame)
    return folder / "blurred.mkv"


def test_auto_measures_prints_and_applies_what_is_not_given(tmp_path, capsys, blurred):
    options = ("--scale", 1, "--auto", "--frames", "0:1", "--noise-level", 700)
    code, out, err = run(capsys, "upscale", blurred, tmp_path / "a.mkv", *options, "--json")
    assert code == 0, err
    report = json.loads(out)
    advice = report["recommended"]
    assert "effective resolution" in err and "input shrunk by" in err
    assert report["degradation"]["resolution"] < 0.4 and advice["shrink"] > 1
    assert (report["shrink"], report["strength"]) == (advice["shrink"], advice["strength"])
    assert report["sampling"]["noise_level"] == 700
    assert (report["width"], report["height"]) == (80, 64)


def test_auto_measures_each_shot_and_what_a_shot_says_goes_first(tmp_path, capsys, blurred):
    shots = tmp_path / "shots.json"
    shots.write_text('[{"start": 0}, {"start": 1, "strength": 0}]')
    command = (blurred, tmp_path / "a.mkv", "--scale", 1, "--auto", "--shots", shots)
    first, second = upscaled(capsys, *command)["shots"]
    assert first["degradation"] != second["degradation"]
    assert first["strength"] == first["recommended"]["strength"] > 0
    assert second["strength"] == 0 and second["shrink"] == second["recommended"]["shrink"]


def test_what_auto_recommends_can_be_overridden_and_gives_the_same_by_hand(
    tmp_path, capsys, blurred
):
    base = (blurred, "--scale", 1, "--frames", "0:1")
    paths = [tmp_path / f"{name}.mkv" for name in ("auto", "hand", "plain")]
    by_hand = ("--strength", 0.9, "--shrink", 2)
    upscaled(capsys, base[0], paths[0], *base[1:], "--auto", *by_hand)
    upscaled(capsys, base[0], paths[1], *base[1:], *by_hand)
    upscaled(capsys, base[0], paths[2], *base[1:], "--strength", 0.9)
    auto, hand, plain = map(frames_of, paths)
    assert torch.equal(auto, hand)
    assert not torch.equal(hand, plain)


def test_auto_refuses_stills_and_frames_too_small_to_measure(tmp_path, capsys, clip):
    assert "64 pixels" in refused(capsys, "upscale", clip, tmp_path / "a.mkv", "--auto")
    error = refused(capsys, "upscale", clip, tmp_path / "a", "--auto", "--stills")
    assert "leave out --auto" in error
