"""The blocks of I2VGen-XL's UNet with STAR's LIEM (specification, sections 2.4 to 2.10).

Attribute names are checkpoint keys, the reference's spelling included (`temopral_conv`).
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .attention import Attention, AttentionWindow, scaled_dot_product, within
from .liem import SpatialLIEM, TemporalLIEM
from .slicing import ClipNorm, Slicing, over_frames
from .temporal_conv import temporal_conv


class Factory:
    """How layers are made: the host's operations, device, dtype, attention, group count."""

    def __init__(
        self,
        *,
        operations: Any = nn,
        attention: Attention = scaled_dot_product,
        device=None,
        dtype=None,
        norm_groups: int = 32,
    ):
        self.operations, self.attention, self.norm_groups = operations, attention, norm_groups
        self.where: dict[str, Any] = {"device": device, "dtype": dtype}

    def linear(self, *args, **kwargs) -> nn.Linear:
        return self.operations.Linear(*args, **kwargs, **self.where)

    def conv1d(self, *args, **kwargs) -> nn.Conv1d:
        return self.operations.Conv1d(*args, **kwargs, **self.where)

    def conv2d(self, *args, **kwargs) -> nn.Conv2d:
        return self.operations.Conv2d(*args, **kwargs, **self.where)

    def temporal_conv(self, channels: int) -> nn.Conv3d:
        conv = temporal_conv(self.operations.Conv3d)
        return conv(channels, channels, (3, 1, 1), padding=(1, 0, 0), **self.where)

    def layer_norm(self, channels: int) -> nn.LayerNorm:
        return self.operations.LayerNorm(channels, **self.where)

    def group_norm(self, channels: int, eps: float = 1e-5) -> nn.GroupNorm:
        return self.operations.GroupNorm(self.norm_groups, channels, eps=eps, **self.where)


def sinusoidal_embedding(t: Tensor, dim: int) -> Tensor:
    """Timesteps (b,) -> (b dim), cosines first (specification, 2.4)."""
    half = dim // 2
    exponents = torch.arange(half, dtype=torch.float32, device=t.device) / half
    angles = t.float()[:, None] * torch.pow(10000.0, -exponents)
    embedding = torch.cat([angles.cos(), angles.sin()], dim=1)
    return F.pad(embedding, (0, dim % 2))


class TemporalConvBlock(nn.Module):
    """Four residual convolutions over time: (b c f h w) -> (b c f h w).

    Group norm statistics run over frames and pixels jointly.
    """

    def __init__(self, channels: int, *, dropout: float = 0.0, make: Factory):
        super().__init__()

        def stage(*between: nn.Module) -> nn.Sequential:
            layers = [make.group_norm(channels), nn.SiLU(), *between, make.temporal_conv(channels)]
            return nn.Sequential(*layers)

        self.conv1 = stage()
        self.conv2 = stage(nn.Dropout(dropout))
        self.conv3 = stage(nn.Dropout(dropout))
        self.conv4 = stage(nn.Dropout(dropout))

    def forward(self, x: Tensor, slicing: Slicing | None = None) -> Tensor:
        if slicing is None or len(slicing.rows(x)) == 1:
            return x + self.conv4(self.conv3(self.conv2(self.conv1(x))))
        y = x
        for norm, *rest in (self.conv1, self.conv2, self.conv3, self.conv4):
            assert isinstance(norm, nn.GroupNorm)
            normed, out = ClipNorm(norm, y, slicing), torch.empty_like(x) if y is x else y
            for rows, rows_out in zip(slicing.rows(y), slicing.rows(out), strict=True):
                rows = normed(rows)
                for layer in rest:
                    rows = layer(rows)
                rows_out.copy_(rows)
            y = out
        return y.add_(x)


