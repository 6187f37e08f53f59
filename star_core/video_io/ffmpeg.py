"""Runs ffmpeg as a child process, from argument lists only; it never outlives its `with` block."""

import functools
import re
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from typing import TypeVar

import imageio_ffmpeg

T = TypeVar("T", bound="FFmpeg")


class FFmpeg:
    """An ffmpeg that reads from a pipe: `with FFmpeg(arguments) as ffmpeg: ffmpeg.write(data)`.

    It is killed when the block ends, also by an exception, unless `finish` has waited for its end.
    """

    def __init__(self, arguments: Sequence[str]) -> None:
        self._arguments = arguments

    def __enter__(self: T) -> T:
        # Messages in a file cannot fill up and stall ffmpeg, as those in a pipe could.
        self._log = tempfile.TemporaryFile()
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-nostdin", "-nostats"]
        # In a session of its own: otherwise ffmpeg would receive Ctrl-C from the terminal too, and
        # finish the file early.
        self._process = subprocess.Popen(
            [*command, "-v", "level+info", *self._arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=self._log,
            start_new_session=True,
            creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),  # Windows only
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        self._close()
        self._log.close()

    def write(self, data: bytes) -> None:
        """Sends data. Raises ValueError with ffmpeg's own message if it has stopped."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(data)
        except OSError:  # the process has ended; its log says why
            self._process.wait()
            raise self._failure() from None

    def finish(self) -> None:
        """Waits until everything is processed; ValueError with ffmpeg's own message if it fails."""
        self._close()
        if self._process.wait() != 0:
            raise self._failure()

    def _close(self) -> None:
        assert self._process.stdin is not None
        with suppress(OSError):  # data that was not sent to a process that has failed
            self._process.stdin.close()

    def _failure(self) -> ValueError:
        """Tells the first error of the log, which caused the later ones, without addresses."""
        self._log.seek(0)
        lines = (line.decode(errors="replace").rstrip("\r\n") for line in self._log)
        errors = (line for line in lines if "[error]" in line or "[fatal]" in line)
        reason = re.sub(r"\[[^]]*( @ 0x\w+|error|fatal)\] *", "", next(errors, "no reason given"))
        return ValueError(f"ffmpeg stopped with code {self._process.returncode}: {reason}")


@functools.cache
def filters() -> frozenset[str]:
    """Returns the names of the filters that this ffmpeg has."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-filters"]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return frozenset(re.findall(r"^ [T.S.C]{2,3} (\w+) +\S+->", listing, re.MULTILINE))
