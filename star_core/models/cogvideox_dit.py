"""STAR on CogVideoX: its transformer with the low-quality video as further channels, and LIEM.

CogVideoX's transformer is of Yang et al. 2024 (arXiv:2408.06072). What STAR adds (specification of
the second backbone, section 1): the patches hold the noisy latents and those of the low-quality
video side by side, and in each block the image tokens pass both LIEM gates between the modulated
norm and the joint attention. Attribute names are the keys of the weights in diffusers' naming.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from ..tiling import Tile, joined
from .attention import Attention, scaled_dot_product
from .cogvideox_weights import PATCH, CogVideoXConfig
from .liem import SpatialLIEM, TemporalLIEM
from .slicing import Slicing
from .unet_blocks import Factory


class CogVideoXDiT(nn.Module):
    """Velocity of noisy latents, given text and the low-quality video.

    operations: torch.nn, or a host's layers. attention: see `models.attention`. device "meta" for a
    network whose weights come from a file.

    How it works may be set, see `working`. slicing: the same result in less memory, where gradients
    are switched off. Latents beyond the trained grid are worked on in tiles of that size, each with
    positions of its own, blended; tile: smaller ones, sizes in latents.
    """

    star_parts = ("patch_embed.proj.", "norm_out.", "proj_out.", "_local.")  # what STAR trains

    def __init__(
        self,
        config: CogVideoXConfig,
        *,
        operations: Any = nn,
        attention: Attention = scaled_dot_product,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.slicing: Slicing | None = None
        self.tile: Tile | None = None
        make = Factory(operations=operations, attention=attention, device=device, dtype=dtype)
        dim, time_dim = config.dim, config.time_dim
        self.patch_embed = PatchEmbedding(config, make)
        self.time_embedding = TimeEmbedding(dim, time_dim, make)
        self.transformer_blocks = nn.ModuleList(
            Block(config, make) for _ in range(config.num_layers)
        )
        self.norm_final = make.layer_norm(dim)
        self.norm_out = LastNorm(dim, time_dim, make)
        self.proj_out = make.linear(dim, PATCH * PATCH * config.in_dim)

    @property
    def blocks(self) -> Iterator[nn.Module]:
        """What gradient checkpointing computes again as a whole."""
        return iter(self.transformer_blocks)

    def check_size(self, height: int, width: int) -> None:
        """Raises ValueError for latents that do not make whole patches."""
        if height % PATCH or width % PATCH:
            raise ValueError(
                f"the network takes latents of even height and width, got {width}x{height}: pad "
                f"the video to multiples of {8 * PATCH} pixels"
            )

    @contextmanager
    def working(
        self,
        *,
        slicing: Slicing | None,
        tile: Tile | None = None,
        attention_window: int | None = None,
    ) -> Iterator[None]:
        """Works in this way for the block, and as before afterwards.

        ValueError for an attention window, which this network does not have.
        """
        if attention_window is not None:
            raise ValueError("this model has no attention windows: leave out the attention window")
        before = self.slicing, self.tile
        try:
            self.slicing, self.tile = slicing, tile
            yield
        finally:
            self.slicing, self.tile = before

    def forward(
        self, x: Tensor, t: Tensor, y: Tensor, hint: Tensor | None = None, *, deep: None = None
    ) -> Tensor:
        """Noisy latents x and those of the low-quality video (b c f h w) -> v (b c f h w).

        t: timesteps (b,). y: text embedding (b l d), l = 226 for the published model.
        ValueError for latents of an odd size, without a low-quality video, and for features to be
        used again, which this network does not keep.
        """
        if hint is None:
            raise ValueError("this model restores: give it the latents of a low-quality video")
        if deep is not None:
            raise ValueError("this model keeps no features: leave out their reuse")
        h, w = x.shape[-2:]
        self.check_size(h, w)
        rows, columns = self.config.tiles((h, w), self.tile)
        if len(rows) == len(columns) == 1:
            return self._velocity(x, t, y, hint)
        return joined(
            lambda rows, columns: self._velocity(
                x[..., rows, columns], t, y, hint[..., rows, columns]
            ),
            rows,
            columns,
        )

    def _velocity(self, x: Tensor, t: Tensor, y: Tensor, hint: Tensor) -> Tensor:
        f, h, w = x.shape[2:]
        grid = (f, h // PATCH, w // PATCH)
        emb = self.time_embedding(timestep_embedding(t, self.config.dim).to(x.dtype))
        text, image = self.patch_embed(y, torch.cat([x, hint], dim=1))
        rotary = None
        if self.config.positions == "rotary":
            rotary = rotary_table(self.config, grid, x.device)
        else:
            image = image + sincos_table(self.config, grid, x.device).to(image)
        for block in self.transformer_blocks:
            image, text = block(image, text, emb, grid, rotary, self.slicing)
        image = self.proj_out(self.norm_out(self.norm_final(image), emb))
        return rearrange(
            image,
            "b (f h w) (c p q) -> b c f (h p) (w q)",
            f=f,
            h=grid[1],
            w=grid[2],
            p=PATCH,
            q=PATCH,
        )


class PatchEmbedding(nn.Module):
    """Tokens of text and of patches of latents."""

    def __init__(self, config: CogVideoXConfig, make: Factory) -> None:
        super().__init__()
        self.proj = make.conv2d(2 * config.in_dim, config.dim, PATCH, stride=PATCH)
        self.text_proj = make.linear(config.context_dim, config.dim)

    def forward(self, text: Tensor, latents: Tensor) -> tuple[Tensor, Tensor]:
        """(b l c), (b c f h w) -> (b l d), (b f·h/2·w/2 d)."""
        patches = self.proj(rearrange(latents, "b c f h w -> (b f) c h w"))
        image = rearrange(patches, "(b f) d h w -> b (f h w) d", b=len(latents))
        return self.text_proj(text), image


class TimeEmbedding(nn.Module):
    """(b d) -> (b time_dim)."""

    def __init__(self, dim: int, time_dim: int, make: Factory) -> None:
        super().__init__()
        self.linear_1 = make.linear(dim, time_dim)
        self.linear_2 = make.linear(time_dim, time_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


class ModulatedNorm(nn.Module):
    """A layer norm of image and text tokens, each moved and scaled as the timestep says."""

    def __init__(self, dim: int, time_dim: int, make: Factory) -> None:
        super().__init__()
        self.linear = make.linear(time_dim, 6 * dim)
        self.norm = make.layer_norm(dim)

    def forward(self, image: Tensor, text: Tensor, emb: Tensor) -> tuple[Tensor, ...]:
        """Image and text tokens, and the gates (b 1 d) of what will be added to either."""
        modulation = self.linear(F.silu(emb))[:, None].chunk(6, dim=-1)
        shift, scale, gate, text_shift, text_scale, text_gate = modulation
        image = self.norm(image) * (1 + scale) + shift
        text = self.norm(text) * (1 + text_scale) + text_shift
        return image, text, gate, text_gate


class LastNorm(nn.Module):
    """A layer norm of image tokens, moved and scaled as the timestep says."""

    def __init__(self, dim: int, time_dim: int, make: Factory) -> None:
        super().__init__()
        self.linear = make.linear(time_dim, 2 * dim)
        self.norm = make.layer_norm(dim, eps=1e-6)

    def forward(self, image: Tensor, emb: Tensor) -> Tensor:
        shift, scale = self.linear(F.silu(emb))[:, None].chunk(2, dim=-1)
        return self.norm(image) * (1 + scale) + shift


class FeedForward(nn.Module):
    def __init__(self, dim: int, make: Factory) -> None:
        super().__init__()
        # Numbers and names as in the files; what has no weights leaves its number out.
        self.net = nn.ModuleDict(
            {
                "0": nn.ModuleDict({"proj": make.linear(dim, 4 * dim)}),
                "2": make.linear(4 * dim, dim),
            }
        )

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.net["0"], self.net["2"]
        assert isinstance(first, nn.ModuleDict)
        return second(F.gelu(first["proj"](x), approximate="tanh"))


class Block(nn.Module):
    """CogVideoX's block with LIEM between the first norm and attention, on image tokens only."""

    def __init__(self, config: CogVideoXConfig, make: Factory) -> None:
        super().__init__()
        self.norm1 = ModulatedNorm(config.dim, config.time_dim, make)
        self.attn1 = JointAttention(config.dim, config.num_heads, make)
        self.norm2 = ModulatedNorm(config.dim, config.time_dim, make)
        self.ff = FeedForward(config.dim, make)
        self.spa_local = SpatialLIEM(operations=make.operations, **make.where)
        self.temp_local = TemporalLIEM(operations=make.operations, **make.where)

    def forward(
        self,
        image: Tensor,
        text: Tensor,
        emb: Tensor,
        grid: tuple[int, int, int],
        rotary: tuple[Tensor, Tensor] | None = None,
        slicing: Slicing | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Image tokens (b f·h·w d), of a grid (f, h, w), and text tokens (b l d) -> the same."""
        a_image, a_text, gate, text_gate = self.norm1(image, text, emb)
        a_image = self.temp_local(self.locally_gated(a_image, grid))
        a_image, a_text = self.attn1(a_image, a_text, rotary)
        image, text = image + gate * a_image, text + text_gate * a_text
        del a_image, a_text
        m_image, m_text, gate, text_gate = self.norm2(image, text, emb)
        if slicing is None or torch.is_grad_enabled():
            m_image = self.ff(m_image)
        else:  # inside it is four times as wide
            parts = m_image.split(slicing.spatial_pixels, dim=1)
            m_image = torch.cat([self.ff(part) for part in parts], dim=1)
        return image + gate * m_image, text + text_gate * self.ff(m_text)

    def locally_gated(self, tokens: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """The spatial gate, frame by frame."""
        f, h, w = grid
        maps = rearrange(tokens, "b (f h w) d -> (b f) d h w", f=f, h=h, w=w)
        return rearrange(self.spa_local(maps), "(b f) d h w -> b (f h w) d", f=f)


class JointAttention(nn.Module):
    """Of text and image tokens together."""

    def __init__(self, dim: int, heads: int, make: Factory) -> None:
        super().__init__()
        self.heads, self.attention = heads, make.attention
        self.norm_q = make.layer_norm(dim // heads, eps=1e-6)
        self.norm_k = make.layer_norm(dim // heads, eps=1e-6)
        self.to_q = make.linear(dim, dim)
        self.to_k = make.linear(dim, dim)
        self.to_v = make.linear(dim, dim)
        self.to_out = nn.ModuleList([make.linear(dim, dim)])

    def forward(
        self, image: Tensor, text: Tensor, rotary: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        """Image and text tokens -> the same. rotary: see `rotary_table`, for image tokens."""
        length = text.shape[1]
        tokens = torch.cat([text, image], dim=1)

        def positioned(x: Tensor, norm: nn.Module) -> Tensor:
            x = norm(rearrange(x, "b n (h d) -> b h n d", h=self.heads))
            if rotary is not None:
                x = torch.cat([x[:, :, :length], turned(x[:, :, length:], rotary)], dim=2)
            return rearrange(x, "b h n d -> b n (h d)")

        q, k = (
            positioned(self.to_q(tokens), self.norm_q),
            positioned(self.to_k(tokens), self.norm_k),
        )
        out = self.to_out[0](self.attention(q, k, self.to_v(tokens), self.heads))
        return out[:, length:], out[:, :length]


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """Timesteps (b,) -> (b dim), cosines first, to the last bit as the network was trained."""
    half = dim // 2
    steps = torch.arange(half, dtype=torch.float32, device=t.device)
    angles = t[:, None].float() * torch.exp(-math.log(10000) * steps / half)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def turned(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Pairs of channels of x (b h n d), turned by the angles of `rotary_table`, in float32.

    RoPE: Su et al. 2021, arXiv:2104.09864.
    """
    cos, sin = rotary
    real, imaginary = rearrange(x, "... (d two) -> ... d two", two=2).unbind(-1)
    across = torch.stack([-imaginary, real], dim=-1).flatten(-2)
    return (x.float() * cos + across.float() * sin).to(x.dtype)


def rotary_table(
    config: CogVideoXConfig, grid: tuple[int, int, int], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Cosines and sines (f·h·w d) for a grid (f, h, w); positions are integers.

    A quarter of the channels tell the frame, three eighths each the row and the column. A grid
    larger than the trained one is squeezed onto it, as diffusers does.
    """
    d = config.dim // config.num_heads
    angles = []
    for axis, (size, most) in enumerate(zip(grid, (grid[0], *config.grid), strict=True)):
        channels = d // 8 * 3 if axis else d // 4
        end = min(size, most) * (size - 1) / size
        positions = torch.linspace(0, end, size, dtype=torch.float32, device=device)
        exponents = torch.arange(0, channels, 2, dtype=torch.float32, device=device) / channels
        by_axis = torch.outer(positions, 1.0 / 10000.0**exponents).repeat_interleave(2, dim=1)
        shape = [size if i == axis else 1 for i in range(3)]
        angles.append(by_axis.reshape(*shape, channels).expand(*grid, channels))
    table = torch.cat(angles, dim=-1).flatten(0, 2)
    return table.cos(), table.sin()


def sincos_table(
    config: CogVideoXConfig, grid: tuple[int, int, int], device: torch.device
) -> Tensor:
    """Positions (1 f·h·w d) that are added to image tokens of a grid (f, h, w).

    A quarter of the channels tell the frame, three eighths each the column and the row.
    """
    f, h, w = grid

    def waves(size: int, channels: int, scale: float) -> Tensor:
        # float64 is not on every device.
        exponents = torch.arange(channels // 2, dtype=torch.float64) / (channels / 2.0)
        positions = torch.arange(size, dtype=torch.float32) / scale
        angles = torch.outer(positions.double(), 1.0 / 10000**exponents)
        return torch.cat([angles.sin(), angles.cos()], dim=1).to(device, torch.float32)

    side = config.dim * 3 // 8
    parts = [
        repeat(waves(f, config.dim // 4, 1.0), "f d -> f h w d", h=h, w=w),
        repeat(waves(w, side, 1.875), "w d -> f h w d", f=f, h=h),
        repeat(waves(h, side, 1.875), "h d -> f h w d", f=f, w=w),
    ]
    return rearrange(torch.cat(parts, dim=-1), "f h w d -> 1 (f h w) d")
