"""VAEs that encode frames one by one and decode them a few at a time, in tiles if need be."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, ClassVar

import torch
from einops import rearrange
from torch import Tensor

from ..windows.canvas import FrameSpan
from ..windows.chunking import adjacent_or_overlapping, decode_in_windows
from ..windows.tiling import Tile, tiled


class FrameGeometry(ABC):
    """The sizes of such a VAE. latent_frames: frames of the video that one of latents holds."""

    latent_frames: ClassVar = 1

    latent_channels: int

    @property
    @abstractmethod
    def factor(self) -> int:
        """How many times the height and the width of latents fit into those of the frame."""

    @property
    @abstractmethod
    def finest_channels(self) -> int:
        """How many channels the layers hold for each pixel of the frame."""

    @abstractmethod
    def build(self) -> VideoVAE:
        """Returns a VAE with random weights."""

    def tiles(self, sides: tuple[int, int], tile: Tile | None) -> tuple[list[range], list[range]]:
        """Rows and columns, in latents, of frames (height, width) that are worked on together."""
        height, width = (side // self.factor for side in sides)
        if tile is None:
            return [range(height)], [range(width)]
        return tile.windows(height, self.factor), tile.windows(width, self.factor)

    def encoded(self, span: FrameSpan, *, hold: bool) -> list[int]:
        """How many frames each call of the encoder takes."""
        return [1] * len(span.needed)


class VideoVAE:
    """Video in [-1, 1] to latents and back, both (b c f h w), float32 on the model's device.

    model: the torch module, whose methods are those of diffusers' AutoencoderKLTemporalDecoder; its
    dtype is the one computed in. Gradients flow unless the caller switches them off.
    """

    latent_frames = FrameGeometry.latent_frames

    def __init__(self, model: Any, geometry: FrameGeometry) -> None:
        self.model, self.geometry = model, geometry
        self.factor: int = geometry.factor
        self.latent_channels: int = geometry.latent_channels
        self.scaling_factor: float = model.config["scaling_factor"]

    def encode_frame(
        self, frame: Tensor, *, noise: Tensor | None = None, tile: Tile | None = None
    ) -> Tensor:
        """Latents (b c h/factor w/factor) of one frame (b 3 h w).

        noise: normal noise of the latents' shape for a sample of the posterior; None for its
        mean. ValueError unless the factor divides height and width.
        """
        height, width = frame.shape[-2:]
        if height % self.factor or width % self.factor:
            raise ValueError(
                f"the VAE takes frames whose width and height are multiples of {self.factor}, got "
                f"{width}x{height}: pad them first (geometry.minimal_padding)"
            )
        moments = tiled(self._moments, frame, tile, unit_in=self.factor, unit_out=1)
        latents, log_variance = moments.chunk(2, dim=1)
        if noise is not None:
            std = (0.5 * log_variance.clamp(-30, 20)).exp()
            latents = latents + std * noise.to(std)
        return latents * self.scaling_factor

    def encode(
        self,
        video: Tensor,
        *,
        noise: Callable[[int], Tensor] | None = None,
        tile: Tile | None = None,
    ) -> Tensor:
        """Latents of a video (b 3 f h w), frame by frame; noise: frame index -> (b c h w)."""
        latents = [
            self.encode_frame(frame, noise=noise(i) if noise else None, tile=tile)
            for i, frame in enumerate(video.unbind(2))
        ]
        return torch.stack(latents, dim=2)

    def _moments(self, frame: Tensor) -> Tensor:
        frame = frame.to(self.model.device, self.model.dtype)
        (posterior,) = self.model.encode(frame, return_dict=False)
        return posterior.parameters.float()

    def decode_windows(
        self,
        latents: Tensor,
        *,
        window: int = 3,
        overlap: int = 1,
        tile: Tile | None = None,
        on_step: Callable[[int, int], None] | None = None,
    ) -> Iterator[Tensor]:
        """Decode latents (b c f h w) a few frames at a time; yields finished frames in order.

        Frames see each other only inside a window, so windows share `overlap` frames, blended.
        With overlap 0 they stand one after the other and the last may be shorter: windows of 3
        are the reference. on_step: called with the frames finished and the frames in all. Values
        may leave [-1, 1] a little. ValueError unless 0 <= overlap < window.
        """
        total, done = latents.shape[2], 0
        windows = adjacent_or_overlapping(total, window, overlap)
        decode = partial(self.decode_window, tile=tile)
        for video in decode_in_windows(decode, latents.unbind(2), windows):
            done += video.shape[2]
            yield video
            if on_step:
                on_step(done, total)

    def decode_window(self, latents: Tensor, *, tile: Tile | None = None) -> Tensor:
        """Latents (b c f h w) -> frames that see each other."""
        return tiled(self._decode, latents, tile, unit_in=1, unit_out=self.factor)

    def decode(self, latents: Tensor, **options: Any) -> Tensor:
        """The whole video at once; options as in `decode_windows`."""
        return torch.cat(list(self.decode_windows(latents, **options)), dim=2)

    def _decode(self, latents: Tensor) -> Tensor:
        frames = latents.shape[2]
        z = rearrange(latents / self.scaling_factor, "b c f h w -> (b f) c h w")
        z = z.to(self.model.device, self.model.dtype)
        (video,) = self.model.decode(z, num_frames=frames, return_dict=False)
        return rearrange(video, "(b f) c h w -> b c f h w", f=frames).float()
