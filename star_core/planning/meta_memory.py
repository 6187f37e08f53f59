"""Counts the memory that tensors occupy while code runs.

Tensors of the meta device have a shape and no data: they take no memory and nothing is computed, so
the code itself shows within a second what it would need at any size. What libraries allocate inside
an operation is not counted.
"""

import weakref
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

META = torch.device("meta")


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of the tensors that are created while it is active.

    Used as a context manager. live: bytes that are alive now. peak: the most that were alive at
    once. traffic: bytes that operations have read and written. largest: values of the largest
    tensor. Real tensors are counted, and those of the meta device and of `FakeTensorMode`.
    """

    def __init__(self, device: str | None = None) -> None:
        """device: type of the device whose tensors are counted, such as "cuda"; None for all."""
        super().__init__()
        self.device, self.live, self.peak = device, 0, 0
        self.traffic = self.largest = 0
        self._sizes: dict[int, int] = {}  # bytes of each living storage, by its id

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        # A view of an older tensor, such as a weight, takes no memory of its own.
        inputs = list(_tensors((args, tuple(kwargs.values()))))
        out = func(*args, **kwargs)
        before = set(map(_key, inputs))
        made = [x for x in _tensors(out) if _key(x) not in before]
        for tensor in made:
            if self.device in (None, tensor.device.type):
                self._add(tensor)
        if made or any(out is x for x in inputs):  # else it is a view
            self.traffic += sum(x.nbytes for x in (*inputs, *made))
        return out

    def _add(self, tensor: Tensor) -> None:
        key, storage = _key(tensor), tensor.untyped_storage()
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            self.largest = max(self.largest, tensor.numel())
            weakref.finalize(storage, self._remove, key)

    def _remove(self, key: int) -> None:
        self.live -= self._sizes.pop(key)


class LiveMetaTensors(LiveTensors):
    """Counts the bytes of meta tensors only, and fast, and the FLOPs of the operations.

    flops: two for each multiply-add, counted by torch's formulas. Attention counts as a fused
    kernel, which holds no matrix of scores.
    """

    def __init__(self) -> None:
        super().__init__("meta")
        self.flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        aten, kwargs = torch.ops.aten, kwargs or {}
        if func is aten.scaled_dot_product_attention.default:
            self.flops += sdpa_flop_count(*(x.shape for x in args[:3]))
            fused = aten._scaled_dot_product_flash_attention_for_cpu.default
            return super().__torch_dispatch__(partial(_infer, fused), types, args[:3])[0]
        if func not in _BASIC:
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
            _BASIC.add(func)
        out = super().__torch_dispatch__(partial(_infer, func), types, args, kwargs)
        if formula := flop_registry.get(func.overloadpacket):
            self.flops += formula(*args, **kwargs, out_val=out)
        return out


_BASIC: set[Any] = set()  # operations that are not made of others
# Whether an operation returns several new tensors, and their shapes, strides and dtypes, by the
# operation and its arguments. Without it a pass takes three to four times as long.
_RESULTS: dict[Any, tuple[bool, list[Any]]] = {}
_VIEWS: set[Any] = set()  # operations that return views, at least of some tensors


def _infer(func: Any, *args: Any, **kwargs: Any) -> Any:
    """Returns what an operation makes of meta tensors."""
    if func in _VIEWS:
        return func(*args, **kwargs)
    key = (func, _traits(args), _traits(tuple(kwargs.items())))
    if key in _RESULTS:
        several, layouts = _RESULTS[key]
        out = [torch.empty_strided(s, t, dtype=d, device=META) for s, t, d in layouts]
        return tuple(out) if several else out[0]
    out = func(*args, **kwargs)
    if not {_key(x) for x in _tensors(args)}.isdisjoint(map(_key, _tensors(out))):
        _VIEWS.add(func)
        return out
    results = out if isinstance(out, tuple) else (out,)
    if all(isinstance(x, Tensor) and x.is_meta for x in results):
        _RESULTS[key] = results is out, [(x.shape, x.stride(), x.dtype) for x in results]
    return out


def _traits(x: Any) -> Any:
    if isinstance(x, Tensor):
        return x.shape, x.stride(), x.dtype, x.is_meta
    return tuple(map(_traits, x)) if isinstance(x, (tuple, list)) else (type(x), x)


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (tuple, list)):
        for branch in tree:
            yield from _tensors(branch)


def _key(tensor: Tensor) -> int:
    # Python's object of a storage lives as long as the storage does.
    return id(tensor.untyped_storage())