class ResBlock(nn.Module):
    """Two convolutions per frame with the timestep added between, then `TemporalConvBlock`."""

    def __init__(
        self, channels: int, out_channels: int, emb_channels: int, *, dropout=0.0, make: Factory
    ):
        super().__init__()
        self.in_layers = nn.Sequential(
            make.group_norm(channels),
            nn.SiLU(),
            make.conv2d(channels, out_channels, 3, padding=1),
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), make.linear(emb_channels, out_channels))
        self.out_layers = nn.Sequential(
            make.group_norm(out_channels),
            nn.SiLU(),
            nn.Dropout(dropout),
            make.conv2d(out_channels, out_channels, 3, padding=1),
        )
        same = channels == out_channels
        self.skip_connection = nn.Identity() if same else make.conv2d(channels, out_channels, 1)
        self.temopral_conv = TemporalConvBlock(out_channels, dropout=dropout, make=make)

    def forward(
        self, channels: list[Tensor], emb: Tensor, frames: int, slicing: Slicing | None = None
    ) -> Tensor:
        """channels: parts of x (b·f c h w), taken out of the list. emb (b·f d) -> (b·f c h w)."""
        h = over_frames(self.spatial, slicing, emb, *channels)
        channels.clear()
        h = rearrange(h, "(b f) c h w -> b c f h w", f=frames)
        return rearrange(self.temopral_conv(h, slicing), "b c f h w -> (b f) c h w")

    def spatial(self, emb: Tensor, *channels: Tensor) -> Tensor:
        x = torch.cat(channels, dim=1)
        h = self.in_layers(x) + self.emb_layers(emb)[:, :, None, None]
        return self.out_layers(h) + self.skip_connection(x)


