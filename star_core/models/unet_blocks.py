"""The blocks of I2VGen-XL's UNet with STAR's LIEM (specification, sections 2.4 to 2.10).

Attribute names are checkpoint keys, the reference's spelling included (`temopral_conv`).
"""

from typing import Any, Union

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .attention import Attention, AttentionWindow, scaled_dot_product, windowed_attention
from .liem import SpatialLIEM, TemporalLIEM
from .slicing import ClipNorm, Slicing, over_frames
from .temporal_conv import temporal_conv

# What tokens attend to (b l e), or its keys and values (b l d).
Context = Union[Tensor, tuple[Tensor, Tensor]]  # noqa: UP007


class Factory:
    """Makes layers with a host's classes, on one device and in one dtype."""

    def __init__(
        self,
        *,
        operations: Any = nn,
        attention: Attention = scaled_dot_product,
        device=None,
        dtype=None,
        norm_groups: int = 32,
    ):
        """operations: torch.nn, or a host's layers. attention: see `models.attention`.

        norm_groups: groups of every group norm.
        """
        self.operations, self.attention, self.norm_groups = operations, attention, norm_groups
        self.placement: dict[str, Any] = {"device": device, "dtype": dtype}

    def linear(self, *args, **kwargs) -> nn.Linear:
        """Makes a linear layer; the arguments are torch's."""
        return self.operations.Linear(*args, **kwargs, **self.placement)

    def conv1d(self, *args, **kwargs) -> nn.Conv1d:
        """Makes a 1-D convolution; the arguments are torch's."""
        return self.operations.Conv1d(*args, **kwargs, **self.placement)

    def conv2d(self, *args, **kwargs) -> nn.Conv2d:
        """Makes a 2-D convolution; the arguments are torch's."""
        return self.operations.Conv2d(*args, **kwargs, **self.placement)

    def temporal_conv(self, channels: int) -> nn.Conv3d:
        """Makes a convolution over 3 frames that keeps the number of channels and frames."""
        conv = temporal_conv(self.operations.Conv3d)
        return conv(channels, channels, (3, 1, 1), padding=(1, 0, 0), **self.placement)

    def layer_norm(self, channels: int) -> nn.LayerNorm:
        """Makes a layer norm over the last dimension."""
        return self.operations.LayerNorm(channels, **self.placement)

    def group_norm(self, channels: int, eps: float = 1e-5) -> nn.GroupNorm:
        """Makes a group norm with `norm_groups` groups."""
        return self.operations.GroupNorm(self.norm_groups, channels, eps=eps, **self.placement)


def sinusoidal_embedding(t: Tensor, dim: int) -> Tensor:
    """Embeds timesteps t (b,) as (b dim), cosines first (specification, 2.4)."""
    half = dim // 2
    exponents = torch.arange(half, dtype=torch.float32, device=t.device) / half
    angles = t.float()[:, None] * torch.pow(10000.0, -exponents)
    embedding = torch.cat([angles.cos(), angles.sin()], dim=1)
    return F.pad(embedding, (0, dim % 2))


class TemporalConvBlock(nn.Module):
    """Four convolutions over time with one residual connection.

    The statistics of its group norms are taken over frames and pixels jointly.
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
        """Returns (b c f h w) for x (b c f h w); slicing computes a few rows at a time."""
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
        """Returns the block's output (b·f c h w).

        channels: tensors (b·f c h w) whose channels together are the input; the list is emptied so
        that they can be freed. emb: timestep embedding (b·f d). frames: f. slicing: how much is
        computed at a time, None for everything.
        """
        h = over_frames(self._spatial, slicing, emb, *channels)
        channels.clear()
        h = rearrange(h, "(b f) c h w -> b c f h w", f=frames)
        return rearrange(self.temopral_conv(h, slicing), "b c f h w -> (b f) c h w")

    def _spatial(self, emb: Tensor, *channels: Tensor) -> Tensor:
        x = torch.cat(channels, dim=1)
        h = self.in_layers(x) + self.emb_layers(emb)[:, :, None, None]
        return self.out_layers(h) + self.skip_connection(x)


class Downsample(nn.Module):
    """Halves frames, padding two rows but one column at each side (specification, 2.6)."""

    def __init__(self, channels: int, *, make: Factory):
        super().__init__()
        self.op = make.conv2d(channels, channels, 3, stride=2, padding=(2, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Returns frames (b·f c (h+1)//2+1 (w+1)//2) for x (b·f c h w)."""
        return self.op(x)


class Upsample(nn.Module):
    """Doubles frames and drops their first and last row (specification, 2.6)."""

    def __init__(self, channels: int, *, make: Factory):
        super().__init__()
        self.conv = make.conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Returns frames (b·f c 2h-2 2w) for x (b·f c h w)."""
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest")[:, :, 1:-1])


class CrossAttention(nn.Module):
    """Multi-head attention to a context of width `context_dim`, or to the tokens themselves."""

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

    def keys_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Returns keys and values (b l d) of a context (b l e)."""
        return self.to_k(context), self.to_v(context)

    def forward(self, x: Tensor, context: Context | None = None) -> Tensor:
        """Returns (b n d) for tokens x (b n d).

        context: (b l e), or its keys and values; None for x itself.
        """
        context = x if context is None else context
        k, v = context if isinstance(context, tuple) else self.keys_values(context)
        return self.to_out(self.attention(self.to_q(x), k, v, self.heads))


