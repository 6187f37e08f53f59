"""Reads the weights of a PyTorch file in which DeepSpeed has stored Python objects besides them.

DeepSpeed writes its own state beside the weights: generators, shapes, classes by name. Here a
pickle can name only what builds tensors; every other object in it becomes an empty stand-in, so
nothing that the file names is imported or executed.
"""

import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

_TENSOR_BUILDERS = {
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_parameter"),
}


class _StandIn:
    """Accepts whatever a pickle does to an object, and does nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __call__(self, *args: Any, **kwargs: Any) -> "_StandIn":
        return self

    def __setstate__(self, state: Any) -> None: ...

    def append(self, item: Any) -> None: ...

    def extend(self, items: Any) -> None: ...

    def __setitem__(self, key: Any, value: Any) -> None: ...

    def __hash__(self) -> int:
        return 0


class _Unpickler(pickle.Unpickler):
    """The unpickler that `torch.load` derives its own from, which adds the tensors' storages."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        if (module_name, global_name) == ("collections", "OrderedDict"):
            return super().find_class(module_name, global_name)
        if (module_name, global_name) in _TENSOR_BUILDERS:
            build = super().find_class(module_name, global_name)
            return lambda *args: build(*args)  # a pickle may set attributes, but not torch's
        return _StandIn


def read_module(path: Path) -> dict[str, Tensor]:
    """Returns the tensors under the key `module` of a PyTorch zip file, by their keys.

    They are views of the memory-mapped file. Entries of `module` that are not tensors are left out.
    Raises ValueError for a file that is damaged or has no such key.
    """
    pickle_module: Any = SimpleNamespace(__name__="pickle", Unpickler=_Unpickler)
    try:
        content = torch.load(
            path, map_location="cpu", mmap=True, weights_only=False, pickle_module=pickle_module
        )
        module = content["module"].items()
        return {str(key): value.detach() for key, value in module if isinstance(value, Tensor)}
    except OSError:
        raise
    except Exception as error:  # a damaged pickle raises whatever its bytes happen to mean
        raise ValueError(f"{path} has no readable weights under `module` ({error})") from None
