"""A stand-in for a GPU: tensors that claim to be on cuda:0 and are computed on the CPU.

`with StandIn() as card:` makes every call of torch from Python pass through a function mode. A
tensor that was moved to "cuda" carries a mark, as does every result computed from it, so that
`device`, `is_cuda` and module.to behave as they do with a card. What a card refuses is an error:
operations on tensors of both devices, `numpy()` of a tensor on the card. What makes the host wait
for a card is counted. The numbers are those of the CPU, to the last bit.

What is copied in a stream beside the main one must not be used before the main stream has waited
for it; that is an error too.

Marks are attributes of Python objects and not a class of their own, so that parameters stay
parameters, in inference mode too. Not simulated: what generators of the card draw, memory, other
functions of torch.cuda, autocasting, and what the autograd engine does.
"""

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from pytest import MonkeyPatch
from torch import Tensor
from torch.overrides import TorchFunctionMode

CARD = torch.device("cuda", 0)
MEMORY = 24 * 2**30


def on_card(x: object) -> bool:
    return isinstance(x, Tensor) and getattr(x, "_on_card", False)


def _marked(x: Any, card: bool) -> Any:
    if isinstance(x, Tensor):
        if card or on_card(x):
            x._on_card = card  # pyright: ignore[reportAttributeAccessIssue]
    elif isinstance(x, (tuple, list)):
        for each in x:
            _marked(each, card)
    return x


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    found = []
    for x in values:
        if isinstance(x, Tensor):
            found.append(x)
        elif isinstance(x, (tuple, list)):
            found += _tensors(x)
    return found


def _is_card(device: object) -> bool:
    return device is not None and torch.device(device).type == "cuda"  # pyright: ignore


class Stream:
    """A stream of the card. arriving: tensors copied in it that no other stream has waited for."""

    def __init__(self, device: object = None) -> None:
        self.arriving: list[Tensor] = []

    def wait_stream(self, other: "Stream") -> None:
        for x in other.arriving:
            del x._arrives_in  # pyright: ignore
        other.arriving.clear()


MAIN = Stream()


def _limit_memory(fraction: float, device: object = None) -> None:
    if not (0 <= fraction <= 1 and (device is None or type(device) is int)):
        raise ValueError(f"Invalid fraction or device without index: {fraction}, {device}")


class Generator(torch.Generator):
    """A generator of the card, which draws on the CPU."""

    def __new__(cls, device: object = "cpu") -> "Generator":
        return super().__new__(cls, "cpu" if _is_card(device) else device)  # pyright: ignore


def _getter(name: str) -> Any:
    return getattr(torch.Tensor, name).__get__


_T = torch.Tensor
# The host reads a result, so it waits until the card has computed it.
_READ = {
    _T.item, _T.tolist, _T.__bool__, _T.__float__, _T.__int__, _T.__index__, _T.__complex__,
    _T.__contains__, _T.nonzero, torch.nonzero, torch.equal, _T.equal, torch.allclose,
    _T.allclose, torch.masked_select, _T.masked_select, torch.unique, _T.unique,
    torch.bincount, _T.bincount,
}  # fmt: skip
_ANY_DEVICE = {torch._has_compatible_shallow_copy_type}  # pyright: ignore
_FROM_HOST_VALUES = {_T.new_tensor, torch.tensor, torch.as_tensor, torch.asarray}


