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


class DevicePlacement:
    """Moves modules to the device while they work, and back to where they were afterwards.

    Used as a context manager: `with DevicePlacement("cuda") as placement: placement.load(module)`.
    Leaving it moves every module back.
    """

    def __init__(self, device: torch.device | str, *, one_at_a_time: bool = True) -> None:
        """one_at_a_time: whether the other modules leave the device before one is loaded."""
        self.device, self.one_at_a_time = device, one_at_a_time
        self._homes: dict[nn.Module, torch.device] = {}

    def __enter__(self) -> "DevicePlacement":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._unload(None)

    def load(self, module: nn.Module) -> None:
        """Moves a module to the device, if it is not there already."""
        if self.one_at_a_time:
            self._unload(module)
        if module not in self._homes:
            self._homes[module] = next(module.parameters()).device
            module.to(self.device)

    def _unload(self, stays: nn.Module | None) -> None:
        for module in [other for other in self._homes if other is not stays]:
            module.to(self._homes.pop(module))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the memory of a device, or of the machine, is full."""
    # torch has no class of its own for a full main memory.
    text = r"out of memory|not enough memory|can't allocate memory"
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and re.search(text, str(error)) is not None
    )


def retry_on_oom(fn: Callable[[], T], shrink: Callable[[], str | None]) -> T:
    """Returns what `fn` returns; each time memory runs out it is called again, after `shrink`.

    shrink: makes the next attempt need less memory and says how, or returns None where nothing is
    left to save, which raises the error.
    """
    while True:
        try:
            return fn()
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            change = shrink()
            if change is None:
                raise
        # Not in the handler: only out here has the failed attempt let go of its tensors.
        _LOG.warning("out of memory: going on with %s", change)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


class MemoryLimits:
    """How much a run works on at a time, which shrinks each time that memory runs out.

    vae_tile: tiles of the VAE, in pixels. network_tile: tiles of the network, in latents.
    slicing: how much the network's layers work on at a time. None stands for whole frames.
    """

    def __init__(
        self,
        *,
        vae_tile: Tile | None,
        latent_tile: Tile | None,
        slicing: Slicing,
        view: tuple[int, int],
        in_latents: Callable[[Tile], Tile],
        placement: DevicePlacement,
    ) -> None:
        """latent_tile: tiles of the network, in pixels. view: height and width of a computed frame,
        in pixels. in_latents: converts a tile from pixels to latents; ValueError where it is too
        small for the network. placement: where network and VAE work.
        """
        self.vae_tile, self.slicing, self._placement = vae_tile, slicing, placement
        self._latent_tile, self._view, self._in_latents = latent_tile, view, in_latents
        self.network_tile = latent_tile and in_latents(latent_tile)

    def shrink_vae(self) -> str | None:
        """Offloads idle weights, then halves the tiles of the VAE.

        Returns what was done, for the log, or None if nothing is left to do.
        """
        if change := self._offload():
            return change
        if smaller := self._halved(self.vae_tile):
            self.vae_tile = smaller
            return f"the VAE in tiles of {smaller.size} pixels"
        return None

    def shrink_network(self) -> str | None:
        """Offloads idle weights and skip connections, then halves the tiles of the network.

        Returns what was done, for the log, or None if nothing is left to do.
        """
        if change := self._offload():
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

    def _offload(self) -> str | None:
        if self.slicing.offload:
            return None
        self.slicing = replace(self.slicing, offload=True)
        self._placement.one_at_a_time = True
        return "idle weights in main memory"

    def _halved(self, tile: Tile | None) -> Tile | None:
        most = max(self._view)
        size = min(tile.size if tile else most, most) // 128 * 64
        return Tile(size=size, overlap=size // 4) if size else None


def keep_freed_memory() -> None:
    """Makes this process reuse freed main memory instead of returning it to the system.

    glibc returns every block above 32 MB, and the system clears it anew for the next layer: on a
    virtual machine that took as long as the layers themselves. For a process of one purpose; other
    C libraries are left as they are.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD, M_MMAP_MAX of malloc.h
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)
