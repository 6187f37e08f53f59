"""How a run is to be done: windows, slices, tiles, and where weights wait.

`prediction` says what a plan takes and finds one that fits.
"""

from collections import Counter
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import product
from typing import Any

import torch

from ..backbones import Geometry, NetworkConfig
from ..diffusion.shortcuts import Shortcuts
from ..models.slicing import Slicing
from ..models.unet import UNetConfig
from ..parity import DEFAULT, Behaviour
from ..sampling_defaults import SamplingDefaults
from ..vae.svd import SVDGeometry
from ..windows.canvas import Canvas, FrameSpan, WindowGroup
from ..windows.chunking import ChunkConfig, filled_to, overlapping_windows, usual_overlap
from ..windows.tiling import Tile

# From the least curtailed to the smallest. Tiles in pixels of the result; a quarter is shared.
TILES = (2048, 1536, 1280, 1024, 768, 640, 512, 384, 256)
CHUNKS = (40, 32, 24, 16, 12, 8, 6, 4, 2, 1)  # frames, or as many more as fill whole latents
SMALL_SLICES = 128  # pixels of temporal layers


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is to be restored, and by what.

    frames: of the clip. size: (width, height) of the result. config, vae: of the model, SVD's VAE
    by default. text_encoder: whether the model has one, which is gone when denoising begins.
    one_clip: all frames are encoded and decoded together where latents hold several, and windows
    are those of latents, as in a host; otherwise each window is by itself.
    """

    frames: int
    size: tuple[int, int]
    config: NetworkConfig = field(default_factory=UNetConfig)
    vae: Geometry = field(default_factory=SVDGeometry)
    text_encoder: bool = True
    one_clip: bool = False
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

    @classmethod
    def of_latents(cls, sides: tuple[int, int, int], vae: Geometry, **more: Any) -> "Task":
        """Sampling and decoding a clip that is encoded already, as in a host.

        sides: frames, height and width of its latents. more: other fields.
        """
        count, height, width = sides
        return cls(
            frames=(count - 1) * vae.latent_frames + 1,
            size=(width * vae.factor, height * vae.factor),
            vae=vae,
            text_encoder=False,
            one_clip=True,
            **more,
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

    def latent_bytes(self, count: int) -> int:
        """Of latents of whole frames in float32."""
        height, width = self.latents
        return 4 * self.config.in_dim * count * height * width

    def usual_chunk(self, length: int | None = None, **more: Any) -> ChunkConfig:
        """Windows of so many frames, None for the model's own, where nobody says more."""
        length, each = length or self.sampling.chunk_frames, self.vae.latent_frames
        overlap = usual_overlap(length, self.behaviour.overlap, each)
        return ChunkConfig(length=length, overlap=overlap, latent_frames=each, **more)


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
    def span(self) -> FrameSpan:
        """Its windows of frames."""
        frames = range(self.task.frames)
        if self.task.one_clip and (each := self.task.vae.latent_frames) > 1:
            latents = -(-(len(frames) - 1) // each) + 1
            windows = overlapping_windows(latents, *self.chunk.in_latents(each))
            group = WindowGroup(frames=frames, windows=windows)
            return FrameSpan(wanted=frames, needed=frames, groups=[group], decode_windows=[frames])
        return FrameSpan.of(
            frames,
            chunk=self.chunk,
            decode_window=self.task.sampling.decode_window,
            behaviour=self.task.behaviour,
        )

    @property
    def windows(self) -> list[int]:
        """How many latents follow each other in each window that the network sees."""
        return [len(window) for group in self.span.groups for window in group.windows]

    @property
    def window_frames(self) -> list[int]:
        """The frames that these stand for."""
        return [(count - 1) * self.task.vae.latent_frames + 1 for count in self.windows]

    @cached_property
    def encoded(self) -> Counter[int]:
        """How many frames are encoded together, and how often."""
        return Counter(self.task.vae.encoded(self.span, hold=self.chunk.hold))

    @property
    def latents(self) -> int:
        """How many the network works on together, at most."""
        return max(self.windows) * max(h * w for h, w in self.network_tiles)

    @property
    def network_tile(self) -> Tile | None:
        """`latent_tile` in latents."""
        step = 2**self.task.config.downsamplings
        return self.latent_tile and self.latent_tile.in_latents(self.task.vae.factor, step=step)

    @property
    def network_tiles(self) -> list[tuple[int, int]]:
        """Height and width in latents of each of the network's tiles."""
        rows, columns = self.task.config.tiles(self.task.latents, self.network_tile)
        return [(len(row), len(column)) for row, column in product(rows, columns)]

    @property
    def vae_tiles(self) -> list[tuple[int, int]]:
        """Height and width in pixels of each of the VAE's tiles."""
        factor = self.task.vae.factor
        rows, columns = self.task.vae.tiles(self.task.padded, self.tile)
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
        factor = task.vae.factor
        largest = factor * max(map(max, self.network_tiles))
        tile = smaller_tile(self.latent_tile, largest, factor * 2**task.config.downsamplings)
        if tile != self.latent_tile:
            return replace(self, latent_tile=tile)
        longest, each = min(self.chunk.length, max(self.window_frames)), task.vae.latent_frames
        shorter = [n for n in (filled_to(n, each) for n in CHUNKS) if n < longest]
        if not shorter:
            return None
        length = shorter[0]
        near = ChunkConfig.near(length, min(self.chunk.overlap, length // 4), each)
        return replace(self, chunk=replace(self.chunk, length=length, overlap=near.overlap))

    def smaller_decoding(self) -> "Plan | None":
        """The next that needs less memory to encode and decode, None if there is none."""
        tile = smaller_tile(self.tile, max(map(max, self.vae_tiles)), self.task.vae.factor)
        return None if tile == self.tile else replace(self, tile=tile)


def smaller_tile(tile: Tile | None, largest: int, step: int) -> Tile | None:
    """The next tile, at least 4 steps wide; the same if there is none.

    largest: side of the largest part that is worked on where there is no tile, in pixels.
    """
    size = largest if tile is None else tile.size
    smaller = [Tile(size=n, overlap=n // 4) for n in TILES if 4 * step <= n < size]
    return smaller[0] if smaller else tile
