"""Runs of `upscale` that are stopped, and go on."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from star_core.resume import work_folder
from tests.command_line import frames_of, run, upscaled, write_clip
from tests.paths import ROOT


@pytest.mark.skipif(os.name == "nt", reason="Ctrl-C cannot be sent to a process there")
def test_ctrl_c_exits_with_130_and_leaves_nothing(tmp_path):
    source = write_clip(tmp_path / "in.mkv", 40, 24, 32)
    command = ["upscale", str(source), str(tmp_path / "out.mkv"), "--scale", "3", "--shots", "off"]
    process = subprocess.Popen(
        [sys.executable, "-m", "star_core", *command],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        # A test run in the background of a shell ignores Ctrl-C, and so would its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stderr is not None
    assert "encode 0/40" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate()
    assert process.returncode == 130
    assert rest.splitlines()[-1] == "interrupted"
    assert list(tmp_path.iterdir()) == [source]


def killed_when(entries: int, command: list[str], folder: Path) -> None:
    """Starts the command line and kills it once its work holds so many entries, or it is done."""
    process = subprocess.Popen([sys.executable, "-m", "star_core", *command], cwd=ROOT)
    while process.poll() is None and len(list(folder.glob("*.safetensors"))) < entries:
        time.sleep(0.01)
    process.kill()
    process.wait()


def test_a_killed_run_goes_on_to_the_same_file_byte_for_byte(tmp_path, capsys):
    source = write_clip(tmp_path / "in.mkv", 20, 12, 16)
    options = ["--scale", "2", "--chunk-frames", "6", "--merge-up-to", "0", "--shots", "7"]
    options += ["--solver-mode", "normal", "--steps", "3"]
    upscaled(capsys, source, tmp_path / "whole.mp4", *options)
    out = tmp_path / "out.mp4"
    for entries in (1, 4):
        killed_when(entries, ["upscale", str(source), str(out), *options], work_folder(out))
        assert not out.exists()
        newest = max(work_folder(out).glob("*.safetensors"), key=lambda p: p.stat().st_mtime)
        newest.write_bytes(newest.read_bytes()[:100])  # as a power cut leaves it
    code, _, err = run(capsys, "upscale", source, out, *options, "--keep-work")
    assert code == 0 and "is damaged" not in err  # that goes to the log
    assert out.read_bytes() == (tmp_path / "whole.mp4").read_bytes()
    assert list(work_folder(out).glob("*.safetensors"))
    upscaled(capsys, source, out, *options, "--overwrite")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.mkv", "out.mp4", "whole.mp4"]


def killed_before(function: str, command: list[str]) -> None:
    """Runs the command line in a process that is killed where it calls a function."""
    kill = "lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)"
    script = f"""
import os, signal
from star_core import resume
from star_core.cli import main
from star_core.video_io import targets
{function} = {kill}
main({command})
"""
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT).returncode == -signal.SIGKILL


@pytest.mark.skipif(os.name == "nt", reason="there is no SIGKILL")
@pytest.mark.parametrize("name", ["out.mkv", "frames", "there/%03d.png"])
def test_a_run_that_was_killed_when_its_result_was_there_is_cleaned_up(tmp_path, capsys, name):
    source, out = write_clip(tmp_path / "in.mkv", 3, 12, 16), tmp_path / name
    if out.suffix == ".png":
        out.parent.mkdir()
    command = ["upscale", str(source), str(out), "--scale", "2", "--shots", "off"]
    folder = work_folder(out)
    killed_before("resume.Work.__exit__", command)
    result = out.parent if out.suffix == ".png" else out
    assert len(frames_of(result)) == 3 and list(folder.glob("*.safetensors"))
    code, _, err = run(capsys, *command)
    assert code != 0 and "exists already" in err and "star-work" not in err
    assert not folder.exists() and len(frames_of(result)) == 3


@pytest.mark.skipif(os.name == "nt", reason="there is no SIGKILL")
def test_a_run_that_was_killed_before_its_result_was_there_keeps_its_work(tmp_path, capsys):
    source, out = write_clip(tmp_path / "in.mkv", 3, 12, 16), tmp_path / "out.mkv"
    out.write_bytes(b"an earlier result")
    command = ["upscale", str(source), str(out), "--scale", "2", "--shots", "off"]
    killed_before("targets.FileTarget.commit", [*command, "--overwrite"])
    assert run(capsys, *command)[0] != 0
    assert list(work_folder(out).glob("*.safetensors")) and out.read_bytes() == b"an earlier result"
    upscaled(capsys, *command[1:], "--overwrite")
    assert len(frames_of(out)) == 3 and not work_folder(out).exists()


def test_work_of_other_settings_is_not_gone_on_with(tmp_path, capsys):
    source = write_clip(tmp_path / "in.mkv", 3, 12, 16)
    outs = [tmp_path / "a.mkv", tmp_path / "b.mkv"]
    upscaled(capsys, source, outs[0], "--scale", 2, "--seed", 1, "--keep-work")
    upscaled(capsys, source, outs[0], "--scale", 2, "--seed", 2, "--overwrite")
    upscaled(capsys, source, outs[1], "--scale", 2, "--seed", 2)
    assert torch.equal(*map(frames_of, outs))
