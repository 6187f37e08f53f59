"""Reads pickles of numpy arrays without importing or executing anything that they name.

`torch.load` cannot read such files, which have no torch header, and numpy's own constructors trust
their arguments, so stand-ins record these and arrays are built from the checked values.
"""

import pickle
from pathlib import Path
from typing import Any

import numpy as np

# The names in the pickle of an array; numpy 2 has renamed the first module to the second.
_NAMES = {
    (module, name): name
    for module, name in (
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "_reconstruct"),
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
    )
}


class _Dtype:
    """A stand-in for numpy.dtype: the code of a number type, such as f4, and its byte order."""

    def __init__(self, code: str, align: bool = False, copy: bool = False) -> None:
        self.code = code
        self.order = "="

    def __setstate__(self, state: tuple) -> None:
        self.order = state[1]

    def real(self) -> np.dtype:
        dtype = np.dtype((self.order if self.order in "<>" else "=") + self.code)
        if dtype.kind not in "fiub":
            raise ValueError(f"an array of type {self.code}")
        return dtype


class _Array:
    """A stand-in for numpy.ndarray that records its state."""

    def __setstate__(self, state: tuple) -> None:
        _, self.shape, self.dtype, self.by_columns, self.data = state

    def real(self) -> np.ndarray:
        flat = np.frombuffer(self.data, self.dtype.real())
        return flat.reshape(self.shape, order="F" if self.by_columns else "C").copy()


class _Unpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str) -> Any:
        name = _NAMES.get((module_name, global_name))
        if name is None:
            raise pickle.UnpicklingError(f"it names {module_name}.{global_name}")
        return {"_reconstruct": lambda *_: _Array(), "ndarray": _Array, "dtype": _Dtype}[name]


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Returns the arrays of a pickled tree of dicts, by their keys joined with dots.

    Raises ValueError for a pickle with anything but dicts and arrays of numbers.
    """
    arrays: dict[str, np.ndarray] = {}

    def collect(node: Any, name: str) -> None:
        if isinstance(node, dict):
            for key, value in node.items():
                collect(value, f"{name}.{key}" if name else str(key))
        elif isinstance(node, _Array):
            arrays[name] = node.real()
        else:
            raise ValueError(f"{name} is not an array")

    try:
        with path.open("rb") as file:
            collect(_Unpickler(file).load(), "")
    except OSError:
        raise
    except Exception as error:  # a damaged pickle raises whatever its bytes happen to mean
        raise ValueError(
            f"{path} is not a pickle of arrays alone ({error}): download it again"
        ) from None
    return arrays
