"""Reads tensor files memory-mapped, loads them strictly into modules, writes them as streams."""

import json
import logging
import os
import pickle
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .deepspeed import read_module
from .kinds import identify
from .quantization import METADATA, PackedTensor, packed_layers, stored

logger = logging.getLogger(__name__)

# safetensors' own limit in bytes: a file whose first bytes state more is of another kind.
_LONGEST_HEADER = 100_000_000

# safetensors' names of types.
_TYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
if hasattr(torch, "float8_e8m0fnu"):  # the oldest supported torch lacks it
    _TYPE_NAMES[torch.float8_e8m0fnu] = "F8_E8M0"


class TensorFile(Mapping[str, Tensor]):
    """The tensors of one file by key, as views of the memory-mapped file.

    A tensor occupies no memory of its own until it is converted or copied. Weights that ComfyUI has
    quantised are `quantization.PackedTensor` objects, which contain their scales.

    format: "safetensors", "torch", "torch (DeepSpeed)" or "torch (old)"; only a file of the last
    format is read into memory as a whole. metadata: the text metadata of a safetensors file, {} for
    other formats. Raises ValueError for a quantised layer that lacks a part or has an unknown
    format.
    """

    def __init__(
        self, path: Path, tensors: dict[str, Tensor], *, format: str, metadata: dict[str, str]
    ) -> None:
        self.path = path
        self.format = format
        self.metadata = {key: text for key, text in metadata.items() if key != METADATA}
        try:
            self._tensors = packed_layers(tensors, metadata)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def __getitem__(self, key: str) -> Tensor:
        return self._tensors[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


class LazyTensors(Mapping[str, Tensor]):
    """Tensors that a function computes anew at each access, so that none stays in memory.

    make: the function for each key.
    """

    def __init__(self, make: Mapping[str, Callable[[], Tensor]]) -> None:
        self._make = make

    def __getitem__(self, key: str) -> Tensor:
        return self._make[key]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._make)

    def __len__(self) -> int:
        return len(self._make)


