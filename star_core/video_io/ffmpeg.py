"""Runs ffmpeg as a child process, from argument lists only; it never outlives its `with` block."""

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
    """Starts ffmpeg, and kills it when the block ends, also by an exception.

    stdin, stdout: whether these are pipes. log: a file for messages, which cannot fill up and stall
    ffmpeg while frames are read or written, as a pipe could; None to read them from
    `process.stderr`. Every message begins with its level: `[error] ...`.
    """
    # In a session of its own: otherwise ffmpeg would receive Ctrl-C from the terminal too, and
    # finish the file early.
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
    """Yields the lines of ffmpeg's log as text."""
    return (line.decode(errors="replace").rstrip("\r\n") for line in lines)


def first_error(lines: Iterable[str]) -> str:
    """Returns the first error in a log, which caused the later ones, without memory addresses."""
    for line in lines:
        if "[error]" in line or "[fatal]" in line:
            return re.sub(r"\[[^]]*( @ 0x\w+|error|fatal)\] *", "", line)
    return "no reason given"


@functools.cache
def filters() -> frozenset[str]:
    """Returns the names of the filters that this ffmpeg has."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-filters"]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return frozenset(re.findall(r"^ [T.S.C]{2,3} (\w+) +\S+->", listing, re.MULTILINE))
