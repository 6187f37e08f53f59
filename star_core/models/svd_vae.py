"""The VAE of Stable Video Diffusion (Blattmann et al. 2023, arXiv:2311.15127).

The encoder sees frames one by one (Rombach et al. 2022, arXiv:2112.10752); in the decoder each
residual block is followed by one over time, and a learned weight mixes the two. Attribute names are
the keys of the weights in diffusers' naming; specification, section 5.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .attention import scaled_dot_product
from .temporal_conv import temporal_conv


class SVDVideoVAE(nn.Module):
    """Frames to the moments of latents, and latents to frames that see each other.

    block_out_channels: of each resolution, from the finest; each is half as large as the one
    before. norm_num_groups: of every group norm. norm_eps: of every group norm; None for 1e-6, and
    1e-5 over time. scaling_factor: of latents; kept for those who scale, nothing here does.
    """

    def __init__(
        self,
        *,
        block_out_channels: tuple[int, ...] = (128, 256, 512, 512),
        layers_per_block: int = 2,
        latent_channels: int = 4,
        scaling_factor: float = 0.18215,
        norm_num_groups: int = 32,
        norm_eps: float | None = None,
    ) -> None:
        super().__init__()
        self.config: dict[str, Any] = {
            "block_out_channels": tuple(block_out_channels),
            "layers_per_block": layers_per_block,
            "latent_channels": latent_channels,
            "scaling_factor": scaling_factor,
            "norm_num_groups": norm_num_groups,
            "norm_eps": norm_eps,
        }
        sizes = tuple(block_out_channels), layers_per_block, latent_channels
        self.encoder = Encoder(*sizes, norms := Norms(norm_num_groups, norm_eps))
        self.decoder = Decoder(*sizes, norms)
        self.quant_conv = nn.Conv2d(2 * latent_channels, 2 * latent_channels, 1)

    @property
    def device(self) -> torch.device:
        return self.quant_conv.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.quant_conv.weight.dtype

    def encode(self, frames: Tensor) -> Tensor:
        """Frames (b 3 h w) -> mean and logarithm of the variance of latents (b 2c h/8 w/8)."""
        return self.quant_conv(self.encoder(frames))

    def decode(self, z: Tensor, frames: int) -> Tensor:
        """Latents (b·f c h w) of clips of `frames` frames -> (b·f 3 8h 8w)."""
        return self.decoder(z, frames)


class Norms:
    """Makes group norms of so many groups; eps None leaves it to the layer."""

    def __init__(self, groups: int, eps: float | None) -> None:
        self.groups, self.eps = groups, eps

    def __call__(self, channels: int, eps: float = 1e-6) -> nn.GroupNorm:
        return nn.GroupNorm(self.groups, channels, eps=eps if self.eps is None else self.eps)


class Level(nn.Module):
    """Lists of layers under the names that the weights have; what a level lacks is empty."""

    resnets: nn.ModuleList
    attentions: nn.ModuleList
    downsamplers: nn.ModuleList
    upsamplers: nn.ModuleList

    def __init__(self, **layers: Iterable[nn.Module]) -> None:
        super().__init__()
        for name in ("resnets", "attentions", "downsamplers", "upsamplers"):
            self.add_module(name, nn.ModuleList(layers.get(name, ())))


class Encoder(nn.Module):
    def __init__(
        self, channels: tuple[int, ...], layers: int, latent_channels: int, norms: Norms
    ) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, channels[0], 3, padding=1)
        levels = []
        for width, before in zip(channels, (channels[0], *channels), strict=False):
            resnets = [ResBlock(before, width, norms)]
            resnets += [ResBlock(width, width, norms) for _ in range(layers - 1)]
            down = [Downsample(width)] if len(levels) < len(channels) - 1 else []
            levels.append(Level(resnets=resnets, downsamplers=down))
        self.down_blocks = nn.ModuleList(levels)
        width = channels[-1]
        first = ResBlock(width, width, norms)
        attention = SelfAttention(width, norms)
        last = ResBlock(width, width, norms)
        self.mid_block = Level(resnets=[first, last], attentions=[attention])
        self.conv_norm_out = norms(width)
        self.conv_out = nn.Conv2d(width, 2 * latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(b 3 h w) -> (b 2c h/8 w/8)."""
        x = self.conv_in(x)
        for level in self.down_blocks:
            assert isinstance(level, Level)
            for layer in (*level.resnets, *level.downsamplers):
                x = layer(x)
        first, last = self.mid_block.resnets
        x = last(self.mid_block.attentions[0](first(x)))
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class Decoder(nn.Module):
    def __init__(
        self, channels: tuple[int, ...], layers: int, latent_channels: int, norms: Norms
    ) -> None:
        super().__init__()
        width = channels[-1]
        self.conv_in = nn.Conv2d(latent_channels, width, 3, padding=1)
        self.mid_block = Level(
            resnets=[VideoResBlock(width, width, norms) for _ in range(layers)],
            attentions=[SelfAttention(width, norms)],
        )
        levels = []
        for width, before in zip(channels[::-1], (channels[-1], *channels[::-1]), strict=False):
            resnets = [VideoResBlock(before, width, norms)]
            resnets += [VideoResBlock(width, width, norms) for _ in range(layers)]
            up = [Upsample(width)] if len(levels) < len(channels) - 1 else []
            levels.append(Level(resnets=resnets, upsamplers=up))
        self.up_blocks = nn.ModuleList(levels)
        self.conv_norm_out = norms(channels[0])
        self.conv_out = nn.Conv2d(channels[0], 3, 3, padding=1)
        self.time_conv_out = temporal_conv(nn.Conv3d)(3, 3, (3, 1, 1), padding=(1, 0, 0))

    def forward(self, z: Tensor, frames: int) -> Tensor:
        """(b·f c h w) -> (b·f 3 8h 8w)."""
        first, *more = self.mid_block.resnets
        x = first(self.conv_in(z), frames)
        # There is one attention, so the blocks beyond the second are never used.
        for attention, resnet in zip(self.mid_block.attentions, more, strict=False):
            x = resnet(attention(x), frames)
        for level in self.up_blocks:
            assert isinstance(level, Level)
            for resnet in level.resnets:
                x = resnet(x, frames)
            for layer in level.upsamplers:
                x = layer(x)
        x = self.conv_out(F.silu(self.conv_norm_out(x)))
        clip = rearrange(x, "(b f) c h w -> b c f h w", f=frames)
        return rearrange(self.time_conv_out(clip), "b c f h w -> (b f) c h w")