class Downsample(nn.Module):
    """Halves a frame; pads two rows but one column: h -> (h + 1) // 2 + 1, w -> (w + 1) // 2."""

    def __init__(self, channels: int, *, make: Factory):
        super().__init__()
        self.op = make.conv2d(channels, channels, 3, stride=2, padding=(2, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Upsample(nn.Module):
    """Doubles a frame and drops its first and last row: h -> 2h - 2, w -> 2w."""

    def __init__(self, channels: int, *, make: Factory):
        super().__init__()
        self.conv = make.conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest")[:, :, 1:-1])


class CrossAttention(nn.Module):
    """Multi-head attention of x to a context, or to itself: (b n d), (b l e) -> (b n d)."""

    def __init__(
        self, dim: int, heads: int, dim_head: int, *, context_dim: int | None = None, make: Factory
    ):
        super().__init__()
        inner = heads * dim_head
        self.heads, self.attention = heads, make.attention
        self.to_q = make.linear(dim, inner, bias=False)
        self.to_k = make.linear(context_dim or dim, inner, bias=False)
        self.to_v = make.linear(context_dim or dim, inner, bias=False)
        self.to_out = nn.Sequential(make.linear(inner, dim), nn.Identity())

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        q, k, v = self.to_q(x), self.to_k(context), self.to_v(context)
        return self.to_out(self.attention(q, k, v, self.heads))


class GEGLU(nn.Module):
    def __init__(self, dim: int, inner: int, *, make: Factory):
        super().__init__()
        self.proj = make.linear(dim, 2 * inner)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, dim: int, *, make: Factory):
        super().__init__()
        self.net = nn.Sequential(
            GEGLU(dim, 4 * dim, make=make), nn.Identity(), make.linear(4 * dim, dim)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class BasicTransformerBlock(nn.Module):
    """LIEM, two attentions and a feed-forward layer on tokens (specification, 2.9).

    In space (`context_dim` given) the second attention looks at the text; in time it is a second
    self-attention with a LIEM of its own. The residual never passes a gate.
    """

    def __init__(
        self, dim: int, heads: int, dim_head: int, *, context_dim: int | None = None, make: Factory
    ):
        super().__init__()
        self.attn1 = CrossAttention(dim, heads, dim_head, make=make)
        self.attn2 = CrossAttention(dim, heads, dim_head, context_dim=context_dim, make=make)
        self.ff = FeedForward(dim, make=make)
        self.norm1, self.norm2, self.norm3 = (make.layer_norm(dim) for _ in range(3))
        gate = {"operations": make.operations, **make.where}
        if context_dim is None:
            self.local1, self.local2 = TemporalLIEM(**gate), TemporalLIEM(**gate)
        else:
            self.local1 = SpatialLIEM(**gate)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        height: int | None = None,
        window: AttentionWindow | None = None,
    ) -> Tensor:
        """Time: x (b·h·w f d). Space: x (b·f h·w d), context (b·f l e), height h of the frame."""
        if context is None or height is None:
            x = self.attn1(self.norm1(self.local1(x))) + x
            x = self.attn2(self.norm2(self.local2(x))) + x
        else:
            pixels = rearrange(x, "b (h w) d -> b d h w", h=height)
            local = rearrange(self.local1(pixels), "b d h w -> b (h w) d")
            x = within(window, self.attn1, self.norm1(local), height) + x
            x = self.attn2(self.norm2(x), context) + x
        return self.ff(self.norm3(x)) + x


class SpatialTransformer(nn.Module):
    """Attention within each frame and to the text (specification, 2.7).

    `window` may be set: the frame's attention to itself then stays within windows.
    """

    def __init__(
        self, channels: int, heads: int, dim_head: int, *, context_dim: int, make: Factory
    ):
        super().__init__()
        inner = heads * dim_head
        self.norm = make.group_norm(channels, eps=1e-6)
        self.proj_in = make.linear(channels, inner)
        self.transformer_blocks = nn.ModuleList(
            [BasicTransformerBlock(inner, heads, dim_head, context_dim=context_dim, make=make)]
        )
        self.proj_out = make.linear(inner, channels)
        self.window: AttentionWindow | None = None

    def forward(self, x: Tensor, context: Tensor, slicing: Slicing | None = None) -> Tensor:
        """x (b·f c h w), context (b·f l e) -> (b·f c h w), in slices x itself."""
        if slicing is not None and len(parts := slicing.frames(x)) > 1:
            for part in parts:
                x[part] = self(x[part], context[part])
            return x
        height = x.shape[2]
        tokens = self.proj_in(rearrange(self.norm(x), "b c h w -> b (h w) c"))
        for block in self.transformer_blocks:
            tokens = block(tokens, context, height=height, window=self.window)
        return rearrange(self.proj_out(tokens), "b (h w) c -> b c h w", h=height) + x


class TemporalTransformer(nn.Module):
    """Attention of each pixel over all frames, without positions (specification, 2.8)."""

    def __init__(self, channels: int, heads: int, dim_head: int, *, make: Factory):
        super().__init__()
        inner = heads * dim_head
        self.norm = make.group_norm(channels, eps=1e-6)
        self.proj_in = make.conv1d(channels, inner, 1)
        self.transformer_blocks = nn.ModuleList(
            [BasicTransformerBlock(inner, heads, dim_head, make=make)]
        )
        self.proj_out = make.conv1d(inner, channels, 1)

    def forward(self, x: Tensor, slicing: Slicing | None = None) -> Tensor:
        """(b c f h w) -> (b c f h w), in slices x itself."""
        if slicing is None or len(slicing.rows(x)) == 1:
            return self.residual(self.norm(x)) + x
        norm = ClipNorm(self.norm, x, slicing)
        for rows in slicing.rows(x):
            rows += self.residual(norm(rows))
        return x

    def residual(self, x: Tensor) -> Tensor:
        b, _, _, h, w = x.shape
        tokens = self.proj_in(rearrange(x, "b c f h w -> (b h w) c f"))
        tokens = rearrange(tokens, "n c f -> n f c")
        for block in self.transformer_blocks:
            tokens = block(tokens)
        out = self.proj_out(rearrange(tokens, "n f c -> n c f"))
        return rearrange(out, "(b h w) c f -> b c f h w", b=b, h=h, w=w)


def timestep_mlp(dim: int, emb_channels: int, *, make: Factory) -> nn.Sequential:
    return nn.Sequential(
        make.linear(dim, emb_channels), nn.SiLU(), make.linear(emb_channels, emb_channels)
    )


def heads_of(channels: int, head_dim: int) -> int:
    if channels % head_dim:
        raise ValueError(f"{channels} channels do not divide into heads of {head_dim}")
    return math.floor(channels / head_dim)
