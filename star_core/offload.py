"""Where weights are while they work, and where they wait (command line and training; a host has
its own memory management)."""

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def on_device(module: nn.Module, device: torch.device | str) -> Iterator[None]:
    """Keeps a module on `device` for the block and takes it back to where it was afterwards."""
    home = next(module.parameters()).device
    module.to(device)
    try:
        yield
    finally:
        module.to(home)


def keep_freed_memory() -> None:
    """Makes this process use freed main memory again instead of handing it back to the system.

    glibc returns every block above 32 MB, and the system clears it anew for the next layer: on a
    virtual machine that took as long as the layers themselves. For a process of one purpose; other
    C libraries are left as they are.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD, M_MMAP_MAX of malloc.h
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)
