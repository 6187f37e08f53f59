"""A small VAE on patches: all its layers work at the resolution of the latents.

Pixels are moved into channels and back (Shi et al. 2016, arXiv:1609.05158). Encoder and decoder are
each a linear convolution, which alone gives a good picture, plus a few residual blocks. There is no
norm and no attention, so tiles are equal to that part of the whole frame. Frames are independent.
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
    """Sizes of a `PatchVAE` under the names of its arguments.

    The defaults are those of the built-in model's VAE.
    """

    patch: int = 4
    latent_channels: int = 32
    width: int = 64
    encoder_blocks: int = 2
    decoder_blocks: int = 3

    @property
    def factor(self) -> int:
        """Pixels per latent in height and width."""
        return self.patch

    def build(self) -> VideoVAE:
        """Returns a VAE with random weights."""
        return patch_vae(asdict(self))


def patch_vae(config: Mapping[str, Any]) -> VideoVAE:
    """Returns a VAE with random weights. config: arguments of `PatchVAE`."""
    sizes = {field.name: config[field.name] for field in fields(PatchGeometry)}
    return VideoVAE(PatchVAE(**config), PatchGeometry(**sizes))


def _convolution(channels: int, out_channels: int) -> nn.Conv2d:
    return nn.Conv2d(channels, out_channels, 3, padding=1, padding_mode="replicate")


class Residual(nn.Module):
    """Two convolutions with a residual connection."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = _convolution(channels, channels)
        self.conv2 = _convolution(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Returns (n c h w) for x (n c h w)."""
        return x + self.conv2(F.relu(self.conv1(F.relu(x))))


class Half(nn.Module):
    """Encoder or decoder. Before training, only the linear convolution contributes."""

    def __init__(self, channels: int, out_channels: int, width: int, blocks: int) -> None:
        super().__init__()
        self.linear = _convolution(channels, out_channels)
        self.conv_in = _convolution(channels, width)
        self.blocks = nn.Sequential(*(Residual(width) for _ in range(blocks)))
        self.conv_out = _convolution(width, out_channels)
        nn.init.zeros_(self.conv_out.weight)
        nn.init.zeros_(self.conv_out.bias)  # pyright: ignore[reportArgumentType]

    def forward(self, x: Tensor) -> Tensor:
        """Returns (n out_channels h w) for x (n channels h w)."""
        x = x.contiguous(memory_format=torch.channels_last)
        return self.linear(x) + self.conv_out(F.relu(self.blocks(self.conv_in(x))))


class PatchVAE(nn.Module):
    """VAE on patches with the methods of diffusers' AutoencoderKLTemporalDecoder.

    The posterior's variance is almost 0. patch: side of a patch in pixels; each becomes one latent.
    width: channels of the residual blocks. encoder_blocks, decoder_blocks: number of those blocks.
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
        """Device of the weights."""
        return self.encoder.linear.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return self.encoder.linear.weight.dtype

    def encode(self, frames: Tensor, return_dict: bool = False) -> tuple[Any]:
        """Returns (posterior,) of frames (n 3 h w).

        Its `parameters` (n 2c h/patch w/patch) are mean and log variance. return_dict: ignored.
        """
        mean = self.encoder(F.pixel_unshuffle(frames, self.config["patch"]))
        log_variance = torch.full_like(mean, -30.0)
        return (SimpleNamespace(parameters=torch.cat([mean, log_variance], dim=1)),)

    def decode(self, z: Tensor, num_frames: int, return_dict: bool = False) -> tuple[Tensor]:
        """Returns (frames,), (n 3 h·patch w·patch), of latents z (n c h w).

        num_frames, return_dict: ignored.
        """
        return (F.pixel_shuffle(self.decoder(z), self.config["patch"]),)
