"""Where weights are while they work, and where they wait (command line and training; a host has
its own memory management)."""

import ctypes
import platform
from types import TracebackType

import torch
from torch import nn


class Seat:
    """A device with room for one module at a time; the others wait where they came from.

    `with Seat(device) as seat: seat.take(module)`; at the end of the block the last one goes home.
    """

    def __init__(self, device: torch.device | str) -> None:
        self.device = device
        self._module: nn.Module | None = None
        self._home: torch.device | None = None

    def __enter__(self) -> "Seat":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.leave()

    def take(self, module: nn.Module) -> None:
        """Bring a module to the device, the one that is there away first."""
        if module is not self._module:
            self.leave()
            self._module, self._home = module, next(module.parameters()).device
            module.to(self.device)

    def leave(self) -> None:
        """Take the module that is on the device back to where it was."""
        if self._module is not None:
            self._module.to(self._home)
            self._module = None


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