class StandIn(TorchFunctionMode):
    """Counts in `counts`: operations, to_card and from_card (copies), synchronisations.

    A copy synchronises too unless it is non_blocking, as in torch. beside: copies in another stream
    than the main one. `places` counts the lines of this package that copy or wait.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.places: Counter[str] = Counter()
        self._stream = MAIN
        self.before_copy: Callable[[Tensor], object] = lambda tensor: None  # may raise

    def __enter__(self) -> "StandIn":
        super().__enter__()
        self._new_parameter = new = torch.nn.Parameter.__new__

        def marked(cls: Any, data: Any = None, requires_grad: bool = True) -> Any:
            return _marked(new(cls, data, requires_grad), on_card(data))

        torch.nn.Parameter.__new__ = staticmethod(marked)  # no function mode sees it
        self._patch = MonkeyPatch()
        properties = SimpleNamespace(total_memory=MEMORY, name="stand-in")
        self._patch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        for name in ("synchronize", "reset_peak_memory_stats"):
            self._patch.setattr(torch.cuda, name, lambda *arguments: None)
        self._patch.setattr(torch.cuda, "set_per_process_memory_fraction", _limit_memory)
        for name in ("memory_allocated", "max_memory_allocated"):
            self._patch.setattr(torch.cuda, name, lambda device=None: 0)
        self._patch.setattr(torch, "Generator", Generator)
        self._patch.setattr(torch.cuda, "Stream", Stream)
        self._patch.setattr(torch.cuda, "current_stream", lambda device=None: self._stream)
        self._patch.setattr(torch.cuda, "stream", self._in_stream)
        self._patch.setattr(torch.Tensor, "record_stream", lambda x, stream: None)
        return self

    @contextmanager
    def _in_stream(self, stream: Stream) -> Iterator[None]:
        before, self._stream = self._stream, stream
        try:
            yield
        finally:
            self._stream = before

    def __exit__(self, *error: Any) -> None:
        self._patch.undo()
        torch.nn.Parameter.__new__ = staticmethod(self._new_parameter)
        super().__exit__(*error)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        self._name = getattr(func, "__name__", str(func))
        tensors = _tensors((*args, *kwargs.values()))
        for x in tensors:
            if getattr(x, "_arrives_in", self._stream) is not self._stream:
                raise RuntimeError(f"{self._name}: a tensor is used before it has arrived")
        if handler := self._handlers.get(func):
            return handler(self, func, *args, **kwargs)
        if "pin_memory" in kwargs:
            kwargs.pop("pin_memory")  # there is no driver to ask
        marks = [getattr(x, "_on_card", False) for x in tensors]
        card = any(marks)
        if card:
            self.counts["operations"] += 1
            if func in _READ:
                self._waits()
            if not all(marks) and func not in _ANY_DEVICE:
                for x in tensors:
                    if x.ndim and not on_card(x):
                        raise RuntimeError(
                            f"{self._name}: tensors on cuda:0 and one of {tuple(x.shape)} on cpu"
                        )
        if "device" in kwargs and kwargs["device"] is not None:
            card = _is_card(kwargs["device"])
            kwargs["device"] = "cpu" if card else kwargs["device"]
        if card and func in _FROM_HOST_VALUES:
            self._copied("to_card")
        return _marked(func(*args, **kwargs), card) if card else func(*args, **kwargs)

    def _copied(self, direction: str, *, waits: bool = True) -> None:
        self.counts[direction] += 1
        if waits:
            self._waits()
        else:
            self._note(direction)

    def _waits(self) -> None:
        self.counts["synchronisations"] += 1
        self._note("waits")

    def _note(self, what: str) -> None:
        frame = sys._getframe(1)
        while frame.f_back and f"{os.sep}star_core{os.sep}" not in frame.f_code.co_filename:
            frame = frame.f_back
        place = f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}"
        self.places[f"{place} {self._name} {what}"] += 1

    def _device(self, func: Any, x: Tensor, *rest: Any) -> Any:
        return CARD if on_card(x) else func(x, *rest)

    def _is_cuda(self, func: Any, x: Tensor, *rest: Any) -> bool:
        return on_card(x)

    def _is_cpu(self, func: Any, x: Tensor, *rest: Any) -> bool:
        return not on_card(x) and func(x, *rest)

    def _numpy(self, func: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if on_card(x):
            raise TypeError("cannot convert a tensor on cuda:0 to numpy")
        return func(x, *args, **kwargs)

    def _pinned(self, func: Any, x: Tensor, *args: Any) -> Tensor:
        return x.clone()

    def _to(
        self,
        func: Any,
        x: Tensor,
        *rest: Any,
        device: Any = None,
        dtype: torch.dtype | None = None,
        non_blocking: bool = False,
        copy: bool = False,
        **options: Any,
    ) -> Tensor:
        flags = [each for each in rest if isinstance(each, bool)]
        non_blocking, copy = [*flags, non_blocking, copy][:2] if flags else (non_blocking, copy)
        for each in rest:
            if isinstance(each, Tensor):
                device, dtype = CARD if on_card(each) else each.device, each.dtype
            elif isinstance(each, torch.dtype):
                dtype = each
            elif isinstance(each, (str, torch.device, int)) and not isinstance(each, bool):
                device = each
        if func is _T.cuda:
            device = CARD
        elif func is _T.cpu:
            device = "cpu"
        source = on_card(x)
        target = source if device is None else _is_card(device)
        place = x.device if target or device is None else device
        changed = x.to(place, dtype or x.dtype, **options)
        if source != target:
            if target:
                self.before_copy(x)
            self._copied("to_card" if target else "from_card", waits=not non_blocking)
        if changed is x and (copy or source != target):
            changed = x.clone()
        return changed if changed is x else _marked(changed, target)

    def _copy_(self, func: Any, to: Tensor, source: Any, non_blocking: bool = False) -> Tensor:
        if isinstance(source, Tensor) and on_card(to) != on_card(source):
            self._copied("to_card" if on_card(to) else "from_card", waits=not non_blocking)
        to.copy_(source)
        if self._stream is not MAIN:
            self.counts["beside"] += 1
            to._arrives_in = self._stream  # pyright: ignore[reportAttributeAccessIssue]
            self._stream.arriving.append(to)
        return to

    def _indexed(self, func: Any, x: Tensor, *rest: Any) -> Any:
        if not on_card(x):
            if any(on_card(each) for each in _tensors(rest[:1])):
                raise RuntimeError("indices on cuda:0 for a tensor on cpu")
            value = any(on_card(each) for each in _tensors(rest[1:]))
            if value:
                self._copied("from_card")
            return func(x, *rest)
        self.counts["operations"] += 1
        for each in _tensors(rest):
            if not on_card(each):
                self._copied("to_card")
            elif each.dtype == torch.bool:
                self._waits()  # the result's size depends on the mask
        return _marked(func(x, *rest), True)

    def _set_data(self, func: Any, x: Tensor, data: Tensor) -> None:
        func(x, data)
        _marked(x, on_card(data))

    _handlers = {
        _getter("device"): _device,
        _getter("is_cuda"): _is_cuda,
        _getter("is_cpu"): _is_cpu,
        _T.numpy: _numpy,
        _T.__array__: _numpy,
        _T.pin_memory: _pinned,
        _T.to: _to,
        _T.cuda: _to,
        _T.cpu: _to,
        _T.copy_: _copy_,
        _T.__getitem__: _indexed,
        _T.__setitem__: _indexed,
        torch.Tensor.data.__set__: _set_data,  # pyright: ignore
    }
