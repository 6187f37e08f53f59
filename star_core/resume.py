"""What a run has finished, kept in a folder, so that the same run goes on after whatever ended it.

Every entry is a safetensors file named after the run it belongs to, what it holds and the hash of
its content. It gets its name only when it is complete and on the disk; one whose content does not
fit its name, after a power cut, is thrown away and made again.
"""

import hashlib
import json
import logging
import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from safetensors.torch import load, save
from torch import Tensor

_LOG = logging.getLogger(__name__)
_MARK = "what this folder is.txt"
_NOTE = (
    "Finished parts of a video that is being restored. The same command goes on from here; when "
    "it is done, this folder goes. It may be deleted, the work then begins anew.\n"
)


class Work:
    """A folder with entries of one run: `keep` and `recall` tensors by name.

    `with Work(folder) as work: work.begin(identity)`. When the block ends well, the folder goes;
    if it fails, the folder stays where there is something in it to go on from. ValueError where the
    folder holds something else, or cannot be written to.
    """

    def __init__(self, folder: Path, *, keep: bool = False, shared: bool = False) -> None:
        """keep: the folder stays however the block ends. shared: other processes work in it too,
        so that only what is this one's is removed.
        """
        self.folder, self._stays, self._shared = folder, keep, shared
        self._identity = ""

    def __enter__(self) -> "Work":
        folder = self.folder
        try:
            if folder.exists() and not (folder / _MARK).exists() and any(folder.iterdir()):
                raise ValueError(f"{folder} holds other files: remove it, or choose another output")
            folder.mkdir(exist_ok=True)
            (folder / _MARK).write_text(_NOTE)
        except OSError as error:
            raise ValueError(f"{folder} cannot be written: {error.strerror}") from None
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._shared:
            return
        if kind is None and not self._stays or not any(self.folder.glob("*.safetensors")):
            shutil.rmtree(self.folder, ignore_errors=True)

    def begin(self, identity: str) -> None:
        """Remove what other runs, and this one when it was killed, have left unfinished."""
        self._identity = identity
        if self._shared:
            return
        entries = list(self.folder.glob("*.safetensors"))
        others = [path for path in entries if not path.name.startswith(f"{identity}.")]
        if others:
            _LOG.warning(
                "%s held the work of a run with other settings, input or model: it begins anew",
                self.folder,
            )
        for path in (*others, *self.folder.glob("*.part")):
            path.unlink()
        for path in self.folder.glob(".star-*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        if len(entries) > len(others):
            _LOG.warning("going on with what is in %s", self.folder)

    def recall(self, name: str) -> dict[str, Tensor] | None:
        """What was kept under a name; None if nothing was, or if it is damaged."""
        for path in self.folder.glob(f"{self._identity}.{name}.*.safetensors"):
            try:
                data = path.read_bytes()
            except FileNotFoundError:  # another process was faster
                continue
            if path.name == self._name(name, data):
                return load(data)
            _LOG.warning("%s is damaged: that part is done again", path.name)
            path.unlink(missing_ok=True)
        return None

    def keep(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep tensors under a name; on return they are on the disk. ValueError if it is full."""
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
                f"{self.folder} cannot take more ({error.strerror}): make room and give the same "
                "command again, it goes on from here"
            ) from None

    def forget(self, pattern: str) -> None:
        """Remove the entries whose names fit a pattern like `0001-*`."""
        for path in self.folder.glob(f"{self._identity}.{pattern}.*.safetensors"):
            path.unlink(missing_ok=True)

    def _name(self, name: str, data: bytes) -> str:
        return f"{self._identity}.{name}.{hashlib.sha256(data).hexdigest()[:16]}.safetensors"


def identity_of(facts: Mapping[str, object]) -> str:
    """A short hash of everything that the result depends on; facts: plain values, or `repr`s."""
    text = json.dumps(facts, sort_keys=True, default=repr)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def hash_of(path: Path) -> str:
    """SHA-256 of a file, or of the files in a folder and their names."""
    digest = hashlib.sha256()
    for file in sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]:
        digest.update(f"{file.name}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as data:
            while block := data.read(2**22):
                digest.update(block)
    return digest.hexdigest()


def tensor_hash(*tensors: Tensor) -> str:
    """SHA-256 of the values of tensors."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def work_folder(out: Path) -> Path:
    """Where the work on a result lies: hidden, in the innermost folder of it that is there."""
    out = out.absolute()
    place = next(folder for folder in (out, *out.parents) if folder.is_dir())
    return place / f".{'-'.join((*out.relative_to(place).parts, 'star-work'))}"
