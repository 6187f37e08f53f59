"""Finished parts of a run, stored in a folder, so that an interrupted run can be resumed.

Every entry is a safetensors file named after its run, its content and the hash of its data. It gets
its name only once it is complete and on the disk. An entry whose data does not match its name, for
example after a power cut, is deleted and computed again.
"""

import hashlib
import json
import logging
import os
import secrets
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from filelock import FileLock, Timeout
from safetensors.torch import load, save
from torch import Tensor

_LOG = logging.getLogger(__name__)
_MARK = "what this folder is.txt"
_LOCK = "in use"
_COMPLETE = "complete"  # holds the name of the result in the folder
_PATIENCE = 10  # seconds in which other workers have entered
_LARGE = 10**8  # bytes
_LONGEST_NAME = 255  # bytes, of the common file systems
_NOTE = (
    "Finished parts of a video that is being restored. The same command continues from here and "
    "removes this folder when it is done. You may delete it; the work then starts from scratch.\n"
)


class Work:
    """A folder with the finished parts of one run: `keep`, `finish` and `recall` them.

    Use it as `with Work(folder) as work: work.begin(identity)`. The folder is removed if the block
    succeeds, or if there is nothing in it to resume from. It is locked meanwhile: one run at a time
    uses it, or the workers of one run. Entering raises ValueError if another run uses the folder,
    or if it contains other files or cannot be written to.
    """

    def __init__(
        self,
        folder: Path,
        *,
        out: Path | None = None,
        keep: bool = False,
        shared: bool = False,
    ) -> None:
        """Names the folder; entering the block creates it.

        out: the result that the work is for, named in messages; None for the folder. keep: do not
        remove the folder when the block succeeds. shared: for one of several workers, which
        removes neither the folder nor the entries of others.
        """
        self.folder, self._out = folder, out or folder
        self._keep, self._shared = keep, shared
        self._lock = FileLock(folder / _LOCK)
        self._own_lock = FileLock(folder / f"{_LOCK} by {secrets.token_hex(8)}")  # of a worker
        self._identity = ""

    def __enter__(self) -> "Work":
        folder = self.folder
        try:
            names = [path.name for path in folder.iterdir()] if folder.exists() else []
            if _MARK not in names and not all(name.startswith(_LOCK) for name in names):
                raise ValueError(
                    f"{self._out} cannot be written: {folder}, where its work is kept, holds other "
                    "files. Remove it, or choose another output"
                )
            folder.mkdir(exist_ok=True)
            (folder / _MARK).write_text(_NOTE)
            if self._shared:
                with self._lock.acquire(timeout=_PATIENCE):
                    self._own_lock.acquire(timeout=0)
            else:
                self._lock.acquire(timeout=0)
                for path in folder.glob(f"{_LOCK} by *"):
                    with FileLock(path, timeout=0):
                        pass
                    path.unlink(missing_ok=True)
                if self._is_done():
                    self._clear()
        except Timeout:
            self._lock.release()
            raise ValueError(
                f"another run is writing {self._out}: wait until it has finished, or choose "
                "another output"
            ) from None
        except OSError as error:
            raise ValueError(
                f"{self._out} cannot be written: {error.strerror} ({folder})"
            ) from None
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._shared:
            self._own_lock.release()
            Path(self._own_lock.lock_file).unlink(missing_ok=True)
            return
        if kind is not None:
            (self.folder / _COMPLETE).unlink(missing_ok=True)
        if kind is None and not self._keep or not any(self.folder.glob("*.safetensors")):
            self._clear()
            self._lock.release()
            shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.release()

    def complete(self, result: Path) -> None:
        """Notes that `result`, in this folder, is whole and about to be renamed to the output.

        A run that is killed after that leaves the folder, and the next one removes it.
        """
        if not self._keep:
            (self.folder / _COMPLETE).write_bytes(os.fsencode(result.name))

    def _is_done(self) -> bool:
        note = self.folder / _COMPLETE
        if not note.exists():
            return False
        result = self.folder / os.fsdecode(note.read_bytes())
        return not any(result.iterdir()) if result.is_dir() else not result.exists()

    def _clear(self) -> None:
        """Removes what could be resumed from before the note that it need not be."""
        for pattern in ("*.safetensors", _COMPLETE):
            for path in self.folder.glob(pattern):
                path.unlink(missing_ok=True)

    def begin(self, identity: str) -> None:
        """Starts or resumes a run, and removes unfinished files.

        identity: a hash of everything that the results depend on, see `identity_of`. Entries of
        other runs stay until this run has finished its first one.
        """
        self._identity = identity
        if self._shared:
            return
        entries = list(self.folder.glob("*.safetensors"))
        others = [path for path in entries if not path.name.startswith(f"{identity}.")]
        if others:
            _LOG.warning(
                "%s: %s contains the work of a run with other settings, input or model: starting "
                "from scratch. To continue that run, stop this one now and repeat its command; "
                "its work is removed once the first part of this one is finished",
                self._out,
                self.folder,
            )
        for path in (*self.folder.glob("*.part"), *self.folder.glob(_COMPLETE)):
            path.unlink()
        for path in self.folder.glob(".star-*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        if len(entries) > len(others):
            _LOG.warning("continuing with the finished parts in %s", self.folder)

    def recall(self, name: str) -> dict[str, Tensor] | None:
        """Loads the tensors stored under a name; None if there are none or they are damaged."""
        for path in self.folder.glob(f"{self._identity}.{name}.*.safetensors"):
            try:
                data = path.read_bytes()
            except FileNotFoundError:  # another process has just removed it
                continue
            if path.name == self._name(name, data):
                return load(data)
            _LOG.warning("%s is damaged: that part is computed again", path.name)
            path.unlink(missing_ok=True)
        return None

    def keep(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Stores tensors under a name; on return they are on the disk.

        Raises ValueError if they cannot be written, for example because the disk is full.
        """
        data = save({key: tensor.contiguous() for key, tensor in tensors.items()})
        path = self.folder / self._name(name, data)
        part = path.with_suffix(f".{secrets.token_hex(4)}.part")
        try:
            with part.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise ValueError(
                f"cannot write to {self.folder} for {self._out.name} ({error.strerror}): free some "
                "space and run the same command again, it continues from here"
            ) from None

    def finish(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Stores tensors as `keep` does, in place of `NAME-*` and of the work of other runs."""
        self.keep(name, tensors)
        self.forget(f"{name}-*")
        if self._shared:
            return
        for path in self.folder.glob("*.safetensors"):
            if not path.name.startswith(f"{self._identity}."):
                path.unlink(missing_ok=True)

    def forget(self, pattern: str) -> None:
        """Removes the entries whose names match a glob pattern like `0001-*`."""
        for path in self.folder.glob(f"{self._identity}.{pattern}.*.safetensors"):
            path.unlink(missing_ok=True)

    def _name(self, name: str, data: bytes) -> str:
        return f"{self._identity}.{name}.{hashlib.sha256(data).hexdigest()[:16]}.safetensors"


def identity_of(facts: Mapping[str, object]) -> str:
    """Returns a short hash of everything that a result depends on.

    facts: plain values; for others their `repr` is hashed.
    """
    text = json.dumps(facts, sort_keys=True, default=repr)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def hash_of(files: Sequence[Path]) -> str:
    """Returns the SHA-256 of files, in this order, with their names."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(os.fsencode(file.name) + f"\0{file.stat().st_size}\0".encode())
        with file.open("rb") as data:
            while block := data.read(2**22):
                digest.update(block)
    return digest.hexdigest()


def cached_hash(path: Path) -> str:
    """Returns the `hash_of` one file, from `FILE.hash` beside a large one that has not changed.

    That file is written if it can be, because hashing a checkpoint takes as long as reading it.
    """
    status = path.stat()
    if status.st_size < _LARGE:
        return hash_of([path])
    stamp = f"{status.st_size} {status.st_mtime_ns}"
    cache = path.with_name(f"{path.name}.hash")
    with suppress(OSError):
        digest, _, known = cache.read_text().strip().partition(" ")
        if known == stamp:
            return digest
    digest = hash_of([path])
    with suppress(OSError):
        cache.write_text(f"{digest} {stamp}\n")
    return digest


def tensor_hash(*tensors: Tensor) -> str:
    """Returns the SHA-256 of the shapes, dtypes and values (as float32) of tensors."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def work_folder(out: Path) -> Path:
    """Returns the path of the hidden folder for the work on a result.

    It lies in `out` itself if that is a folder, otherwise in its closest existing parent. One that
    is left from before `out` was made is found again.
    """
    out = out.absolute()
    places = [_folder_in(parent, out) for parent in (out, *out.parents) if parent.is_dir()]
    return next((place for place in places if place.is_dir()), places[0])


def _folder_in(parent: Path, out: Path) -> Path:
    name = "-".join(out.relative_to(parent).parts)
    folder = f".{name}-star-work" if name else ".star-work"
    if len(os.fsencode(folder)) > _LONGEST_NAME:
        folder = f".{hashlib.sha256(os.fsencode(name)).hexdigest()[:16]}-star-work"
    return parent / folder
