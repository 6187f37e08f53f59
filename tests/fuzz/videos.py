"""Reads damaged videos and writes them anew: each must become a whole video, or be refused.

    python -m tests.fuzz.videos [COUNT] [SEED]

Prints every file that ends otherwise, with its mutation, and returns 1 if there is one. A fault is
a traceback, a message of several lines, a crash, a hang, a file that is left behind, or a result
with another number of frames than was found in the video.
"""

import logging
import multiprocessing
import random
import re
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from imageio_ffmpeg import get_ffmpeg_exe

from star_core.video_io import open_sink, open_video

FORKED = multiprocessing.get_context("fork")  # a crash or a hang ends the file's own process only
SECONDS = 60
# Of the clips that are damaged: suffix, and ffmpeg's options for the output.
FORMATS = (
    (".mp4", "-c:v libx264 -c:a aac"),
    (".mp4", "-c:v libx264 -c:a aac -movflags +frag_keyframe+empty_moov"),
    (".mp4", "-c:v libx265 -pix_fmt yuv420p10le -c:a aac -x265-params log-level=none"),
    (".mp4", "-c:v mpeg4 -c:a mp3"),
    (".mov", "-c:v prores_ks -c:a pcm_s16le -timecode 01:00:00:00"),
    (".mov", "-c:v qtrle -c:a pcm_s16le"),
    (".mkv", "-c:v ffv1 -c:a flac"),
    (".mkv", "-c:v libx264 -c:a libopus -metadata:s:v rotate=90"),
    (".mkv", "-c:v huffyuv -an"),
    (".webm", "-c:v libvpx -deadline realtime -c:a libvorbis"),
    (".webm", "-c:v libvpx-vp9 -pix_fmt yuva420p -deadline realtime -c:a libopus"),
    (".avi", "-c:v mjpeg -c:a pcm_s16le"),
    (".avi", "-c:v rawvideo -pix_fmt bgr24 -an"),
    (".ts", "-c:v libx264 -c:a aac"),
    (".mpg", "-c:v mpeg2video -c:a mp2"),
    (".flv", "-c:v flv1 -c:a mp3 -ar 44100"),
    (".wmv", "-c:v wmv2 -c:a wmav2"),
    (".gif", "-an"),
    (".png", "-an -frames:v 1"),
    (".jpg", "-an -frames:v 1"),
    (".tif", "-an -frames:v 1"),
    (".y4m", "-an -pix_fmt yuv422p"),
)
OUTPUTS = (".mkv", ".mp4", ".mov")
# Names of atoms, chunks and elements, by which mutations find the parts that describe a file.
NAME = re.compile(rb"[a-zA-Z][a-zA-Z0-9 ]{3}")


def make_clips(folder: Path) -> list[tuple[str, str, bytes]]:
    """Clips of twelve frames: suffix, options, content."""
    moving, sound = "testsrc2=s=64x48:r=25:d=0.48", "sine=d=0.48"
    inputs = ["-f", "lavfi", "-i", moving, "-f", "lavfi", "-i", sound]
    clips = []
    for suffix, options in FORMATS:
        path = folder / f"clip{suffix}"
        command = [get_ffmpeg_exe(), "-v", "error", "-y", *inputs, *options.split(), "-g", "5"]
        subprocess.run([*command, str(path)], check=True)
        clips.append((suffix, options, path.read_bytes()))
    return clips


def place(draw: random.Random, data: bytes) -> int:
    """A place in the file: near either end, where descriptions are, or anywhere."""
    near = min(len(data), 2000)
    return draw.choice(
        (draw.randrange(near), len(data) - 1 - draw.randrange(near), draw.randrange(len(data)))
    )


def flipped(draw: random.Random, data: bytes) -> bytes:
    damaged = bytearray(data)
    for _ in range(2 ** draw.randrange(8)):
        damaged[place(draw, data)] ^= 1 << draw.randrange(8)
    return bytes(damaged)


def cut_short(draw: random.Random, data: bytes) -> bytes:
    return data[: draw.randrange(1, len(data))]


