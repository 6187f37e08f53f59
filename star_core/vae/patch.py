"""A small VAE that works on patches: all of it at the latents' size, none of it at the frame's.

Each half is one linear convolution, which alone gives a good picture, plus a few residual blocks
(Shi et al. 2016, arXiv:1609.05158, for the pixels' way into channels and back). There is no norm
and no attention, so that a tile is what it is in the whole frame, and frames do not see each other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .frame_vae import FrameGeometry, VideoVAE


@dataclass(frozen=True, kw_only=True)
class PatchGeometry(FrameGeometry):
    """The sizes of a `PatchVAE`, as its configuration names them; the defaults are the built-in
    model's."""

    patch: int = 4
    latent_channels: int = 32
    width: int = 64
    encoder_blocks: int = 2
    decoder_blocks: int = 3

    @property
    def factor(self) -> int:
        return self.patch

    @property
    def finest_channels(self) -> int:
        return 1 + self.width // self.patch**2

    def build(self) -> VideoVAE:
        return patch_vae(asdict(self))


def patch_vae(config: Mapping[str, Any]) -> VideoVAE:
    """A VAE with random weights from the configuration of a `PatchVAE`."""
    sizes = {field.name: config[field.name] for field in fields(PatchGeometry)}
    return VideoVAE(PatchVAE(**config), PatchGeometry(**sizes))


def convolution(channels: int, out_channels: int) -> nn.Conv2d:
    return nn.Conv2d(channels, out_channels, 3, padding=1, padding_mode="replicate")


class Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = convolution(channels, channels)
        self.conv2 = convolution(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu(self.conv1(F.relu(x))))


class Half(nn.Module):
    """Encoder or decoder: (n c h w) -> (n c' h w). Untrained, only `linear` tells anything."""

    def __init__(self, channels: int, out_channels: int, width: int, blocks: int) -> None:
        super().__init__()
        self.linear = convolution(channels, out_channels)
        self.conv_in = convolution(channels, width)
        self.blocks = nn.Sequential(*(Residual(width) for _ in range(blocks)))
        self.conv_out = convolution(width, out_channels)
        nn.init.zeros_(self.conv_out.weight)
        nn.init.zeros_(self.conv_out.bias)  # pyright: ignore[reportArgumentType]

    def forward(self, x: Tensor) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        return self.linear(x) + self.conv_out(F.relu(self.blocks(self.conv_in(x))))


class PatchVAE(nn.Module):
    """Called as diffusers' AutoencoderKLTemporalDecoder is; its posterior has no spread.

    patch: side in pixels of what becomes one latent. width: channels of the residual blocks, whose
    number is `encoder_blocks` and `decoder_blocks`.
    """

    def __init__(
        self,
        *,
        patch: int,
        latent_channels: int,
        width: int,
        encoder_blocks: int,
        decoder_blocks: int,
        scaling_factor: float = 1.0,
    ) -> None:
        super().__init__()
        self.config = {
            "patch": patch,
            "latent_channels": latent_channels,
            "width": width,
            "encoder_blocks": encoder_blocks,
            "decoder_blocks": decoder_blocks,
            "scaling_factor": scaling_factor,
        }
        pixels = 3 * patch**2
        self.encoder = Half(pixels, latent_channels, width, encoder_blocks)
        self.decoder = Half(latent_channels, pixels, width, decoder_blocks)

    @property
    def device(self) -> torch.device:
        return self.encoder.linear.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.encoder.linear.weight.dtype

    def encode(self, frames: Tensor, return_dict: bool = False) -> tuple[Any]:
        """(n 3 h w) -> (posterior,), of which `parameters` are mean and log variance."""
        mean = self.encoder(F.pixel_unshuffle(frames, self.config["patch"]))
        spread = torch.full_like(mean, -30.0)
        return (SimpleNamespace(parameters=torch.cat([mean, spread], dim=1)),)

    def decode(self, z: Tensor, num_frames: int, return_dict: bool = False) -> tuple[Tensor]:
        """(n c h w) -> (pixels (n 3 h w),)."""
        return (F.pixel_shuffle(self.decoder(z), self.config["patch"]),)
