"""VAEs that encode frames one by one and decode a few at a time, optionally in tiles."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, ClassVar

import torch
from einops import rearrange
from torch import Tensor

from ..devices import send
from ..windows.canvas import FrameSpan
from ..windows.chunking import adjacent_or_overlapping, decode_in_windows
from ..windows.tiling import Tile, tiled


class FrameGeometry(ABC):
    """Sizes of a VAE that encodes frame by frame.

    latent_frames: video frames per latent frame. latent_channels: channels of the latents.
    """

    latent_frames: ClassVar = 1

    latent_channels: int

    @property
    @abstractmethod
    def factor(self) -> int:
        """Pixels per latent in height and width."""

    @abstractmethod
    def build(self) -> VideoVAE:
        """Returns a VAE with random weights."""

    def tiles(self, sides: tuple[int, int], tile: Tile | None) -> tuple[list[range], list[range]]:
        """Returns the rows and the columns, in latents, of the tiles of a frame.

        sides: (height, width) of the frame in pixels. tile: in pixels, None for the whole frame.
        """
        height, width = (side // self.factor for side in sides)
        if tile is None:
            return [range(height)], [range(width)]
        return tile.windows(height, self.factor), tile.windows(width, self.factor)

    def encoded(self, span: FrameSpan, *, hold: bool) -> list[int]:
        """Returns the number of frames in each call of the encoder for a span. hold: ignored."""
        return [1] * len(span.needed)


class VideoVAE:
    """Encodes video in [-1, 1] to latents and decodes them, both (b c f h w), float32.

    Results are on the network's device. Gradients flow unless the caller switches them off.
    """

    latent_frames = FrameGeometry.latent_frames

    def __init__(self, model: Any, geometry: FrameGeometry) -> None:
        """model: a network with the methods of diffusers' AutoencoderKLTemporalDecoder.

        Its dtype is that of the computation.
        """
        self.model, self.geometry = model, geometry
        self.factor: int = geometry.factor
        self.latent_channels: int = geometry.latent_channels
        self.scaling_factor: float = model.config["scaling_factor"]

    def encode_frame(
        self, frame: Tensor, *, noise: Tensor | None = None, tile: Tile | None = None
    ) -> Tensor:
        """Returns the latents (b c h/factor w/factor) of one frame (b 3 h w).

        noise: normal noise of the latents' shape, for a sample of the posterior; None for its mean.
        tile: in pixels, None for the whole frame.
        Raises ValueError unless height and width are multiples of the factor.
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
            latents = latents + std * send(noise, std.device, std.dtype)
        return latents * self.scaling_factor

    def encode(
        self,
        video: Tensor,
        *,
        noise: Callable[[int], Tensor] | None = None,
        tile: Tile | None = None,
    ) -> Tensor:
        """Returns the latents (b c f h/factor w/factor) of a video (b 3 f h w).

        noise: index of a frame -> normal noise (b c h w), for a sample of the posterior; None for
        its mean. tile: in pixels, None for whole frames.
        Raises ValueError unless height and width are multiples of the factor.
        """
        latents = [
            self.encode_frame(frame, noise=noise(i) if noise else None, tile=tile)
            for i, frame in enumerate(video.unbind(2))
        ]
        return torch.stack(latents, dim=2)

    def _moments(self, frame: Tensor) -> Tensor:
        frame = send(frame, self.model.device, self.model.dtype)
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
        """Decodes latents (b c f h w) a few frames at a time; yields frames (b 3 f h w) in order.

        Frames influence each other only within a window, so neighbouring windows are blended over
        `overlap` frames. With overlap 0 they are adjacent, and the last may be shorter; the
        reference uses adjacent windows of 3. Values may leave [-1, 1] a little.

        window: frames that are decoded together. tile: in pixels, None for whole frames.
        on_step: called as (done, total), in frames.
        Raises ValueError unless 0 <= overlap < window.
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
        """Returns the frames (b 3 f h w) of latents (b c f h w) that are decoded together.

        tile: in pixels, None for whole frames.
        """
        return tiled(self._decode, latents, tile, unit_in=1, unit_out=self.factor)

    def decode(self, latents: Tensor, **options: Any) -> Tensor:
        """Returns the video (b 3 f h w) of latents (b c f h w).

        options: window, overlap, tile and on_step of `decode_windows`.
        """
        return torch.cat(list(self.decode_windows(latents, **options)), dim=2)

    def _decode(self, latents: Tensor) -> Tensor:
        frames = latents.shape[2]
        z = rearrange(latents / self.scaling_factor, "b c f h w -> (b f) c h w")
        z = send(z, self.model.device, self.model.dtype)
        (video,) = self.model.decode(z, num_frames=frames, return_dict=False)
        return rearrange(video, "(b f) c h w -> b c f h w", f=frames).float()