class GEGLU(nn.Module):
    """Linear layer with a GELU gate (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, dim: int, inner: int, *, make: Factory):
        super().__init__()
        self.proj = make.linear(dim, 2 * inner)

    def forward(self, x: Tensor) -> Tensor:
        """Returns (... inner) for tokens x (... dim)."""
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """GEGLU with a hidden width of 4 dim, and a linear layer back to dim."""

    def __init__(self, dim: int, *, make: Factory):
        super().__init__()
        self.net = nn.Sequential(
            GEGLU(dim, 4 * dim, make=make), nn.Identity(), make.linear(4 * dim, dim)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Returns (... dim) for tokens x (... dim)."""
        return self.net(x)


class BasicTransformerBlock(nn.Module):
    """LIEM, two attentions and a feed-forward layer on tokens (specification, 2.9).

    A spatial block, which has a `context_dim`, attends to the frame and then to the text. A
    temporal block has two self-attentions, each with a LIEM. Residual connections bypass the gates.
    """

    def __init__(
        self, dim: int, heads: int, dim_head: int, *, context_dim: int | None = None, make: Factory
    ):
        super().__init__()
        self.attn1 = CrossAttention(dim, heads, dim_head, make=make)
        self.attn2 = CrossAttention(dim, heads, dim_head, context_dim=context_dim, make=make)
        self.ff = FeedForward(dim, make=make)
        self.norm1, self.norm2, self.norm3 = (make.layer_norm(dim) for _ in range(3))
        options = {"operations": make.operations, **make.placement}
        if context_dim is None:
            self.local1, self.local2 = TemporalLIEM(**options), TemporalLIEM(**options)
        else:
            self.local1 = SpatialLIEM(**options)

    def forward(
        self,
        x: Tensor,
        context: Context | None = None,
        *,
        height: int | None = None,
        window: AttentionWindow | None = None,
    ) -> Tensor:
        """Returns tokens of the shape of x.

        x: (b·h·w f d) for a temporal block, (b·f h·w d) for a spatial one. The rest is for a
        spatial block only: context is the text (b·f l e), or its keys and values (b·f l d), height
        the rows h of the frame, window limits attention within the frame.
        """
        if context is None or height is None:
            x = self.attn1(self.norm1(self.local1(x))) + x
            x = self.attn2(self.norm2(self.local2(x))) + x
        else:
            pixels = rearrange(x, "b (h w) d -> b d h w", h=height)
            local = rearrange(self.local1(pixels), "b d h w -> b (h w) d")
            x = windowed_attention(window, self.attn1, self.norm1(local), height) + x
            x = self.attn2(self.norm2(x), context) + x
        return self.ff(self.norm3(x)) + x


class SpatialTransformer(nn.Module):
    """Attention within each frame and to the text (specification, 2.7).

    window: limits attention within the frame to windows; None for the whole frame.
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
        """Returns (b·f c h w) for x (b·f c h w) and the text, context (b l e).

        slicing: how much is computed at a time; with more than one slice x is overwritten.
        """
        (block,) = self.transformer_blocks
        assert isinstance(block, BasicTransformerBlock)
        # Once for all frames of a prompt.
        k, v = (_for_frames(e, len(x) // len(context)) for e in block.attn2.keys_values(context))
        if slicing is not None and len(parts := slicing.frames(x)) > 1:
            for part in parts:
                x[part] = self._attended(x[part], (k[part], v[part]))
            return x
        return self._attended(x, (k, v))

    def _attended(self, x: Tensor, text: Context) -> Tensor:
        height = x.shape[2]
        tokens = self.proj_in(rearrange(self.norm(x), "b c h w -> b (h w) c"))
        for block in self.transformer_blocks:
            tokens = block(tokens, text, height=height, window=self.window)
        return rearrange(self.proj_out(tokens), "b (h w) c -> b c h w", h=height) + x


def _for_frames(x: Tensor, frames: int) -> Tensor:
    """Repeats each of b entries for its frames: (b ...) -> (b·f ...), of one entry as a view."""
    if len(x) == 1:
        return x.expand(frames, *x.shape[1:])
    return x.repeat_interleave(frames, dim=0)


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
        """Returns (b c f h w) for x (b c f h w).

        slicing: how much is computed at a time; with more than one slice x is overwritten.
        """
        if slicing is None or len(slicing.rows(x)) == 1:
            return self._residual(self.norm(x)) + x
        norm = ClipNorm(self.norm, x, slicing)
        for rows in slicing.rows(x):
            rows += self._residual(norm(rows))
        return x

    def _residual(self, x: Tensor) -> Tensor:
        b, _, _, h, w = x.shape
        tokens = self.proj_in(rearrange(x, "b c f h w -> (b h w) c f"))
        tokens = rearrange(tokens, "n c f -> n f c")
        for block in self.transformer_blocks:
            tokens = block(tokens)
        out = self.proj_out(rearrange(tokens, "n f c -> n c f"))
        return rearrange(out, "(b h w) c f -> b c f h w", b=b, h=h, w=w)


def timestep_mlp(dim: int, emb_channels: int, *, make: Factory) -> nn.Sequential:
    """Makes the two linear layers that follow the sinusoidal embedding of the timestep."""
    return nn.Sequential(
        make.linear(dim, emb_channels), nn.SiLU(), make.linear(emb_channels, emb_channels)
    )


def heads_of(channels: int, head_dim: int) -> int:
    """Returns the number of attention heads of width `head_dim`; ValueError for a remainder."""
    if channels % head_dim:
        raise ValueError(f"{channels} channels do not divide into heads of {head_dim}")
    return channels // head_dim
