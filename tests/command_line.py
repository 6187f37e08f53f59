"""The command line as a function, and clips for it."""

import argparse
import json
from fractions import Fraction
from pathlib import Path

import torch
from torch import Tensor

from star_core.cli import main
from star_core.cli.upscale import add_upscale, run_spec
from star_core.pipeline import Settings
from star_core.upscale import ShotSettings
from star_core.video_io import open_sink, open_video
from star_core.windows.geometry import upsample


def frames_of(path) -> Tensor:
    return torch.stack(list(open_video(path)))


def run(capsys, *arguments) -> tuple[int, str, str]:
    """Exit code, stdout, stderr. Cuts are searched for only where a test says so."""
    if arguments[0] == "upscale" and "--shots" not in arguments:
        arguments = (*arguments, "--shots", "off")
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as exit:  # argparse
        assert isinstance(exit.code, int)
        code = exit.code
    return code, *capsys.readouterr()


def upscaled(capsys, *arguments) -> dict:
    code, out, err = run(capsys, "upscale", *arguments, "--json")
    assert code == 0, err
    assert out.count("\n") == 1
    return json.loads(out)


def shot_of(*arguments) -> ShotSettings:
    """How `upscale` would restore the whole input."""
    parser = argparse.ArgumentParser()
    add_upscale(parser)
    return run_spec(parser.parse_args([str(argument) for argument in arguments]))[0].whole


def settings_of(*arguments) -> Settings:
    return shot_of(*arguments).settings


def refused(capsys, *arguments) -> str:
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1
    return err


def write_clip(path: Path, frames: int, height: int, width: int, channels: int = 3) -> Path:
    generator = torch.Generator().manual_seed(frames)
    coarse = torch.rand(frames, channels, 4, 5, generator=generator)
    clip = upsample(coarse, (width, height), "bicubic").clamp(0, 1)
    with open_sink(path, width=width, height=height, fps=Fraction(10), alpha=channels == 4) as sink:
        for frame in clip:
            sink.write(frame)
    return path