def open_tensors(path: str | os.PathLike[str]) -> TensorFile:
    """Opens a safetensors or PyTorch (.pt .pth .ckpt .bin) file; its content decides, not its name.

    PyTorch files are read with `weights_only=True` and may wrap their tensors in `state_dict`. From
    files that DeepSpeed wrote, only the weights are read, see `deepspeed`.
    Raises ValueError for a file that is missing, empty, truncated or damaged, that contains
    anything but tensors and plain values, or that is not a checkpoint.
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
        raise ValueError(
            f"{path} cannot be read ({error.strerror}): check its permissions"
        ) from None
    if not head:
        raise ValueError(f"{path} is empty: download or copy it again")
    if head.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path} is a Git LFS pointer: fetch the real file with `git lfs pull`")
    header_length = int.from_bytes(head[:8], "little")
    if head[8:9] == b"{" and header_length <= _LONGEST_HEADER:
        return _open_safetensors(path, header_length)
    if head.startswith((b"PK\x03\x04", b"\x80")):
        if path.suffix == ".safetensors":  # torch.load chooses its reader by the name
            raise ValueError(f"{path} is a PyTorch file: rename it to .pt")
        return _open_torch(path, mmap=head.startswith(b"PK") and _is_torch_zip(path))
    raise ValueError(
        f"{path} is neither a safetensors nor a PyTorch file (it begins with {head[:8]!r}): "
        "perhaps a web page or something else was saved under this name; download it again"
    )


def _open_safetensors(path: Path, header_length: int) -> TensorFile:
    with path.open("rb") as file:
        file.seek(8)
        encoded = file.read(header_length)
    try:
        header: dict[str, dict] = json.loads(encoded) if len(encoded) == header_length else {}
        metadata = header.pop("__metadata__", {})
        data_length = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except (ValueError, LookupError, TypeError, AttributeError):
        raise ValueError(f"{path} is damaged: its header is unreadable; copy it again") from None
    size, expected = path.stat().st_size, 8 + header_length + data_length
    if size < expected:
        raise ValueError(
            f"{path} is truncated: it has {size} of at least {expected} bytes; download or copy it "
            "again"
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
        # The directory of a zip file is at its end, so a truncated file has none.
        raise ValueError(f"{path} is truncated or damaged: download or copy it again") from None
    if "constants.pkl" in names:
        raise ValueError(
            f"{path} is a TorchScript program, not a checkpoint: use a file that contains only the "
            "weights (a state dict)"
        )
    if "data.pkl" not in names:
        raise ValueError(f"{path} is a zip archive without a checkpoint in it: unpack it first")
    return True


def _open_torch(path: Path, *, mmap: bool) -> TensorFile:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        if refused := re.search(r"GLOBAL (\S+)", str(error)):
            if mmap:  # the objects may be DeepSpeed's, stored beside the weights
                with suppress(ValueError):
                    tensors = read_module(path)
                    return TensorFile(path, tensors, format="torch (DeepSpeed)", metadata={})
            raise ValueError(
                f"{path} was not loaded: it contains Python objects besides tensors "
                f"({refused[1]}), which could run any code; use a file with weights only, or save "
                "its state_dict alone on a machine where you trust it"
            ) from None
        raise ValueError(
            f"{path} is damaged or contains something other than tensors (nothing in it was run): "
            "download it again, or save its state_dict alone on a machine where you trust it"
        ) from None
    except Exception as error:  # a damaged pickle stream can raise anything
        raise ValueError(
            f"{path} is damaged or not a checkpoint ({type(error).__name__}): download it again"
        ) from None
    entries = content if isinstance(content, Mapping) else {}
    for wrapper in ("state_dict", "module"):  # DeepSpeed's files, such as CogVideoX's: `module`
        if isinstance(entries.get(wrapper), Mapping):
            entries = entries[wrapper]
    tensors = {str(k): v.detach() for k, v in entries.items() if isinstance(v, Tensor)}
    if not tensors:
        content_names = first_names(map(str, entries)) or type(content).__name__
        raise ValueError(
            f"{path} has no tensors at its top level or in `state_dict`, only {content_names}: "
            "save the state_dict alone"
        )
    return TensorFile(path, tensors, format="torch" if mmap else "torch (old)", metadata={})


def first_names(names: Iterable[str], limit: int = 3) -> str:
    """Returns the first `limit` names and the number of the others: "a, b, c and 273 more"."""
    names = list(names)
    others = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + others


def cast(key: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Returns a floating-point tensor in `dtype`, and any other tensor as it is.

    key: the tensor's name in error messages. dtype: None keeps the tensor's own. The weight of a
    quantised layer is unpacked. Raises ValueError where a finite value is beyond the range of
    dtype.
    """
    if isinstance(tensor, PackedTensor):
        dtype, tensor = dtype or tensor.dtype, tensor.unpacked()
    if dtype is None or tensor.dtype == dtype or not tensor.is_floating_point():
        return tensor
    converted = tensor.to(dtype)
    largest = torch.finfo(dtype).max
    narrower = tensor.numel() > 0 and largest < torch.finfo(tensor.dtype).max
    # aminmax rather than isinf: it allocates nothing, so the heap does not fragment.
    if narrower and any(e.isfinite() and e.abs() > largest for e in tensor.aminmax()):
        raise ValueError(
            f"{key!r} holds values beyond {dtype}'s largest, {largest:g}: choose a wider type"
        )
    return converted


