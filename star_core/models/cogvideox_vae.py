"""The VAE of CogVideoX (Yang et al. 2024, arXiv:2408.06072): causal in time.

It works a few frames at a time. Convolutions look back only and are handed the frames before; group
norms alone look at all frames (of a window in the encoder, of a group in the decoder), and those
need no more than two numbers a group of them. Attribute names are the keys of the weights in
diffusers' naming; specification of the second backbone, section 7.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .slicing import ClipNorm
from .svd_vae import Level

PIXELS = 2**19  # of the layer's own resolution that are worked on together, in whole frames

Cache = dict[nn.Module, Tensor]  # of each convolution, the frames that it has last seen


class CogVideoXVAE(nn.Module):
    """Windows of video to the moments of latents, and groups of latents to video.

    block_out_channels: of each resolution, from the finest; each is half as large as the one
    before. temporal_compression_ratio: a power of 2; time is halved where the resolution changes,
    from the finest on. scaling_factor, sample_height, sample_width: kept for others, nothing here
    heeds them.
    """

    def __init__(
        self,
        *,
        block_out_channels: tuple[int, ...] = (128, 256, 256, 512),
        layers_per_block: int = 3,
        latent_channels: int = 16,
        norm_num_groups: int = 32,
        norm_eps: float = 1e-6,
        temporal_compression_ratio: int = 4,
        scaling_factor: float = 0.7,
        sample_height: int = 480,
        sample_width: int = 720,
    ) -> None:
        super().__init__()
        self.config: dict[str, Any] = {
            "block_out_channels": tuple(block_out_channels),
            "layers_per_block": layers_per_block,
            "latent_channels": latent_channels,
            "norm_num_groups": norm_num_groups,
            "norm_eps": norm_eps,
            "temporal_compression_ratio": temporal_compression_ratio,
            "scaling_factor": scaling_factor,
            "sample_height": sample_height,
            "sample_width": sample_width,
        }
        halvings = int(temporal_compression_ratio).bit_length() - 1
        sizes = tuple(block_out_channels), layers_per_block, latent_channels, halvings
        self.encoder = Encoder(*sizes, Norms(norm_num_groups, norm_eps))
        self.decoder = Decoder(*sizes, Norms(norm_num_groups, norm_eps, latent_channels))

    @property
    def device(self) -> torch.device:
        return self.encoder.conv_in.conv.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.encoder.conv_in.conv.weight.dtype

    def encode(self, video: Tensor) -> Tensor:
        """Window (b 3 1+4k h w) -> mean and log variance of latents (b 2c 1+k h/8 w/8)."""
        return self.encoder(video)

    def decode(self, z: Tensor, cache: Cache) -> Tensor:
        """Latents (b c f h w) of one group -> its video. cache: of the groups before."""
        return self.decoder(z, cache)


class Norms:
    """Makes the norms; of latent_channels, those that take the latents into account."""

    def __init__(self, groups: int, eps: float, latent_channels: int | None = None) -> None:
        self.groups, self.eps, self.latent_channels = groups, eps, latent_channels

    def __call__(self, channels: int) -> nn.Module:
        if self.latent_channels is None:
            return nn.GroupNorm(self.groups, channels, eps=self.eps)
        return LatentNorm(self.groups, channels, self.latent_channels)

    def last(self, channels: int) -> nn.Module:
        """The one before the last convolution, whose epsilon is fixed."""
        return Norms(self.groups, 1e-6, self.latent_channels)(channels)


class Encoder(nn.Module):
    def __init__(
        self,
        channels: tuple[int, ...],
        layers: int,
        latent_channels: int,
        halvings: int,
        norms: Norms,
    ) -> None:
        super().__init__()
        self.conv_in = CausalConv(3, channels[0])
        levels = []
        for i, (width, before) in enumerate(zip(channels, (channels[0], *channels), strict=False)):
            resnets = [ResBlock(before, width, norms)]
            resnets += [ResBlock(width, width, norms) for _ in range(layers - 1)]
            down = [Downsample(width, time=i < halvings)] if i < len(channels) - 1 else []
            levels.append(Level(resnets=resnets, downsamplers=down))
        self.down_blocks = nn.ModuleList(levels)
        width = channels[-1]
        self.mid_block = Level(resnets=[ResBlock(width, width, norms) for _ in range(2)])
        self.norm_out = norms.last(width)
        self.conv_out = CausalConv(width, 2 * latent_channels)

    def forward(self, video: Tensor) -> Tensor:
        cache: Cache = {}
        x = self.conv_in.whole(video, cache)
        for level in (*self.down_blocks, self.mid_block):
            assert isinstance(level, Level)
            for resnet in level.resnets:
                x = resnet(x, None, cache)
            for layer in level.downsamplers:
                x = layer(x)
        return self.conv_out.whole(x, cache, normed(self.norm_out, x, None))


class Decoder(nn.Module):
    def __init__(
        self,
        channels: tuple[int, ...],
        layers: int,
        latent_channels: int,
        halvings: int,
        norms: Norms,
    ) -> None:
        super().__init__()
        width = channels[-1]
        self.conv_in = CausalConv(latent_channels, width)
        self.mid_block = Level(resnets=[ResBlock(width, width, norms) for _ in range(2)])
        levels, widths = [], channels[::-1]
        for i, (width, before) in enumerate(zip(widths, (widths[0], *widths), strict=False)):
            resnets = [ResBlock(before, width, norms)]
            resnets += [ResBlock(width, width, norms) for _ in range(layers)]
            up = [Upsample(width, time=i < halvings)] if i < len(channels) - 1 else []
            levels.append(Level(resnets=resnets, upsamplers=up))
        self.up_blocks = nn.ModuleList(levels)
        self.norm_out = norms.last(channels[0])
        self.conv_out = CausalConv(channels[0], 3)

    def forward(self, z: Tensor, cache: Cache) -> Tensor:
        x = self.conv_in.whole(z, cache)
        for level in (self.mid_block, *self.up_blocks):
            assert isinstance(level, Level)
            for resnet in level.resnets:
                x = resnet(x, z, cache)
            for layer in level.upsamplers:
                x = layer(x)
        return self.conv_out.whole(x, cache, normed(self.norm_out, x, z))


class CausalConv(nn.Module):
    """A convolution that looks back in time only; before a clip stands its first frame."""

    def __init__(self, channels: int, out_channels: int, kernel_size: int = 3) -> None:
        super().__init__()
        self.before = kernel_size - 1  # frames that it looks back
        padding = (0, kernel_size // 2, kernel_size // 2)
        self.conv = nn.Conv3d(channels, out_channels, kernel_size, padding=padding)

    def forward(self, x: Tensor, cache: Cache) -> Tensor:
        """The next frames (b c f h w) of a clip -> the same."""
        if not self.before:
            return self.conv(x)
        before = cache.get(self)
        if before is None:
            before = x[:, :, :1].expand(-1, -1, self.before, -1, -1)
        x = torch.cat([before, x], dim=2)
        cache[self] = x[:, :, -self.before :].clone()
        return self.conv(x)

    def whole(self, x: Tensor, cache: Cache, of: Callable[[slice], Tensor] | None = None) -> Tensor:
        """All of x, or of what `of` makes of its frames, a few of them at a time."""
        out = None
        for part in parts(x):
            y = self(of(part) if of else x[:, :, part], cache)
            if out is None:
                out = y.new_empty(*y.shape[:2], *x.shape[2:])
            out[:, :, part] = y
        assert out is not None
        return out


class LatentNorm(nn.Module):
    """A group norm with gain and shift from the latents (Zheng et al. 2022, arXiv:2209.09002)."""

    def __init__(self, groups: int, channels: int, latent_channels: int) -> None:
        super().__init__()
        self.norm_layer = nn.GroupNorm(groups, channels, eps=1e-6)
        self.conv_y = CausalConv(latent_channels, channels, 1)
        self.conv_b = CausalConv(latent_channels, channels, 1)


class ResBlock(nn.Module):
    """Two convolutions over space and time: (b c f h w) -> (b c f h w)."""

    def __init__(self, channels: int, out_channels: int, norms: Norms) -> None:
        super().__init__()
        self.norm1 = norms(channels)
        self.conv1 = CausalConv(channels, out_channels)
        self.norm2 = norms(out_channels)
        self.conv2 = CausalConv(out_channels, out_channels)
        if channels != out_channels:
            self.conv_shortcut = nn.Conv3d(channels, out_channels, 1)

    def forward(self, x: Tensor, z: Tensor | None, cache: Cache) -> Tensor:
        """z: the latents, in the decoder. Where gradients are off, x is written over."""
        hidden = self.conv1.whole(x, cache, normed(self.norm1, x, z))
        of = normed(self.norm2, hidden, z)
        shortcut = getattr(self, "conv_shortcut", nn.Identity())
        out = hidden if hasattr(self, "conv_shortcut") else x
        if torch.is_grad_enabled():
            out = torch.empty_like(out)
        for part in parts(x):
            out[:, :, part] = self.conv2(of(part), cache).add_(shortcut(x[:, :, part]))
        return out


class Downsample(nn.Module):
    """(b c f h w) -> (b c f h/2 w/2), with `time` half the frames; an odd first one stays."""

    def __init__(self, channels: int, *, time: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)
        self.time = time

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self._resized(x[:, :, part]) for part in parts(x, even=True)], dim=2)

    def _resized(self, x: Tensor) -> Tensor:
        if self.time:
            odd = x.shape[2] % 2
            first, rest = x[:, :, :odd], x[:, :, odd:]
            x = torch.cat([first, (rest[:, :, ::2] + rest[:, :, 1::2]) / 2], dim=2)
        return by_frames(self.conv, F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """(b c f h w) -> (b c f 2h 2w), with `time` twice the frames; an odd first one stays one."""

    def __init__(self, channels: int, *, time: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.time = time

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self._resized(x[:, :, part]) for part in parts(x, even=True)], dim=2)

    def _resized(self, x: Tensor) -> Tensor:
        if self.time:
            odd = x.shape[2] % 2
            twice = x[:, :, odd:].repeat_interleave(2, dim=2)
            x = torch.cat([x[:, :, :odd], twice], dim=2)
        return by_frames(self.conv, F.interpolate(x, scale_factor=(1.0, 2.0, 2.0)))


def by_frames(conv: nn.Module, x: Tensor) -> Tensor:
    """A 2-D convolution of each frame of (b c f h w)."""
    y = conv(rearrange(x, "b c f h w -> (b f) c h w"))
    return rearrange(y, "(b f) c h w -> b c f h w", b=len(x))


def normed(norm: nn.Module, x: Tensor, z: Tensor | None) -> Callable[[slice], Tensor]:
    """Frames of x, normalised by the statistics of all of them, z taken into account, and SiLU."""
    if isinstance(norm, nn.GroupNorm):
        whole = ClipNorm(norm, x)
        return lambda part: F.silu(whole(x[:, :, part]))
    assert isinstance(norm, LatentNorm) and z is not None
    whole = ClipNorm(norm.norm_layer, x)
    latents = _as_large(z, x)

    def of(part: slice) -> Tensor:
        gain, shift = (conv(latents[:, :, part], {}) for conv in (norm.conv_y, norm.conv_b))
        return F.silu(whole(x[:, :, part]).mul_(gain).add_(shift))

    return of


def _as_large(z: Tensor, x: Tensor) -> Tensor:
    """z of the frames and size of x; of an odd number of frames the first stands alone."""
    frames, size = x.shape[2], x.shape[-2:]
    if frames == 1 or frames % 2 == 0:
        return F.interpolate(z, size=(frames, *size))
    first, rest = z[:, :, :1], z[:, :, 1:]
    parts = [F.interpolate(first, size=(1, *size)), F.interpolate(rest, size=(frames - 1, *size))]
    return torch.cat(parts, dim=2)


def parts(x: Tensor, *, even: bool = False) -> list[slice]:
    """Slices of frames. even: an even number each, after a first odd one where it must be."""
    frames = x.shape[2]
    count = max(1, PIXELS // (x.shape[-2] * x.shape[-1]))
    odd = 0
    if even:
        count, odd = max(2, count // 2 * 2), frames % 2
    begins = [0, *range(odd + count, frames, count)]
    return [slice(a, b) for a, b in pairwise([*begins, frames])]
