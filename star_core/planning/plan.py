"""How a run can be computed: windows of frames, slices, tiles, and where idle weights are stored.

`predict` says what a plan takes and finds one that fits.
"""

from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import product
from typing import Any

import torch

from ..backbones import Geometry, NetworkConfig
from ..diffusion.shortcuts import Shortcuts
from ..memory import next_smaller
from ..models.slicing import Slicing
from ..models.unet import UNetConfig
from ..parity import DEFAULT, Behaviour
from ..sampling_defaults import SamplingDefaults
from ..vae.svd import SVDGeometry
from ..windows.canvas import Canvas, FrameSpan, WindowGroup
from ..windows.chunking import ChunkConfig, filled_to, overlapping_windows, usual_overlap
from ..windows.tiling import Tile

CHUNKS = (40, 32, 24, 16, 12, 8, 6, 4, 2, 1)  # frames, or as many more as fill whole latents


@dataclass(frozen=True, kw_only=True)
class Task:
    """A clip to be restored, and the model that restores it.

    frames: of the clip. size: (width, height) of the result. config, vae: sizes of the network and
    of the VAE. text_encoder: whether the model has one; it is unloaded before encoding begins.
    one_clip: encode and decode all frames together where latents hold several, with windows of
    latents, as in a host; False encodes and decodes each window by itself. dtype, vae_dtype: types
    of the network and of the VAE, None for that of the network.
    ValueError if there is no frame or no pixel.
    """

    frames: int
    size: tuple[int, int]
    config: NetworkConfig = field(default_factory=UNetConfig)
    vae: Geometry = field(default_factory=SVDGeometry)
    text_encoder: bool = True
    one_clip: bool = False
    dtype: torch.dtype = torch.float16
    vae_dtype: torch.dtype | None = None
    sampling: SamplingDefaults = field(default_factory=SamplingDefaults)
    behaviour: Behaviour = DEFAULT
    shortcuts: Shortcuts = field(default_factory=Shortcuts)

    def __post_init__(self) -> None:
        if min(self.frames, *self.size) < 1:
            size = "{}x{}".format(*self.size)
            raise ValueError(f"there must be a frame of 1x1 pixel, got {self.frames} of {size}")

    @property
    def vae_type(self) -> torch.dtype:
        """The type of the VAE."""
        return self.vae_dtype or self.dtype

    @classmethod
    def of_latents(cls, sides: tuple[int, int, int], vae: Geometry, **fields: Any) -> "Task":
        """Returns the task of sampling and decoding an encoded clip, as in a host.

        sides: frames, height and width of the latents. fields: other fields of the task.
        """
        count, height, width = sides
        size, frames = (
            (width * vae.factor, height * vae.factor),
            vae.latent_frames * (count - 1) + 1,
        )
        return cls(frames=frames, size=size, vae=vae, text_encoder=False, one_clip=True, **fields)

    @cached_property
    def padded(self) -> tuple[int, int]:
        """Height and width of a computed frame, in pixels."""
        levels, factor = self.config.downsamplings, self.vae.factor
        canvas = Canvas.of(self.size, vae_factor=factor, levels=levels, behaviour=self.behaviour)
        return canvas.padded

    @property
    def latents(self) -> tuple[int, int]:
        """Height and width of a computed frame, in latents."""
        height, width = self.padded
        return height // self.vae.factor, width // self.vae.factor

    def usual_chunk(self, length: int | None = None, **fields: Any) -> ChunkConfig:
        """Returns windows of frames with the default overlap.

        length: in frames, None for the model's own. fields: other fields of the config.
        """
        length, each = length or self.sampling.chunk_frames, self.vae.latent_frames
        overlap = usual_overlap(length, self.behaviour.overlap, each)
        return ChunkConfig(length=length, overlap=overlap, latent_frames=each, **fields)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a task is computed.

    chunk: windows of frames. slicing: slices of the network's layers, and offloading. tile: of the
    VAE, latent_tile: of the network, both in pixels of the result; None for whole frames.
    """

    task: Task
    chunk: ChunkConfig
    slicing: Slicing = field(default_factory=Slicing)
    tile: Tile | None = None
    latent_tile: Tile | None = None

    @property
    def offload(self) -> bool:
        """True if idle weights and skip connections are stored in main memory."""
        return self.slicing.offload

    @cached_property
    def span(self) -> FrameSpan:
        """The clip's frames and their windows."""
        task, whole = self.task, range(self.task.frames)
        if task.one_clip and (each := task.vae.latent_frames) > 1:
            latents = filled_to(task.frames, each) // each + 1
            windows = overlapping_windows(latents, *self.chunk.in_latents(each))
            groups = [WindowGroup(frames=whole, windows=windows)]
            return FrameSpan(requested=whole, needed=whole, groups=groups, decode_windows=[whole])
        window, behaviour = task.sampling.decode_window, task.behaviour
        return FrameSpan.of(whole, chunk=self.chunk, decode_window=window, behaviour=behaviour)

    @property
    def windows(self) -> list[int]:
        """Lengths of the network's windows, in latent frames."""
        return [len(window) for group in self.span.groups for window in group.windows]

    @property
    def window_frames(self) -> list[int]:
        """Lengths of the network's windows, in frames."""
        return [(count - 1) * self.task.vae.latent_frames + 1 for count in self.windows]

    @property
    def network_tile(self) -> Tile | None:
        """`latent_tile` in latents."""
        step = 2**self.task.config.downsamplings
        return self.latent_tile and self.latent_tile.in_latents(self.task.vae.factor, step=step)

    @property
    def network_tiles(self) -> list[tuple[int, int]]:
        """Height and width of each of the network's tiles, in latents."""
        rows, columns = self.task.config.tiles(self.task.latents, self.network_tile)
        return [(len(row), len(column)) for row, column in product(rows, columns)]

    @property
    def vae_tiles(self) -> list[tuple[int, int]]:
        """Height and width of each of the VAE's tiles, in pixels."""
        factor = self.task.vae.factor
        rows, columns = self.task.vae.tiles(self.task.padded, self.tile)
        return [(len(row) * factor, len(column) * factor) for row, column in product(rows, columns)]

    def settings(self) -> dict[str, Any]:
        """Returns the fields of `Settings` that the plan decides; `slicing` is for `Execution`."""
        return {"chunk": self.chunk, "tile": self.tile, "latent_tile": self.latent_tile}

    def smaller_denoising(self, *, offload: bool = True) -> "Plan | None":
        """Returns the next plan that needs less memory to denoise, or None if there is none.

        Windows of frames become shorter where `next_smaller` has nothing left. offload: whether
        offloading is an option.
        """
        factor, each = self.task.vae.factor, self.task.vae.latent_frames
        largest = factor * max(map(max, self.network_tiles))
        step = factor * 2**self.task.config.downsamplings
        options = {"largest": largest, "step": step, "offload": offload}
        if smaller := next_smaller(self.slicing, self.latent_tile, **options):
            return replace(self, slicing=smaller.slicing, latent_tile=smaller.tile)
        longest = min(self.chunk.length, max(self.window_frames))
        for length in (filled_to(frames, each) for frames in CHUNKS):
            if length < longest:
                near = ChunkConfig.near(length, min(self.chunk.overlap, length // 4), each)
                return replace(self, chunk=replace(self.chunk, length=length, overlap=near.overlap))
        return None

    def smaller_decoding(self, *, offload: bool = True) -> "Plan | None":
        """Returns the next plan that needs less memory to encode and decode, or None.

        offload: whether offloading is an option.
        """
        options = {"largest": max(map(max, self.vae_tiles)), "step": self.task.vae.factor}
        smaller = next_smaller(self.slicing, self.tile, offload=offload, slices=False, **options)
        return smaller and replace(self, slicing=smaller.slicing, tile=smaller.tile)
