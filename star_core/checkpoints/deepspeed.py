"""Tensors out of a PyTorch file that holds Python objects besides them, which are not built.

DeepSpeed writes its own state beside the weights: generators, shapes, classes by name. Here a
pickle can call four names, of which none does more than note numbers; every other object in it is
an empty stand-in. Tensors are views of the memory-mapped file.
"""

import mmap
import pickle
import struct
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


class _StandIn:
    """Takes whatever a pickle does to an object, and does nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __call__(self, *args: Any, **kwargs: Any) -> "_StandIn":
        return self

    def __setstate__(self, state: Any) -> None: ...

    def append(self, item: Any) -> None: ...

    def extend(self, items: Any) -> None: ...

    def __setitem__(self, key: Any, value: Any) -> None: ...

    def __hash__(self) -> int:
        return 0


class _Tensor:
    """A tensor's place in its storage."""

    def __init__(self, storage: Any, offset: int, size: tuple, stride: tuple, *rest: Any) -> None:
        self.storage, self.offset, self.size, self.stride = storage, offset, size, stride

    def __setstate__(self, state: Any) -> None: ...


class _Storage:
    def __init__(self, dtype: torch.dtype | None, key: str) -> None:
        self.dtype, self.key = dtype, key


class _Unpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str) -> Any:
        match module_name, global_name:
            case "collections", "OrderedDict":
                return OrderedDict
            case "torch._utils", "_rebuild_tensor_v2":
                return _Tensor
            case "torch._utils", "_rebuild_parameter":
                return lambda tensor, *rest: tensor
            case (("torch" | "torch.storage"), name) if name in _STORAGES:
                return _Storage(_STORAGES[name], "")
        return _StandIn

    def persistent_load(self, pid: Any) -> _Storage:
        _, kind, key, *_ = pid
        return _Storage(getattr(kind, "dtype", None), str(key))


def read_module(path: Path) -> dict[str, Tensor]:
    """The tensors under the key `module` of a PyTorch zip file, by their keys.

    ValueError for a file that has none there, or is damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            entries = {entry.filename.partition("/")[2]: entry for entry in archive.infolist()}
            content = _Unpickler(archive.open(entries["data.pkl"])).load()
            module = content["module"]
            memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            places = {
                name.removeprefix("data/"): (_start(file, entry), entry)
                for name, entry in entries.items()
                if name.startswith("data/")
            }
            return {
                str(key): _view(memory, places, value)
                for key, value in module.items()
                if isinstance(value, _Tensor)
            }
    except OSError:
        raise
    except Exception as error:  # a damaged pickle raises whatever its bytes happen to mean
        raise ValueError(f"{path} has no readable weights under `module` ({error})") from None


def _start(file: Any, entry: zipfile.ZipInfo) -> int:
    """Where the bytes of an entry begin, which its own header says."""
    if entry.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{entry.filename} is compressed")
    file.seek(entry.header_offset + 26)
    name_length, extra_length = struct.unpack("<HH", file.read(4))
    return entry.header_offset + 30 + name_length + extra_length


def _view(
    memory: mmap.mmap, places: Mapping[str, tuple[int, zipfile.ZipInfo]], tensor: _Tensor
) -> Tensor:
    dtype = tensor.storage.dtype
    if dtype is None:
        raise ValueError("a tensor has a type that weights do not have")
    start, entry = places[tensor.storage.key]
    count = entry.file_size // dtype.itemsize
    if count == 0:
        return torch.empty(tensor.size, dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the file cannot be written to
        flat = torch.frombuffer(memory, dtype=dtype, count=count, offset=start)
    return flat.as_strided(tensor.size, tensor.stride, tensor.offset)
