"""Memory of the device: where idle weights are stored, and how a run continues with less memory.

The order in which memory is saved is the same for planning (`next_smaller`). A host such as ComfyUI
places weights by itself.
"""

import logging
import re
from collections.abc import Callable
from dataclasses import replace
from types import TracebackType
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from .devices import release_cached_memory
from .models.slicing import Slicing
from .windows.tiling import Tile

_LOG = logging.getLogger(__name__)
_FULL = re.compile(
    "out of memory|not enough memory|can't allocate memory|"
    # cuDNN, cuBLAS, hipBLAS; MIOpen
    "_STATUS_ALLOC_FAILED|StatusAllocFailed|"
    # cuDNN without memory for the workspace of any algorithm
    "unable to find an engine to execute|unable to find a valid cuDNN algorithm",
    re.IGNORECASE,
)
T = TypeVar("T")


class DevicePlacement:
    """Copies the weights of modules to the device while they work; knows how much fits beside them.

    The tensors of before stay where they are and are put back afterwards, so that nothing is copied
    back. Used as a context manager, `with DevicePlacement("cuda") as placement:
    placement.load(module)`, which puts all weights back in the end.
    """

    def __init__(self, device: torch.device | str, *, one_at_a_time: bool = True) -> None:
        """one_at_a_time: whether the other modules leave the device before one is loaded."""
        self.device, self.one_at_a_time = device, one_at_a_time
        self._homes: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {}  # weights, data of before
        self._limits: dict[object, MemoryLimits] = {}

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
        """Moves a module to the device, if it is not there already.

        A module that fails to move stays whole where it was.
        """
        if self.one_at_a_time:
            self._unload(module)
        if module not in self._homes:
            self._homes[module] = []
            try:
                self._move(module, self._homes[module])
            except BaseException:
                self.unload(module)
                raise

    # Weights that are made in inference mode could never be used outside of it.
    @torch.inference_mode(False)
    @torch.no_grad()
    def _move(self, module: nn.Module, homes: list[tuple[Tensor, Tensor]]) -> None:
        for weight in (*module.parameters(), *module.buffers()):  # each once, if it is shared
            data = weight.data
            weight.data = data.to(self.device)
            homes.append((weight, data))

    @torch.inference_mode(False)
    def unload(self, module: nn.Module) -> None:
        """Puts the weights of a module back, if it is on the device."""
        for weight, data in self._homes.pop(module, ()):
            weight.data = data

    def widen(self, module: nn.Module) -> bool:
        """Changes the weights of a module from float16 to float32; returns whether it had any."""
        self.unload(module)
        narrow = any(weight.dtype == torch.float16 for weight in module.parameters())
        with torch.inference_mode(False):
            module.float()
        return narrow

    def limits(
        self,
        *,
        slicing: Slicing,
        vae_tile: Tile | None,
        latent_tile: Tile | None,
        vae_factor: int,
        downsamplings: int,
    ) -> "MemoryLimits":
        """Returns the limits of all work that asks for these; see `MemoryLimits`.

        They are lower than asked for if memory ran out before, so that no shot or picture of a run
        has to find out again what fits.
        """
        key = slicing, vae_tile, latent_tile
        if key not in self._limits:
            self._limits[key] = MemoryLimits(
                slicing=slicing,
                vae_tile=vae_tile,
                latent_tile=latent_tile,
                vae_factor=vae_factor,
                downsamplings=downsamplings,
                placement=self,
            )
        return self._limits[key]

    def _unload(self, stays: nn.Module | None) -> None:
        for module in [other for other in self._homes if other is not stays]:
            self.unload(module)


def is_out_of_memory(error: BaseException) -> bool:
    """Tests whether an error reports that the memory of a device, or of the machine, is full."""
    if isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)):  # of any device
        return True
    # torch has no class of its own for a full main memory, nor for libraries that could not get
    # memory of a GPU: AcceleratorError and RuntimeError say it in words only.
    return isinstance(error, RuntimeError) and _FULL.search(str(error)) is not None


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
# Slices from the largest to the usual. A GPU is busier with few large operations; on a CPU the
# usual ones are as fast as whole layers. Spatial slices take less memory than temporal ones of the
# same size, so they are larger.
SLICES = (
    *(Slicing(spatial_pixels=32 * 2**n, temporal_pixels=2**n) for n in range(15, 9, -1)),
    Slicing(),
)


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

    First comes what leaves the result as it is: the usual slices of the network's layers where
    they are larger, offloading, smaller slices of the temporal layers. Then come smaller tiles.

    tile: current tiles in pixels, None for whole frames of up to `largest` pixels a side. step: the
    grid of the network or the VAE in pixels; tiles have at least 4 steps. offload, slices: whether
    offloading and smaller slices are options.
    """
    smaller = (s for s in SLICES if slices and s.temporal_pixels < slicing.temporal_pixels)
    if usual := next(smaller, None):
        usual = replace(usual, offload=slicing.offload)
        return SmallerWork(usual, tile, "smaller slices")
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

    All clips of a run share them, see `DevicePlacement.limits`.

    slicing: of the network's layers. vae_tile: tiles of the VAE, in pixels. network_tile: tiles of
    the network, in latents. None stands for whole frames.
    """

    def __init__(
        self,
        *,
        slicing: Slicing,
        vae_tile: Tile | None,
        latent_tile: Tile | None,
        vae_factor: int,
        downsamplings: int,
        placement: DevicePlacement,
    ) -> None:
        """latent_tile: tiles of the network, in pixels; ValueError if they are too small for it.
        vae_factor: pixels per latent. downsamplings: of the network. placement: where network and
        VAE work.
        """
        self.slicing, self.vae_tile, self._latent_tile = slicing, vae_tile, latent_tile
        self._factor, self._step = vae_factor, 2**downsamplings
        self._placement = placement
        self.network_tile = self._in_latents(latent_tile)

    def shrink_vae(self, largest: int) -> str | None:
        """Offloads idle weights, then makes the tiles of the VAE smaller.

        largest: side of the computed frame in pixels. Returns what was done, for the log, or None
        if nothing is left to do.
        """
        tile = _tile_within(self.vae_tile, largest)
        smaller = next_smaller(self.slicing, tile, largest=largest, step=self._factor, slices=False)
        if smaller is None:
            return None
        self.vae_tile = smaller.tile
        return self._shrink(smaller, "VAE")

    def shrink_network(self, largest: int) -> str | None:
        """Makes large slices smaller, offloads, makes slices smaller still, then tiles.

        largest: side of the computed frame in pixels. Returns what was done, for the log, or None
        if nothing is left to do.
        """
        step, tile = self._factor * self._step, _tile_within(self._latent_tile, largest)
        smaller = next_smaller(self.slicing, tile, largest=largest, step=step)
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


def _tile_within(tile: Tile | None, largest: int) -> Tile | None:
    """Returns a tile, None if a frame of up to `largest` pixels a side is whole with it."""
    return tile if tile and tile.size < largest else None
