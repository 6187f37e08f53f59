"""Memory of the device: where weights lie while they wait, and what a step that runs out of it
uses less of. For the command line and training; a host manages memory by itself."""

import ctypes
import logging
import platform
import re
from collections.abc import Callable
from dataclasses import replace
from types import TracebackType
from typing import TypeVar

import torch
from torch import nn

from .models.slicing import Slicing
from .windows.tiling import Tile

_LOG = logging.getLogger(__name__)
T = TypeVar("T")


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


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the memory of a device, or of the machine, is full."""
    # torch has no class of its own for a full main memory.
    text = r"out of memory|not enough memory|can't allocate memory"
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and re.search(text, str(error)) is not None
    )


def surviving(work: Callable[[], T], less: Callable[[], str | None]) -> T:
    """What `work` returns. Each time memory runs out it is done again, after `less`.

    less: makes the next attempt need less and says how; None where nothing is left to save, which
    raises the error.
    """
    while True:
        try:
            return work()
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            change = less()
            if change is None:
                raise
        # Not in the handler: only out here has the failed attempt let go of its tensors.
        _LOG.warning("out of memory: going on with %s", change)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


class Room:
    """How much a run works on at a time; less each time that memory runs out.

    vae_tile: in pixels. network_tile: in latents. slicing: the network's.
    """

    def __init__(
        self,
        *,
        vae_tile: Tile | None,
        latent_tile: Tile | None,
        slicing: Slicing,
        view: tuple[int, int],
        in_latents: Callable[[Tile], Tile],
        seat: Seat,
    ) -> None:
        """latent_tile: the network's, in pixels. view: height and width of frames, in pixels.

        in_latents: the same tile in latents; ValueError where it is too small for the network.
        seat: where network and VAE work.
        """
        self.vae_tile, self.slicing, self._seat = vae_tile, slicing, seat
        self._latent_tile, self._view, self._in_latents = latent_tile, view, in_latents
        self.network_tile = latent_tile and in_latents(latent_tile)

    def less_for_vae(self) -> str | None:
        """Sends home what is not at work, then halves tiles. Says so; None if nothing is left."""
        if change := self._offloaded():
            return change
        if smaller := self._halved(self.vae_tile):
            self.vae_tile = smaller
            return f"the VAE in tiles of {smaller.size} pixels"
        return None

    def less_for_network(self) -> str | None:
        """As `less_for_vae`; skips wait elsewhere too."""
        if change := self._offloaded():
            return change
        smaller = self._halved(self._latent_tile)
        if smaller is None:
            return None
        try:
            self.network_tile = self._in_latents(smaller)
        except ValueError:
            return None
        self._latent_tile = smaller
        return f"the network in tiles of {smaller.size} pixels"

    def _offloaded(self) -> str | None:
        if self.slicing.offload:
            return None
        self.slicing = replace(self.slicing, offload=True)
        self._seat.one_at_a_time = True
        return "what waits for its turn kept in main memory"

    def _halved(self, tile: Tile | None) -> Tile | None:
        most = max(self._view)
        size = min(tile.size if tile else most, most) // 128 * 64
        return Tile(size=size, overlap=size // 4) if size else None


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
