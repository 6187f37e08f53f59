import json
from fractions import Fraction

import pytest
import torch

from star_core.cli import main
from star_core.cli.degrading import RECIPES as NAMES
from star_core.degradation import MILD, PRESETS, STAR_LIGHT, degrade_video
from star_core.degradation.files import degrade_file
from star_core.video_io import open_sink, open_video


@pytest.fixture
def clean(tmp_path):
    path = tmp_path / "clean.mkv"
    generator = torch.Generator().manual_seed(0)
    with open_sink(path, width=48, height=36, fps=Fraction(25)) as sink:
        for _ in range(5):
            sink.write(torch.rand(3, 36, 48, generator=generator))
    return path


def pixels(path):
    return torch.stack(list(open_video(path)))


def test_the_command_offers_every_recipe():
    assert set(NAMES) == set(PRESETS)


def test_a_seed_gives_the_same_file_and_the_record_says_how(clean, tmp_path):
    arguments = ["degrade", str(clean), "--recipe", "light", "--seed", "7"]
    for name in ("a.mkv", "b.mkv"):
        assert main([*arguments[:2], str(tmp_path / name), *arguments[2:]]) == 0
    a, b = (pixels(tmp_path / name) for name in ("a.mkv", "b.mkv"))
    assert torch.equal(a, b) and a.shape == (5, 3, 9, 12)
    expected, record = degrade_video(pixels(clean), STAR_LIGHT, 7)
    assert torch.equal(a, expected)
    sidecar = json.loads((tmp_path / "a.mkv.json").read_text())
    assert {key: sidecar[key] for key in record} == record
    assert sidecar["input"] == {"name": "clean.mkv", "frames": 5}


def test_some_frames_are_a_clip_of_their_own(clean, tmp_path):
    degrade_file(clean, tmp_path / "part.mkv", MILD, 1, frames=(2, None))
    expected, _ = degrade_video(pixels(clean)[2:], MILD, 1)
    assert torch.equal(pixels(tmp_path / "part.mkv"), expected)


def test_existing_files_stay_and_an_interruption_leaves_nothing(clean, tmp_path):
    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        degrade_file(clean, tmp_path / "new.mkv", MILD, 1, on_progress=stop)
    assert [path.name for path in tmp_path.iterdir()] == ["clean.mkv"]
    (tmp_path / "old.mkv.json").write_text("mine")
    with pytest.raises(ValueError, match="allow overwriting"):
        degrade_file(clean, tmp_path / "old.mkv", MILD, 1)
    assert (tmp_path / "old.mkv.json").read_text() == "mine"
