"""Where results go: written under a temporary name in the same folder, renamed when complete."""

import os
import secrets
import shutil
from contextlib import suppress
from pathlib import Path

from .images import is_pattern, pattern_numbers

FRAME_NAMES = "%05d.png"
VIDEO_SUFFIXES = (".mkv", ".mp4", ".mov", ".webm")


class AlreadyThere(ValueError):
    """The result exists, and may not be overwritten."""


class FileTarget:
    """One video file."""

    def __init__(self, path: Path, *, overwrite: bool, scratch: Path | None) -> None:
        if path.is_dir():
            raise ValueError(f"{path} is a folder: give a file name, or remove the folder")
        _keep_existing(path, exists=_exists(path), overwrite=overwrite)
        if not _exists(path.parent):
            raise ValueError(f"{path} cannot be written: there is no folder {path.parent}")
        self.path = path
        self.temporary = (scratch or path.parent) / f".star-{secrets.token_hex(8)}{path.suffix}"
        self.output = str(self.temporary)

    def prepare(self) -> None:
        """Make the temporary file. ValueError where the folder cannot be written to."""
        try:
            self.temporary.open("xb").close()
        except OSError as error:
            raise _unwritable(self.path, error) from None

    def commit(self) -> None:
        """The temporary file becomes the result."""
        try:
            os.replace(self.temporary, self.path)
        except OSError as error:
            raise _unwritable(self.path, error) from None

    def discard(self) -> None:
        """Remove what is left of the temporary file."""
        self.temporary.unlink(missing_ok=True)


class FramesTarget:
    """PNG files: a folder, a pattern in a folder, or a single name.

    Existing images of other numbers count as existing too: old frames must not end a new sequence.
    """

    def __init__(self, path: Path, *, overwrite: bool, scratch: Path | None) -> None:
        if path.suffix.lower() != ".png" or path.is_dir():
            path = path / FRAME_NAMES
        self.path = path
        self._folder, self._pattern = path.parent, path.name
        self.single = not is_pattern(self._pattern)
        if not self.single and "%" in self._pattern.replace("%%", "").replace("%", "", 1):
            raise ValueError(f"{path.name} has more than one %: name frames like {FRAME_NAMES}")
        old = _exists(path) if self.single else bool(self._old_frames())
        _keep_existing(path, exists=old, overwrite=overwrite)
        inside = scratch or (self._folder if _exists(self._folder) else self._folder.parent)
        self.temporary = inside / f".star-{secrets.token_hex(8)}"
        self.output = f"{self.temporary}/".replace("%", "%%") + "%08d.png"

    def prepare(self) -> None:
        """Make the temporary folder. ValueError where its parent cannot be written to."""
        try:
            self.temporary.mkdir()
        except OSError as error:
            raise _unwritable(self.path, error) from None

    def commit(self) -> None:
        """The temporary files become the result, at once where the folder is new."""
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
        """Remove what is left of the temporary folder."""
        with suppress(FileNotFoundError):
            shutil.rmtree(self.temporary)

    def _old_frames(self) -> list[Path]:
        return [] if self.single else list(pattern_numbers(self._folder, self._pattern).values())


def open_target(
    path: Path, *, overwrite: bool, scratch: Path | None = None
) -> FileTarget | FramesTarget:
    """The target for `path` by its extension. ValueError for an unknown one or an existing file.

    scratch: a folder of the same file system for what is unfinished, instead of the target's own.
    """
    _exists(path)  # asks the system whether such a name can be
    suffix = path.suffix.lower()
    if suffix in VIDEO_SUFFIXES:
        return FileTarget(path, overwrite=overwrite, scratch=scratch)
    if suffix in ("", ".png") or path.is_dir():
        return FramesTarget(path, overwrite=overwrite, scratch=scratch)
    raise ValueError(
        f"{path.name}: cannot write {suffix}. Use .mkv (lossless), .mp4, .mov, .webm, a folder or "
        f"{FRAME_NAMES}"
    )


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError as error:  # a name too long, a folder closed to us
        raise _unwritable(path, error) from None


def _keep_existing(path: Path, *, exists: bool, overwrite: bool) -> None:
    if exists and not overwrite:
        raise AlreadyThere(f"{path} exists already: choose another name, or allow overwriting")


def _unwritable(path: Path, error: OSError) -> ValueError:
    return ValueError(f"{path} cannot be written: {error.strerror}. Choose another place")
