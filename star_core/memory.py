"""Memory of the device: where idle weights are stored, and how a run continues with less memory.

The order in which memory is saved is the same for planning (`next_smaller`). A host such as ComfyUI
places weights by itself.
"""

import ctypes
import logging
import platform
import re
from collections.abc import Callable
from dataclasses import replace
from types import TracebackType
from typing import NamedTuple, TypeVar

import torch
from torch import nn

from .devices import release_cached_memory
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
        release_cached_memory()


# Sides of tiles in pixels of the result, from the largest to the smallest. A quarter overlaps.
TILES = (2048, 1536, 1280, 1024, 768, 640, 512, 384, 256)
SMALL_SLICES = 128  # `Slicing.temporal_pixels` that saves memory


class SmallerWork(NamedTuple):
    """Slicing and tile that need less memory. change: what is new about them, for the log."""

    slicing: Slicing
    tile: Tile | None
    change: str


def next_smaller(
    slicing: Slicing,
    tile: Tile | None,
    *,
    largest: int,
    step: int,
    offload: bool = True,
    slices: bool = True,
) -> SmallerWork | None:
    """Returns the next slicing and tile that need less memory, or None if nothing is left to save.

    First comes what leaves the result as it is: offloading, then smaller slices of the network's
    temporal layers. Then come smaller tiles.

    tile: current tiles in pixels, None for whole frames of up to `largest` pixels a side. step: the
    grid of the network or the VAE in pixels; tiles have at least 4 steps. offload, slices: whether
    offloading and smaller slices are options.
    """
    if offload and not slicing.offload:
        return SmallerWork(replace(slicing, offload=True), tile, "offloading")
    if slices and slicing.temporal_pixels > SMALL_SLICES:
        return SmallerWork(replace(slicing, temporal_pixels=SMALL_SLICES), tile, "smaller slices")
    for size in TILES:
        if 4 * step <= size < (tile.size if tile else largest):
            return SmallerWork(
                slicing, Tile(size=size, overlap=size // 4), f"tiles of {size} pixels"
            )
    return None


class MemoryLimits:
    """Limits how much a run works on at a time, and lowers the limits when memory runs out.

    slicing: of the network's layers. vae_tile: tiles of the VAE, in pixels. network_tile: tiles of
    the network, in latents. None stands for whole frames.
    """

    def __init__(
        self,
        *,
        slicing: Slicing,
        vae_tile: Tile | None,
        latent_tile: Tile | None,
        view: tuple[int, int],
        vae_factor: int,
        downsamplings: int,
        placement: DevicePlacement,
    ) -> None:
        """latent_tile: tiles of the network, in pixels; ValueError if they are too small for it.
        view: height and width of a computed frame, in pixels. vae_factor: pixels per latent.
        downsamplings: of the network. placement: where network and VAE work.
        """
        self.slicing, self.vae_tile, self._latent_tile = slicing, vae_tile, latent_tile
        self._largest, self._factor, self._step = max(view), vae_factor, 2**downsamplings
        self._placement = placement
        self.network_tile = self._in_latents(latent_tile)

    def shrink_vae(self) -> str | None:
        """Offloads idle weights, then makes the tiles of the VAE smaller.

        Returns what was done, for the log, or None if nothing is left to do.
        """
        smaller = next_smaller(
            self.slicing, self.vae_tile, largest=self._largest, step=self._factor, slices=False
        )
        if smaller is None:
            return None
        self.vae_tile = smaller.tile
        return self._shrink(smaller, "VAE")

    def shrink_network(self) -> str | None:
        """Offloads idle weights and skip connections, makes slices smaller, then tiles.

        Returns what was done, for the log, or None if nothing is left to do.
        """
        step = self._factor * self._step
        smaller = next_smaller(self.slicing, self._latent_tile, largest=self._largest, step=step)
        if smaller is None:
            return None
        self._latent_tile, self.network_tile = smaller.tile, self._in_latents(smaller.tile)
        return self._shrink(smaller, "network")

    def _shrink(self, smaller: SmallerWork, part: str) -> str:
        self.slicing = smaller.slicing
        if self.slicing.offload:
            self._placement.one_at_a_time = True
        return f"{smaller.change} for the {part}"

    def _in_latents(self, tile: Tile | None) -> Tile | None:
        return tile and tile.in_latents(self._factor, step=self._step)


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