def load_into(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    *,
    expected: Mapping[str, Tensor] | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    packed: bool = False,
    name: str = "the file",
) -> None:
    """Assigns its tensor to every parameter and buffer of `module`, converted one by one.

    module: usually on the device "meta". Tensors that need no conversion stay views of the
    memory-mapped file.
    expected: the module's keys with tensors of the right shapes; None for its state dict, which is
    incomplete where a host's layers have no weights until they are loaded.
    dtype: of floating-point tensors; None keeps each tensor's.
    packed: leaves the weights of quantised layers as the file stores them, for host layers that
    compute with them.
    name: the file's name in messages.
    Raises ValueError unless every expected key is in `tensors` with its shape. Unexpected keys are
    ignored with a warning.
    """
    expected = module.state_dict() if expected is None else expected
    differences = compare(tensors, expected)
    if differences.missing or differences.mismatched:
        kind = identify(tensors)
        raise ValueError(
            f"{name} does not fit {type(module).__name__}: {differences}. It seems to be a "
            f"{kind.title}: {kind.advice or 'choose a complete file of the right kind'}"
        )
    if unexpected := differences.unexpected:
        names = first_names(unexpected)
        logger.warning("%s: %d unexpected keys are ignored: %s", name, len(unexpected), names)
    converted: dict[str, Tensor] = {}
    for key in expected:
        if packed and isinstance(tensors[key], PackedTensor):
            converted |= stored({key: tensors[key]})
        else:
            converted[key] = cast(key, tensors[key], dtype).to(device).contiguous()
    module.load_state_dict(converted, strict=True, assign=True)


@dataclass(frozen=True)
class Differences:
    """The keys in which a file differs from a network; str() names the first of each sort.

    missing: keys of the network that the file lacks. mismatched: keys whose tensors differ in shape
    or type; first_mismatch describes the first of them, "" if there is none. unexpected: keys that
    the network does not have.
    """

    missing: list[str]
    mismatched: list[str]
    unexpected: list[str]
    first_mismatch: str

    def __str__(self) -> str:
        sorts = [
            (self.missing, "is missing"),
            (self.mismatched, self.first_mismatch),
            (self.unexpected, "is unexpected"),
        ]
        return "; ".join(
            f"{keys[0]!r} {what}" + (f" (and {len(keys) - 1} more)" if keys[1:] else "")
            for keys, what in sorts
            if keys
        )


def compare(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> Differences:
    """Returns how the tensors of a file differ from `expected`, a network's `state_dict()`."""
    mismatched = [
        key
        for key in expected
        if key in tensors
        and (
            tensors[key].shape != expected[key].shape
            or tensors[key].is_floating_point() != expected[key].is_floating_point()
        )
    ]
    first = ""
    if mismatched:
        tensor, other = tensors[mismatched[0]], expected[mismatched[0]]
        first = f"is {tensor.dtype} {list(tensor.shape)} instead of {list(other.shape)}"
    return Differences(
        missing=[key for key in expected if key not in tensors],
        mismatched=mismatched,
        unexpected=[key for key in tensors if key not in expected],
        first_mismatch=first,
    )


def write_tensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    *,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a safetensors file, with one converted tensor in memory at a time.

    dtype: of floating-point tensors; None keeps each tensor's. metadata: text that is stored beside
    "format". Tensors that share memory are written separately. The file appears under its name
    once it is complete.
    Raises ValueError if `path` does not end in .safetensors, exists while `overwrite` is off, or
    cannot be written, and for values or types that the file cannot store.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"{path} must end in .safetensors, the only format that is written")
    if path.exists() and not overwrite:
        raise ValueError(f"{path} exists already: choose another name, or allow overwriting")
    # Wide types first: then each tensor is aligned to its element size, as mapping needs.
    types, shapes = {}, {}
    for key, tensor in tensors.items():  # only once: each access may compute the tensor anew
        types[key] = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        shapes[key] = tensor.shape
    keys = sorted(types, key=lambda key: -types[key].itemsize)
    header: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end = 0
    for key in keys:
        if types[key] not in _TYPE_NAMES:
            raise ValueError(f"{key!r} is {types[key]}, which safetensors files cannot store")
        begin, end = end, end + shapes[key].numel() * types[key].itemsize
        header[key] = {
            "dtype": _TYPE_NAMES[types[key]],
            "shape": list(shapes[key]),
            "data_offsets": [begin, end],
        }
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with temporary.open("wb") as file:
            file.write(len(encoded).to_bytes(8, "little") + encoded)
            for key in keys:
                tensor = cast(key, tensors[key], dtype).cpu().contiguous()
                file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
        os.replace(temporary, path)
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.strerror}") from None
    finally:
        with suppress(OSError):
            temporary.unlink()
