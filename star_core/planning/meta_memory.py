"""How much memory tensors occupy at most: counted as they come and go.

Tensors of the meta device have a shape and nothing else: no memory is taken and nothing is
computed, so the code itself tells within a second what it would need at any size. What libraries
take inside an operation is not seen.
"""

import weakref
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

META, CPU = torch.device("meta"), torch.device("cpu")


class LiveTensors(TorchDispatchMode):
    """While active, `peak` is the most bytes of tensors made inside that were alive at once.

    Of real tensors, of torch's fake ones and of those of the meta device. device: those on a device
    of this type only. Fake tensors may lie on "meta" and on "cpu" beside it.
    """

    def __init__(self, device: str | None = None) -> None:
        super().__init__()
        self.device = device
        self.live, self.peak = 0, 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.counted(func, args, kwargs or {})

    def counted(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        # A view of what was there before, such as a weight, is nothing new.
        given = {_storage(tensor) for tensor in _tensors((args, tuple(kwargs.values())))}
        out = self.run(func, args, kwargs)
        for tensor in _tensors(out):
            if _storage(tensor) not in given:
                self.count(tensor)
        return out

    def run(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        return func(*args, **kwargs)

    def count(self, tensor: Tensor) -> None:
        key, size = _storage(tensor), tensor.untyped_storage().nbytes()
        if key in self.seen or self.device not in (None, tensor.device.type):
            return
        self.seen.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)

        def freed() -> None:
            self.seen.discard(key)
            self.live -= size

        weakref.finalize(tensor.untyped_storage(), freed)


class LiveMetaTensors(LiveTensors):
    """The same of meta tensors alone, fast: what an operation makes of which shapes is remembered.

    Attention takes what a fused kernel takes, no matrix of scores. What is sent to the CPU stays a
    meta tensor and counts from when it is read again: its way to main memory and back. `away_peak`
    is the most bytes that were there at once.
    """

    def __init__(self) -> None:
        super().__init__("meta")
        self.away: dict[int, int] = {}
        self.away_peak = 0
        self.attention = _FusedAttention()

    def __enter__(self):
        self.attention.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.attention.__exit__(*error)

    def counted(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        inputs = list(_tensors(args))
        # Sent there, or into an empty tensor there.
        leaving = inputs or func is torch.ops.aten.empty.memory_format
        if leaving and kwargs.get("device") == CPU and all(tensor.is_meta for tensor in inputs):
            out = func(*args, **{**kwargs, "device": META, "pin_memory": False})
            self.away[_storage(out)] = out.nbytes
            self.away_peak = max(self.away_peak, sum(self.away.values()))
            weakref.finalize(out.untyped_storage(), self.away.pop, _storage(out), None)
            return out
        if self.away and func is not torch.ops.aten.copy_.default:
            for tensor in inputs:
                if _storage(tensor) in self.away:
                    del self.away[_storage(tensor)]
                    self.count(tensor)
        return super().counted(func, args, kwargs)

    def run(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        if _aliases(func):
            return func(*args, **kwargs)
        key = (func, _traits(args), _traits(tuple(kwargs.items())))
        if key not in _KNOWN:
            out = func(*args, **kwargs)
            made = [out] if isinstance(out, Tensor) else out if isinstance(out, tuple) else [None]
            if all(isinstance(x, Tensor) and x.is_meta for x in made):
                _KNOWN[key] = made[0] is out, [_traits(x)[:3] for x in made]
            return out
        single, traits = _KNOWN[key]
        made = [torch.empty_strided(s, t, dtype=d, device=META) for s, t, d in traits]
        return made[0] if single else tuple(made)


# From an operation and its arguments' shapes to the shapes of what it makes.
_KNOWN: dict[Any, tuple[bool, list[Any]]] = {}


@cache
def _aliases(func: Any) -> bool:
    """Whether an operation writes into what it is given or gives a view of it."""
    return any(x.alias_info for x in (*func._schema.arguments, *func._schema.returns))


def _traits(x: Any) -> Any:
    if isinstance(x, Tensor):
        return x.shape, x.stride(), x.dtype, x.is_meta
    if isinstance(x, (tuple, list)):
        return tuple(map(_traits, x))
    return type(x), x


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (tuple, list)):
        for branch in tree:
            yield from _tensors(branch)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class _FusedAttention(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention and args[0].is_meta:
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*args[:3])[0]
        return func(*args, **(kwargs or {}))
