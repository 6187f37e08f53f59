"""Files and folders with unusual names and content."""

import os
import shutil

import pytest
import torch

from star_core.video_io import reader, survey
from tests.command_line import frames_of, refused, upscaled, write_clip


def test_stills_are_restored_each_on_its_own(tmp_path, capsys):
    stills, out = tmp_path / "stills", tmp_path / "out"
    stills.mkdir()
    for name, height, width in (("a", 9, 12), ("b", 7, 8)):
        write_clip(tmp_path / name, 1, height, width).joinpath("00001.png").rename(
            stills / f"{name}.png"
        )
    report = upscaled(capsys, stills, out, "--stills", "--scale", 2)
    assert report["frames"] == 2
    assert sorted(path.name for path in out.iterdir()) == ["a.png", "b.png"]
    assert frames_of(out / "b.png").shape == (1, 3, 14, 16)
    alone = tmp_path / "alone.png"
    upscaled(capsys, stills / "b.png", alone, "--scale", 2)
    assert torch.equal(frames_of(out / "b.png"), frames_of(alone))
    assert "exists already" in refused(capsys, "upscale", stills, out, "--stills")
    upscaled(capsys, stills, out, "--stills", "--scale", 1, "--overwrite")
    assert frames_of(out / "a.png").shape == (1, 3, 9, 12)
    assert not list(tmp_path.glob(".star-*"))


@pytest.mark.parametrize("options", [[], ["--shots", "2"], ["--shots", "off", "--segment", "2"]])
def test_a_file_is_surveyed_and_hashed_once_a_job(tmp_path, capsys, monkeypatch, options):
    clip, calls = write_clip(tmp_path / "clip.mkv", 4, 12, 16), []
    for module, name in ((survey, "_survey_file"), (reader, "hash_of")):
        function = getattr(module, name)

        def counted(*arguments, name=name, function=function):
            calls.append(name)
            return function(*arguments)

        monkeypatch.setattr(module, name, counted)
    upscaled(capsys, clip, tmp_path / "out.mkv", "--scale", 1, *options)
    assert sorted(calls) == ["_survey_file", "hash_of"]


@pytest.mark.skipif(os.name == "nt", reason="file names are text there")
def test_a_name_that_is_not_utf8_is_taken(tmp_path, capsys, clip):
    name = tmp_path / os.fsdecode(b"caf\xe9.mkv")
    shutil.copy(clip, name)
    upscaled(capsys, name, tmp_path / "o.mkv", "--scale", 1)


def test_a_name_as_long_as_the_file_system_takes_is_written(tmp_path, capsys, clip):
    out = tmp_path / f"{'影' * 82}.mkv"
    upscaled(capsys, clip, out, "--scale", 1)
    assert out.exists()


def test_hidden_files_are_no_input_and_do_not_undo_finished_work(tmp_path, capsys, clip, caplog):
    frames = tmp_path / "frames"
    upscaled(capsys, clip, frames, "--scale", 1, "--strength", 0)
    out = tmp_path / "o.mkv"
    upscaled(capsys, frames, out, "--scale", 1, "--keep-work")
    for name in (".DS_Store", "._00000.png"):  # the Finder's, and macOS's on network drives
        (frames / name).write_bytes(b"\0\5\26\7\0\2\0\0Mac OS X        ")
    caplog.clear()
    upscaled(capsys, frames, out, "--scale", 1, "--keep-work", "--overwrite")
    assert "continuing with the finished parts" in caplog.text
