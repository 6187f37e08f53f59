"""How a run is to be done: windows, slices, tiles, and where weights wait.

`prediction` says what a plan takes and finds one that fits.
"""

from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import product
from typing import Any

import torch

from .backbones import SamplingDefaults
from .behaviour import DEFAULT, Behaviour
from .canvas import Canvas, Part
from .chunking import ChunkConfig
from .models.slicing import Slicing
from .models.unet import UNetConfig
from .shortcuts import Shortcuts
from .tiling import Tile
from .vae import VAEGeometry

# From the least curtailed to the smallest. Tiles in pixels of the result; a quarter is shared.
TILES = (2048, 1536, 1280, 1024, 768, 640, 512, 384, 256)
CHUNKS = (24, 16, 12, 8, 6, 4, 2, 1)
SMALL_SLICES = 128  # pixels of temporal layers


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is to be restored, and by what.

    frames: of the clip. size: (width, height) of the result. config, vae: of the model, SVD's VAE
    by default. text_encoder: whether the model has one, which is gone when denoising begins.
    """

    frames: int
    size: tuple[int, int]
    config: UNetConfig = field(default_factory=UNetConfig)
    vae: VAEGeometry = field(default_factory=VAEGeometry)
    text_encoder: bool = True
    dtype: torch.dtype = torch.float16
    sampling: SamplingDefaults = field(default_factory=SamplingDefaults)
    behaviour: Behaviour = DEFAULT
    shortcuts: Shortcuts = field(default_factory=Shortcuts)

    def __post_init__(self) -> None:
        if self.frames < 1 or min(self.size) < 1:
            raise ValueError(
                f"there must be at least 1 frame of 1x1 pixel, got {self.frames} of "
                f"{self.size[0]}x{self.size[1]}"
            )

    @cached_property
    def padded(self) -> tuple[int, int]:
        """Height and width in pixels of what is computed."""
        return Canvas.of(
            self.size,
            vae_factor=self.vae.factor,
            levels=self.config.downsamplings,
            behaviour=self.behaviour,
        ).padded

    @property
    def latents(self) -> tuple[int, int]:
        """Height and width in latents."""
        height, width = self.padded
        return height // self.vae.factor, width // self.vae.factor

    def latent_bytes(self, frames: int) -> int:
        """Of the latents of some frames in float32."""
        height, width = self.latents
        return 4 * self.config.in_dim * frames * height * width


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How to do a task. What is not said here is said by `Settings`.

    offload: only the part at work is on the device, and skips wait in main memory. tile: of the
    VAE, latent_tile: of the network, both in pixels of the result.
    """

    task: Task
    chunk: ChunkConfig
    slicing: Slicing = field(default_factory=Slicing)
    tile: Tile | None = None
    latent_tile: Tile | None = None

    @property
    def offload(self) -> bool:
        return self.slicing.offload

    @cached_property
    def part(self) -> Part:
        """Its windows of frames."""
        return Part.of(
            range(self.task.frames),
            chunk=self.chunk,
            decode_window=self.task.sampling.decode_window,
            behaviour=self.task.behaviour,
        )

    @property
    def windows(self) -> list[int]:
        """How many frames the network sees together, of each window."""
        return [len(window) for piece in self.part.pieces for window in piece.windows]

    @property
    def latents(self) -> int:
        """How many the network works on together, at most."""
        return max(self.windows) * max(h * w for h, w in self.network_tiles)

    @property
    def network_tiles(self) -> list[tuple[int, int]]:
        """Height and width in latents of each of the network's tiles."""
        (height, width), tile = self.task.latents, self.latent_tile
        if tile is None:
            return [(height, width)]
        step = 2**self.task.config.downsamplings
        tile = tile.in_latents(self.task.vae.factor, step=step)
        rows, columns = tile.on_grid(height, step=step, rest=2), tile.on_grid(width, step=step)
        return [(len(row), len(column)) for row, column in product(rows, columns)]

    @property
    def vae_tiles(self) -> list[tuple[int, int]]:
        """Height and width in pixels of each of the VAE's tiles."""
        if self.tile is None:
            return [self.task.padded]
        factor = self.task.vae.factor
        rows, columns = (self.tile.windows(side // factor, factor) for side in self.task.padded)
        return [(len(row) * factor, len(column) * factor) for row, column in product(rows, columns)]

    def settings(self) -> dict[str, Any]:
        """Its fields of `pipeline.Settings`."""
        names = ("chunk", "slicing", "tile", "latent_tile")
        return {name: getattr(self, name) for name in names}

    def smaller_denoising(self) -> "Plan | None":
        """The next that needs less memory to denoise, None if there is none.

        First smaller slices, which change nothing in the result, then tiles, then shorter windows
        of frames.
        """
        task, slicing = self.task, self.slicing
        if slicing.temporal_pixels > SMALL_SLICES:
            return replace(self, slicing=replace(slicing, temporal_pixels=SMALL_SLICES))
        step = task.vae.factor * 2**task.config.downsamplings
        tile = smaller_tile(task, self.latent_tile, step)
        if tile != self.latent_tile:
            return replace(self, latent_tile=tile)
        longest = max(self.windows)
        shorter = [length for length in CHUNKS if length < longest]
        if not shorter:
            return None
        overlap = min(self.chunk.overlap, shorter[0] // 4)
        return replace(self, chunk=replace(self.chunk, length=shorter[0], overlap=overlap))


def smaller_tile(task: Task, tile: Tile | None, step: int) -> Tile | None:
    """The next tile that cuts the frame, at least 4 steps wide; the same if there is none."""
    size = max(task.padded) if tile is None else tile.size
    smaller = [Tile(size=n, overlap=n // 4) for n in TILES if 4 * step <= n < size]
    return smaller[0] if smaller else tile