class ResBlock(nn.Module):
    """Two convolutions of each frame: (b c h w) -> (b c h w)."""

    def __init__(self, channels: int, out_channels: int, norms: Norms) -> None:
        super().__init__()
        self.norm1 = norms(channels)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.norm2 = norms(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if channels != out_channels:
            self.conv_shortcut = nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(F.silu(self.norm2(y)))
        return (self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x) + y


class TemporalResBlock(nn.Module):
    """Two convolutions over time of each pixel: (b c f h w) -> (b c f h w)."""

    def __init__(self, channels: int, norms: Norms) -> None:
        super().__init__()
        conv = temporal_conv(nn.Conv3d)
        self.norm1 = norms(channels, eps=1e-5)
        self.conv1 = conv(channels, channels, (3, 1, 1), padding=(1, 0, 0))
        self.norm2 = norms(channels, eps=1e-5)
        self.conv2 = conv(channels, channels, (3, 1, 1), padding=(1, 0, 0))

    def forward(self, clip: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(clip)))
        return clip + self.conv2(F.silu(self.norm2(y)))


class VideoResBlock(nn.Module):
    """A block for each frame and one over time: (b·f c h w) -> (b·f c h w)."""

    def __init__(self, channels: int, out_channels: int, norms: Norms) -> None:
        super().__init__()
        self.spatial_res_block = ResBlock(channels, out_channels, norms)
        self.temporal_res_block = TemporalResBlock(out_channels, norms)
        self.time_mixer = TimeMixer()

    def forward(self, x: Tensor, frames: int) -> Tensor:
        spatial = rearrange(self.spatial_res_block(x), "(b f) c h w -> b c f h w", f=frames)
        temporal = self.temporal_res_block(spatial)
        mixed = self.time_mixer(spatial, temporal)
        return rearrange(mixed, "b c f h w -> (b f) c h w")


class TimeMixer(nn.Module):
    """A learned mean of what space and what time say; both alike at first."""

    def __init__(self) -> None:
        super().__init__()
        self.mix_factor = nn.Parameter(torch.zeros(1))

    def forward(self, spatial: Tensor, temporal: Tensor) -> Tensor:
        share = 1 - torch.sigmoid(self.mix_factor)
        return share * spatial + (1 - share) * temporal


class SelfAttention(nn.Module):
    """Of the pixels of each frame, by one head: (b c h w) -> (b c h w)."""

    def __init__(self, channels: int, norms: Norms) -> None:
        super().__init__()
        self.group_norm = norms(channels)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        tokens = rearrange(self.group_norm(x), "b c h w -> b (h w) c")
        y = scaled_dot_product(self.to_q(tokens), self.to_k(tokens), self.to_v(tokens), 1)
        return self.to_out[0](y).transpose(1, 2).reshape(x.shape) + x


class Downsample(nn.Module):
    """(b c h w) -> (b c h/2 w/2)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """(b c h w) -> (b c 2h 2w)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0))
