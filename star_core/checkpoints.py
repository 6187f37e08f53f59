"""Checkpoint files: opened memory-mapped, recognised by their keys, loaded strictly."""

import json
import logging
import os
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

logger = logging.getLogger(__name__)


class TensorFile(Mapping[str, Tensor]):
    """The tensors of one file by key, as views of the memory-mapped file.

    A tensor occupies no memory of its own until it is converted or copied. `format` is
    "safetensors", "torch" or "torch (old)"; only the last one is read into memory as a whole.
    `metadata` is the text metadata of a safetensors file, {} for the others.
    """

    def __init__(
        self, path: Path, tensors: dict[str, Tensor], *, format: str, metadata: dict[str, str]
    ) -> None:
        self.path = path
        self.format = format
        self.metadata = metadata
        self._tensors = tensors

    def __getitem__(self, key: str) -> Tensor:
        return self._tensors[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def open_tensors(path: str | os.PathLike[str]) -> TensorFile:
    """Open a safetensors or PyTorch (.pt .pth .ckpt .bin) file; its content decides, not its name.

    PyTorch files are read with `weights_only=True` and may wrap their tensors in `state_dict`.
    Raises ValueError for a file that is missing, empty, truncated, damaged, holds anything but
    tensors and plain values, or is no checkpoint at all.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder: name the checkpoint file inside it")
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist: check the path") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}): check its rights") from None
    if not head:
        raise ValueError(f"{path} is empty: download or copy it again")
    if head.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path} is a Git LFS pointer: fetch the real file with `git lfs pull`")
    if head[8:9] == b"{":
        return _open_safetensors(path, int.from_bytes(head[:8], "little"))
    if head.startswith(b"PK\x03\x04"):
        return _open_torch(path, mmap=_is_torch_zip(path))
    if head.startswith(b"\x80"):
        return _open_torch(path, mmap=False)
    raise ValueError(
        f"{path} is neither a safetensors nor a PyTorch file (it begins with {head[:8]!r}): "
        "perhaps a web page or something else was saved under this name; download it again"
    )


def _open_safetensors(path: Path, header_length: int) -> TensorFile:
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            file.seek(8)
            header: dict = json.loads(file.read(header_length))
        metadata: dict[str, str] = header.pop("__metadata__", {})
        expected = (
            8 + header_length + max((h["data_offsets"][1] for h in header.values()), default=0)
        )
    except (ValueError, KeyError, TypeError, AttributeError, MemoryError):
        if 8 + header_length > size:
            expected = 8 + header_length
        else:
            raise ValueError(
                f"{path} is damaged: its header is unreadable; copy it again"
            ) from None
    if expected > size:
        raise ValueError(
            f"{path} is truncated: {size} of {expected} bytes are there; download or copy it again"
        )
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in header}
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}): download or copy it again") from None
    return TensorFile(path, tensors, format="safetensors", metadata=metadata)


def _is_torch_zip(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name.rpartition("/")[2] for name in archive.namelist()]
    except zipfile.BadZipFile:
        # The directory of a zip file is its end: without it the rest is not worth trying.
        raise ValueError(f"{path} is truncated or damaged: download or copy it again") from None
    if "constants.pkl" in names:
        raise ValueError(
            f"{path} is a TorchScript program, not a checkpoint: use the file with the weights "
            "alone (a state dict)"
        )
    if "data.pkl" not in names:
        raise ValueError(f"{path} is a zip archive without a checkpoint in it: unpack it first")
    return True


def _open_torch(path: Path, *, mmap: bool) -> TensorFile:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        if refused := re.search(r"GLOBAL (\S+)", str(error)):
            raise ValueError(
                f"{path} was not loaded: it holds Python objects besides tensors "
                f"({refused[1]}), which could run any code; use a file of weights only, or save "
                "its state_dict alone on a machine where you trust it"
            ) from None
        raise ValueError(f"{path} is damaged or no checkpoint: download or copy it again") from None
    except Exception as error:  # a damaged pickle stream can raise anything
        raise ValueError(
            f"{path} is damaged or no checkpoint ({type(error).__name__}): "
            "download or copy it again"
        ) from None
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    entries = content if isinstance(content, Mapping) else {}
    tensors = {k: v.detach() for k, v in entries.items() if isinstance(v, Tensor)}
    if not tensors:
        found = ", ".join(map(str, list(entries)[:8])) or type(content).__name__
        raise ValueError(
            f"{path} has no tensors at its top level or in `state_dict` (found: {found}): save "
            "the state_dict alone"
        )
    return TensorFile(path, tensors, format="torch" if mmap else "torch (old)", metadata={})


def load_into(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    name: str = "the file",
) -> None:
    """Give every parameter and buffer of `module` (on meta) its tensor, converted one by one.

    Floating-point tensors become `dtype` (None keeps theirs); what needs no conversion stays a
    view of the memory-mapped file. Raises ValueError unless every key of the module is there with
    its shape. Keys that the module does not have are listed in a warning and dropped.
    """
    wanted = module.state_dict()
    missing = [key for key in wanted if key not in tensors]
    mismatched = [k for k, v in wanted.items() if k in tensors and tensors[k].shape != v.shape]
    unexpected = [key for key in tensors if key not in wanted]
    if missing or mismatched:
        problems = []
        if missing:
            problems.append(f"{missing[0]!r} is missing{_and_more(missing)}")
        if mismatched:
            key = mismatched[0]
            shapes = f"{list(tensors[key].shape)} instead of {list(wanted[key].shape)}"
            problems.append(f"{key!r} is {shapes}{_and_more(mismatched)}")
        if unexpected:
            problems.append(f"{unexpected[0]!r} is unexpected{_and_more(unexpected)}")
        raise ValueError(f"{name} does not fit {type(module).__name__}: " + "; ".join(problems))
    if unexpected:
        logger.warning("%s: %d keys ignored: %s", name, len(unexpected), ", ".join(unexpected))
    converted = {}
    for key in wanted:
        tensor = tensors[key]
        to = dtype if tensor.is_floating_point() else None
        converted[key] = tensor.to(device=device, dtype=to).contiguous()
    module.load_state_dict(converted, strict=True, assign=True)


def _and_more(keys: list[str]) -> str:
    return f" (and {len(keys) - 1} more)" if len(keys) > 1 else ""
