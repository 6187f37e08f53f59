"""Targets of results, which are written under a temporary name and renamed when complete."""

import os
import secrets
import shutil
from contextlib import suppress
from pathlib import Path

from .images import is_pattern, pattern_numbers

FRAME_NAMES = "%05d.png"
IMAGE_SUFFIXES = (".png", ".exr")
VIDEO_SUFFIXES = (".mkv", ".mp4", ".mov", ".webm")


class OutputExists(ValueError):
    """The result exists and may not be overwritten."""


class FileTarget:
    """A target that is one video file.

    scratch: a folder of the same file system for the temporary file, None for the target's own.
    temporary: the temporary file. output: its name for ffmpeg. Raises ValueError if `path` is a
    folder, lies in none, or exists while `overwrite` is off.
    """

    def __init__(self, path: Path, *, overwrite: bool, scratch: Path | None) -> None:
        if path.is_dir():
            raise ValueError(f"{path} is a folder: give a file name, or remove the folder")
        _check_existing(path, exists=_exists(path), overwrite=overwrite)
        if not _exists(path.parent):
            raise ValueError(f"{path} cannot be written: there is no folder {path.parent}")
        self.path = path
        self.temporary = (scratch or path.parent) / f".star-{secrets.token_hex(8)}{path.suffix}"
        self.output = str(self.temporary)

    def prepare(self) -> None:
        """Creates the temporary file. Raises ValueError if the folder cannot be written to."""
        try:
            self.temporary.open("xb").close()
        except OSError as error:
            raise _unwritable(self.path, error) from None

    def commit(self) -> None:
        """Renames the temporary file to the result. Raises ValueError if that is impossible."""
        try:
            os.replace(self.temporary, self.path)
        except OSError as error:
            raise _unwritable(self.path, error) from None

    def discard(self) -> None:
        """Removes the temporary file if it still exists."""
        self.temporary.unlink(missing_ok=True)


class FramesTarget:
    """A target of PNG or EXR files: a folder, a pattern in a folder, or a single name.

    Existing images of other numbers count as existing results, because old frames must not follow
    a new sequence. single: whether the target is one image. scratch: a folder of the same file
    system for the temporary folder, None for the target's own. output: the pattern for ffmpeg.
    Raises ValueError for a wrong pattern and for existing images while `overwrite` is off.
    """

    def __init__(self, path: Path, *, overwrite: bool, scratch: Path | None) -> None:
        if path.suffix.lower() not in IMAGE_SUFFIXES or path.is_dir():
            path = path / FRAME_NAMES
        self.path = path
        self._folder, self._pattern = path.parent, path.name
        self.single = not is_pattern(self._pattern)
        if not self.single and "%" in self._pattern.replace("%%", "").replace("%", "", 1):
            raise ValueError(f"{path.name} has more than one %: name frames like {FRAME_NAMES}")
        old = _exists(path) if self.single else bool(self._old_frames())
        _check_existing(path, exists=old, overwrite=overwrite)
        inside = scratch or (self._folder if _exists(self._folder) else self._folder.parent)
        self.temporary = inside / f".star-{secrets.token_hex(8)}"
        self.output = f"{self.temporary}/".replace("%", "%%") + f"%08d{path.suffix}"

    def prepare(self) -> None:
        """Creates the temporary folder. Raises ValueError if its parent cannot be written to."""
        try:
            self.temporary.mkdir()
        except OSError as error:
            raise _unwritable(self.path, error) from None

    def commit(self) -> None:
        """Renames the temporary files to the result, in one step if the folder is new.

        Raises ValueError if that is impossible.
        """
        frames = sorted(self.temporary.iterdir())
        names = [
            self._pattern if self.single else self._pattern % (k + 1) for k in range(len(frames))
        ]
        try:
            if _exists(self._folder):
                for old in self._old_frames():
                    old.unlink()
                for frame, name in zip(frames, names, strict=True):
                    os.replace(frame, self._folder / name)
            else:
                for frame, name in zip(frames, names, strict=True):
                    frame.rename(self.temporary / name)
                self.temporary.rename(self._folder)
        except OSError as error:
            raise _unwritable(self.path, error) from None

    def discard(self) -> None:
        """Removes the temporary folder if it still exists."""
        with suppress(FileNotFoundError):
            shutil.rmtree(self.temporary)

    def _old_frames(self) -> list[Path]:
        return [] if self.single else list(pattern_numbers(self._folder, self._pattern).values())


def open_target(
    path: Path, *, overwrite: bool, scratch: Path | None = None
) -> FileTarget | FramesTarget:
    """Returns the target for `path` by its extension.

    scratch: a folder of the same file system for unfinished files, None for the target's own.
    Raises ValueError for an unknown extension, and for an existing file while `overwrite` is off.
    """
    _exists(path)  # raises ValueError for a name that the system does not allow
    suffix = path.suffix.lower()
    if suffix in VIDEO_SUFFIXES:
        return FileTarget(path, overwrite=overwrite, scratch=scratch)
    if suffix in ("", *IMAGE_SUFFIXES) or path.is_dir():
        return FramesTarget(path, overwrite=overwrite, scratch=scratch)
    raise ValueError(
        f"{path.name}: cannot write {suffix}. Use .mkv (lossless), .mp4, .mov, .webm, a folder, "
        f"{FRAME_NAMES} or %05d.exr"
    )


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError as error:  # a name that is too long, or a folder without permission
        raise _unwritable(path, error) from None


def _check_existing(path: Path, *, exists: bool, overwrite: bool) -> None:
    if exists and not overwrite:
        raise OutputExists(f"{path} exists already: choose another name, or allow overwriting")


def _unwritable(path: Path, error: OSError) -> ValueError:
    return ValueError(f"{path} cannot be written: {error.strerror}. Choose another place")
