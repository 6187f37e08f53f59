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


def test_work_of_other_settings_is_not_gone_on_with(tmp_path, capsys):
    source = write_clip(tmp_path / "in.mkv", 3, 12, 16)
    outs = [tmp_path / "a.mkv", tmp_path / "b.mkv"]
    upscaled(capsys, source, outs[0], "--scale", 2, "--seed", 1, "--keep-work")
    upscaled(capsys, source, outs[0], "--scale", 2, "--seed", 2, "--overwrite")
    upscaled(capsys, source, outs[1], "--scale", 2, "--seed", 2)
    assert torch.equal(*map(frames_of, outs))
