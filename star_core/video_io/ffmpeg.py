"""ffmpeg as a child process: argument lists only, nothing outlives the block that started it."""

import functools
import re
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import IO

import imageio_ffmpeg


@contextmanager
def running(
    arguments: Sequence[str], *, stdin: bool = False, stdout: bool = False, log: IO[bytes] | None
) -> Iterator[subprocess.Popen[bytes]]:
    """Start ffmpeg; at the end of the block it is dead and reaped, however the block ends.

    Messages go to the file `log`, which never fills up as a pipe would and so cannot stall ffmpeg
    while this side reads or writes frames; without it they are `process.stderr`.
    Every message carries its level: `[error] ...`.
    """
    # A session of its own: Ctrl-C in the terminal is for us to handle, ffmpeg would take it as
    # "finish the file early".
    new_group = getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)  # Windows only
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-nostdin", "-nostats"]
    process: subprocess.Popen[bytes] = subprocess.Popen(
        [*command, "-v", "level+info", *arguments],
        stdin=subprocess.PIPE if stdin else subprocess.DEVNULL,
        stdout=subprocess.PIPE if stdout else subprocess.DEVNULL,
        stderr=subprocess.PIPE if log is None else log,
        start_new_session=True,
        creationflags=new_group,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe is not None:
                with suppress(OSError):  # unsent frames of a sink that failed
                    pipe.close()


def messages(lines: Iterable[bytes]) -> Iterator[str]:
    """ffmpeg's log as text, line by line."""
    return (line.decode(errors="replace").rstrip("\r\n") for line in lines)


def complaint(lines: Iterable[str]) -> str:
    """The first error in a log, which the later ones follow from, without ffmpeg's addresses."""
    for line in lines:
        if "[error]" in line or "[fatal]" in line:
            return re.sub(r"\[[^]]*( @ 0x\w+|error|fatal)\] *", "", line)
    return "no reason given"


@functools.cache
def pixel_formats() -> dict[str, int]:
    """Names of ffmpeg's pixel formats and the bits of their widest component."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-pix_fmts"]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    rows = re.findall(r"^[IOHPB.]{5} (\w+) +\d+ +\d+ +([\d-]+)", listing, re.MULTILINE)
    return {name: max(map(int, depths.split("-"))) for name, depths in rows}


@functools.cache
def filters() -> frozenset[str]:
    """Names of the filters that this ffmpeg has."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-filters"]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return frozenset(re.findall(r"^ [T.S.C]{2,3} (\w+) +\S+->", listing, re.MULTILINE))
