"""`upscale --shots`."""

import json

import pytest

from star_core.windows.geometry import upsample
from tests.command_line import frames_of, refused, upscaled, write_clip


def test_shots_are_named_found_or_read_from_a_file_and_differ_as_it_says(tmp_path, capsys):
    source = write_clip(tmp_path / "in.mkv", 4, 12, 16)
    shots = tmp_path / "shots.json"
    shots.write_text('[{"start": 0, "strength": 0}, {"start": 2, "noise_level": 700}]')
    report = upscaled(capsys, source, tmp_path / "out.mkv", "--scale", 2, "--shots", shots)
    assert [shot["start"] for shot in report["shots"]] == [0, 2]
    assert [shot["sampling"]["noise_level"] for shot in report["shots"]] == [900, 700]
    bicubic = upsample(frames_of(source), (32, 24), "bicubic").clamp(0, 1)
    change = (frames_of(tmp_path / "out.mkv") - bicubic).abs().amax(dim=(1, 2, 3))
    assert (change <= 1 / 255).tolist() == [True, True, False, False]
    report = upscaled(capsys, source, tmp_path / "b.mkv", "--scale", 1, "--shots", "1,3")
    assert [shot["start"] for shot in report["shots"]] == [0, 1, 3]


@pytest.mark.parametrize(
    ("shots", "message"),
    [
        ("9", "no cut at frame 9"),
        ("nowhere.json", "there is no nowhere.json"),
        ([{"start": 1}], "must begin at 0"),
        ([{"start": 0}, {"start": True}], 'shot 2 must be like {"start": 0}'),
        ([{"start": 0, "noise-level": 2000}], "shot 1: noise level must be in [0, 1000], got 2000"),
        ([{"start": 0, "speed": 2}], "shots.json, shot 1, speed: a shot takes start"),
        ([{"start": 0, "strength": 2}], "shots.json, shot 1: strength must be from 0 to 1"),
        ([{"start": 0, "strength": None}], "shot 1, strength: must be a number, not null"),
        ([{"start": 0, "steps": "20"}], 'shot 1, steps: must be an integer, not "20"'),
        ([{"start": 0}, {"start": 1, "cfg": [1]}], "shot 2, cfg: must be a number, not [1]"),
        ([{"start": 0, "prompt": "a cat"}], "learned prompts"),
    ],
)
def test_shots_that_cannot_be_are_refused(tmp_path, capsys, clip, shots, message):
    if not isinstance(shots, str):
        path = tmp_path / "shots.json"
        path.write_text(json.dumps(shots))
        shots = path
    assert message in refused(capsys, "upscale", clip, tmp_path / "o.mkv", "--shots", shots)