def without_part(draw: random.Random, data: bytes) -> bytes:
    at = place(draw, data)
    return data[:at] + data[at + draw.randrange(1, 2000) :]


def with_insertion(draw: random.Random, data: bytes) -> bytes:
    at, length = place(draw, data), draw.randrange(1, 2000)
    other = draw.randrange(len(data))
    return (
        data[:at] + draw.choice((draw.randbytes(length), data[other : other + length])) + data[at:]
    )


def zeroed(draw: random.Random, data: bytes) -> bytes:
    at, length = place(draw, data), draw.randrange(1, 1000)
    return (
        data[:at]
        + bytes([draw.choice((0, 255))]) * len(data[at : at + length])
        + data[at + length :]
    )


def renamed_atom(draw: random.Random, data: bytes) -> bytes:
    """The name of an atom, its size before it, or a number behind it is another."""
    names = [match.start() for match in NAME.finditer(data[:4000] + data[4000:][-4000:])]
    if not names:
        return flipped(draw, data)
    at = draw.choice(names)
    at += len(data) - min(len(data), 8000) if at >= 4000 else 0
    at += draw.choice((-4, 0, 4, 8, 12, 16, 20))
    at = max(0, min(at, len(data) - 4))
    odd = draw.choice(
        (bytes(4), b"\xff" * 4, b"\x7f\xff\xff\xff", b"\0\0\0\1", b"free", draw.randbytes(4))
    )
    return data[:at] + odd + data[at + 4 :]


MUTATIONS: tuple[Callable[[random.Random, bytes], bytes], ...] = (
    flipped,
    flipped,
    cut_short,
    without_part,
    with_insertion,
    zeroed,
    renamed_atom,
    renamed_atom,
)


def outcome_of(path: Path, out: Path, answer: Connection) -> None:
    """Sends what became of a video: "written", "refused", or a fault."""
    torch.set_num_threads(1)
    try:
        source = open_video(path)
        info = source.info
        with open_sink(
            out, width=info.width, height=info.height, source=source, alpha=info.has_alpha
        ) as sink:
            for frame in source:
                sink.write(frame)
        frames = len(open_video(out)), len(source)
        answer.send(
            "written" if frames[0] == frames[1] else "{} of {} frames written".format(*frames)
        )
    except (ValueError, OSError, MemoryError) as error:  # the command line prints any in one line
        answer.send(f"several lines: {error}" if "\n" in str(error).strip() else "refused")
    except BaseException:
        answer.send(traceback.format_exc(limit=-4))


def outcome(path: Path, out: Path) -> str:
    receiver, sender = FORKED.Pipe(duplex=False)
    process = FORKED.Process(target=outcome_of, args=(path, out, sender))
    process.start()
    sender.close()
    try:
        return receiver.recv() if receiver.poll(SECONDS) else f"more than {SECONDS} seconds"
    except EOFError:
        process.join()
        return f"crashed with status {process.exitcode}"
    finally:
        process.kill()
        process.join()


def main(count: int = 300, seed: int = 0) -> int:
    logging.disable()  # damage that is concealed is of no interest
    outcomes: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as scratch:
        clips = make_clips(Path(scratch))
        for number in range(count):
            draw = random.Random(f"{seed} {number}")
            (suffix, options, whole), mutation = draw.choice(clips), draw.choice(MUTATIONS)
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / f"clip{suffix}"
                out = Path(folder) / f"out{draw.choice(OUTPUTS)}"
                path.write_bytes(mutation(draw, whole))
                fault = result = outcome(path, out)
                left = [p.name for p in Path(folder).iterdir() if p not in (path, out)]
                if left or out.exists() != (result == "written"):
                    fault = f"{result}, and in the folder: {left or out.name}"
            outcomes[result if result in ("written", "refused") else "faults"] += 1
            if fault not in ("written", "refused"):
                outcomes["faults"] += result in ("written", "refused")
                print(f"{number}: {mutation.__name__} of {suffix} ({options}) to {out.suffix}")
                print(fault)
    print(
        f"{count} videos, "
        + ", ".join(f"{outcomes[key]} {key}" for key in ("written", "refused", "faults"))
    )
    return int(outcomes["faults"] > 0)


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
