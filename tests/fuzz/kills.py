"""Kills `upscale` at random times and resumes it: in the end, the result has the same bytes.

    python -m tests.fuzz.kills [COUNT] [SEED]

Prints every result that differs, and returns 1 if there is one.
"""

import multiprocessing
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from imageio_ffmpeg import get_ffmpeg_exe

from star_core.cli import main as star_vsr

FORKED = multiprocessing.get_context("fork")  # with all modules imported
# Two shots, the first of three chunks: latents, chunks and shots are stored and recalled.
OPTIONS = ["--scale=2", "--shots=8", "--chunk-frames=4", "--chunk-overlap=1", "--merge-up-to=4"]


def make_clip(path: Path) -> None:
    """Eleven frames 48x32 with sound."""
    moving, sound = "testsrc2=s=48x32:r=25:d=0.44", "sine=d=0.44"
    inputs = ["-f", "lavfi", "-i", moving, "-f", "lavfi", "-i", sound]
    codecs = ["-c:v", "ffv1", "-c:a", "flac"]
    subprocess.run([get_ffmpeg_exe(), "-v", "error", *inputs, *codecs, str(path)], check=True)


def upscale(clip: Path, out: Path) -> int:
    return star_vsr(["upscale", str(clip), str(out), *OPTIONS])


def in_silence(clip: Path, out: Path) -> None:
    """As a process of its own, whose messages are of no interest."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    sys.exit(upscale(clip, out))


def main(count: int = 200, seed: int = 0) -> int:
    torch.set_num_threads(1)
    draw = random.Random(seed)
    kills = results = faults = 0
    with tempfile.TemporaryDirectory() as folder:
        clip, out, undisturbed = (
            Path(folder) / name for name in ("in.mkv", "out.mkv", "whole.mkv")
        )
        make_clip(clip)
        for _ in range(2):  # the second takes as long as the runs below
            undisturbed.unlink(missing_ok=True)
            began = time.monotonic()
            assert upscale(clip, undisturbed) == 0
            seconds = time.monotonic() - began
        expected = undisturbed.read_bytes()
        while True:
            out.unlink(missing_ok=True)
            run = FORKED.Process(target=in_silence, args=(clip, out))
            run.start()
            run.join(draw.uniform(0, seconds) if kills < count else None)
            if run.exitcode is None:
                run.kill()
                run.join()
                kills += 1
                if not out.exists():
                    continue
            results += 1
            if not out.exists() or out.read_bytes() != expected:
                faults += 1
                print(f"after {kills} kills: {out.name} differs (exit status {run.exitcode})")
            if kills >= count and run.exitcode is not None and run.exitcode >= 0:
                break
        left = sorted(
            path.name for path in Path(folder).iterdir() if path not in (clip, out, undisturbed)
        )
        if left:
            faults += 1
            print(f"left behind: {', '.join(left)}")
    print(f"{kills} kills, {results} results, {faults} faults")
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
