"""Devices: which there are, what each supports, and copies that nothing waits for.

What differs between devices is asked of them, so that code elsewhere names none.
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn


def best_device() -> torch.device:
    """Returns the device to compute on: CUDA or ROCm, else MPS, else XPU, else the CPU."""
    if torch.cuda.is_available():  # ROCm as well
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    if torch.xpu.is_available():
        return torch.device("xpu")
    return torch.device("cpu")


@cache
def supports(device: torch.device | str, dtype: torch.dtype) -> bool:
    """Returns whether a device computes in a type: MPS has no float64, old GPUs no bfloat16."""
    try:
        one = torch.ones(2, 2, device=device, dtype=dtype)
        _ = one @ one
        if dtype == torch.bfloat16 and torch.device(device).type == "cuda":
            # GPUs before Ampere emulate it, far slower than float32.
            return torch.cuda.is_bf16_supported(including_emulation=False)
    except (RuntimeError, TypeError, AssertionError):  # the last if torch lacks such devices
        return False
    return True


def check_compiler(device: torch.device | str) -> None:
    """Raises ValueError unless torch can compile code for a device."""
    try:
        torch.compile(torch.sin)(torch.ones(2, device=device))
    except Exception as error:  # of many kinds: no compiler, no Triton, not on this system
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"torch cannot compile here, leave out --compile: {reason}") from None
    # Blocks of several widths share their code.
    torch._dynamo.config.cache_size_limit = 64  # pyright: ignore


def put_channels_last(module: nn.Module) -> None:
    """Stores the kernels of 2-D convolutions with their channels last, in place.

    Convolutions then compute in that memory layout, which is the faster one on some GPUs.
    """
    for parameter in module.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)


def device_name(device: torch.device) -> str:
    """Returns the name of a GPU, or CPU."""
    if device.type in ("cuda", "xpu"):
        return getattr(torch, device.type).get_device_name(device)
    return device.type.upper()


def total_memory(device: torch.device) -> int | None:
    """Returns the bytes of memory that belong to a device, None if it uses main memory."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type == "xpu":
        return torch.xpu.get_device_properties(device).total_memory
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    return None


def usable_memory(device: torch.device) -> int | None:
    """Returns nine tenths of a device's memory in bytes, None if it uses main memory.

    The rest is for what torch does not count. What is free now does not matter, so that the same
    command finds the same plan again.
    """
    whole = total_memory(device)
    return whole and int(0.9 * whole)


def synchronize(device: torch.device) -> None:
    """Waits until a device has finished all that it was given."""
    if device.type == "mps":
        torch.mps.synchronize()
    elif device.type != "cpu":
        getattr(torch, device.type).synchronize(device)


def release_cached_memory() -> None:
    """Returns memory that torch has freed but not given back to the devices."""
    for backend, available in (
        (torch.cuda, torch.cuda.is_available),
        (torch.mps, torch.backends.mps.is_available),
        (torch.xpu, torch.xpu.is_available),
    ):
        if available():
            backend.empty_cache()


def send(x: Tensor, device: torch.device | str, dtype: torch.dtype | None = None) -> Tensor:
    """Returns x on a device, and in another type unless dtype is None.

    CUDA does not make the host wait for a copy from main memory. x may be freed at once. It may be
    changed too, unless it is pinned, because other memory is read before this function returns.
    """
    device = torch.device(device)
    no_wait = device.type == "cuda" and x.device.type == "cpu"
    return x.to(device=device, dtype=dtype or x.dtype, non_blocking=no_wait)


def fetch(x: Tensor, device: torch.device | str) -> Callable[[], Tensor]:
    """Returns a function that gives x on a device, where copying may begin already.

    On CUDA, x is copied from main memory while the device goes on with what it has to do. Only the
    device waits for the copy, when the function is called. Others copy then.
    """
    device = torch.device(device)
    if device.type != "cuda" or x.device.type != "cpu":
        return lambda: send(x, device)
    main, side = torch.cuda.current_stream(device), _copying_stream(device)
    copy = torch.empty(x.shape, dtype=x.dtype, device=device)
    side.wait_stream(main)  # earlier work may still use that memory
    with torch.cuda.stream(side):
        copy.copy_(x, non_blocking=True)
    copy.record_stream(side)  # it may be freed before it is full

    def arrived() -> Tensor:
        main.wait_stream(side)
        return copy

    return arrived


@cache
def _copying_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def stash(x: Tensor) -> Tensor:
    """Returns a copy of x in main memory, or x itself if it is there.

    CUDA does not make the host wait for it, so its values may be read only by operations of that
    device, or after another copy from there has finished.
    """
    if x.device.type == "cpu":
        return x
    no_wait = x.device.type == "cuda"  # from and to pinned memory
    copy = torch.empty(x.shape, dtype=x.dtype, device="cpu", pin_memory=no_wait)
    return copy.copy_(x, non_blocking=no_wait)
