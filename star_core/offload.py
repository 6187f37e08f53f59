"""Where weights are while they work, and where they wait (command line and training; a host has
its own memory management)."""

import ctypes
import platform
from types import TracebackType

import torch
from torch import nn


class Seat:
    """A device that modules work on; they come from where they wait, and go home in the end.

    `with Seat(device) as seat: seat.take(module)`. one_at_a_time: the device has room for one.
    """

    def __init__(self, device: torch.device | str, *, one_at_a_time: bool = True) -> None:
        self.device, self.one_at_a_time = device, one_at_a_time
        self._homes: dict[nn.Module, torch.device] = {}

    def __enter__(self) -> "Seat":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._send_home(None)

    def take(self, module: nn.Module) -> None:
        """Bring a module to the device; where there is room for one, the others away first."""
        if self.one_at_a_time:
            self._send_home(module)
        if module not in self._homes:
            self._homes[module] = next(module.parameters()).device
            module.to(self.device)

    def _send_home(self, stays: nn.Module | None) -> None:
        for module in [other for other in self._homes if other is not stays]:
            module.to(self._homes.pop(module))


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
