"""The encoder, the down-sampling half of both UNet and ControlNet (specification, 2.2)."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

from einops import rearrange
from torch import Tensor, nn

from ..windows.tiling import Tile
from .slicing import Slicing, over_frames
from .unet_blocks import (
    Downsample,
    Factory,
    ResBlock,
    SpatialTransformer,
    TemporalTransformer,
    Upsample,
    heads_of,
)


@dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """Geometry of the network; the defaults are those of I2VGen-XL.

    in_dim, out_dim: channels of latents and velocity. dim, dim_mult: channels of the finest level,
    and the factor for each level. context_dim: width of the text embedding.
    num_heads: heads of the first block's temporal transformer only; all others have
    channels // head_dim. attn_scales: resolutions, relative to the latents, with attention.
    norm_groups: groups of every group norm.
    hint_prior: spread of the prior in `unet.hint_prior_velocity`; 0, as in STAR, for no prior.
    guess_input: both encoders get `unet.hint_prior_guess` of x_0 in place of x_t, which contains
    almost no information where it is nearly pure noise.
    """

    backbone: ClassVar = "i2vgenxl"
    schedule: ClassVar[Literal["cosine"]] = "cosine"

    in_dim: int = 4
    out_dim: int = 4
    dim: int = 320
    context_dim: int = 1024
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_heads: int = 8
    head_dim: int = 64
    num_res_blocks: int = 2
    attn_scales: tuple[float, ...] = (1.0, 0.5, 0.25)
    dropout: float = 0.1
    norm_groups: int = 32
    hint_prior: float = 0.0
    guess_input: bool = False

    def __post_init__(self) -> None:
        for name in ("dim_mult", "attn_scales"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.dim % self.norm_groups:
            raise ValueError(f"dim {self.dim} must be a multiple of norm_groups {self.norm_groups}")
        if self.hint_prior and self.in_dim != self.out_dim:
            raise ValueError("hint_prior needs as many output as input channels")
        if self.guess_input and not self.hint_prior:
            raise ValueError("guess_input needs hint_prior above 0")

    @property
    def context_length(self) -> int:
        """Number of tokens in a prompt, as in CLIP."""
        return 77

    @property
    def downsamplings(self) -> int:
        """Number of times the network halves the latents."""
        return len(self.dim_mult) - 1

    @property
    def emb_channels(self) -> int:
        """Width of the timestep embedding."""
        return 4 * self.dim

    def tiles(self, sides: tuple[int, int], tile: Tile | None) -> tuple[list[range], list[range]]:
        """Returns the rows and the columns of the tiles that latents are computed in.

        sides: (height, width) of the latents. tile: in latents, None for one tile of all.
        """
        height, width = sides
        if tile is None:
            return [range(height)], [range(width)]
        step = 2**self.downsamplings
        return tile.on_grid(height, step=step, rest=2), tile.on_grid(width, step=step)

    def attention_tokens(self, frames: int, height: int, width: int) -> int:
        """Returns the tokens of the longest attention over latents of a size, or over a tile."""
        return round(height * width * max(self.attn_scales, default=0) ** 2)

    def attention_at(self, level: int) -> bool:
        """Returns whether a level has attention; 0 is the finest."""
        return 0.5**level in self.attn_scales


def transformers(channels: int, config: UNetConfig, make: Factory) -> list[nn.Module]:
    """Makes a spatial and a temporal transformer, each with its LIEM, for `channels` channels."""
    heads = heads_of(channels, config.head_dim)
    spatial = SpatialTransformer(
        channels, heads, config.head_dim, context_dim=config.context_dim, make=make
    )
    return [spatial, TemporalTransformer(channels, heads, config.head_dim, make=make)]


def res_block(channels: int, out_channels: int, config: UNetConfig, make: Factory) -> ResBlock:
    """Makes a residual block with the sizes of `config`."""
    return ResBlock(channels, out_channels, config.emb_channels, dropout=config.dropout, make=make)


def input_blocks(config: UNetConfig, make: Factory) -> tuple[nn.ModuleList, list[int]]:
    """Makes the encoder's blocks; returns them and the output channels of each."""
    first = [
        make.conv2d(config.in_dim, config.dim, 3, padding=1),
        TemporalTransformer(config.dim, config.num_heads, config.head_dim, make=make),
    ]
    blocks: list[nn.Module] = [nn.ModuleList(first)]
    outputs = [config.dim]
    for level, mult in enumerate(config.dim_mult):
        for _ in range(config.num_res_blocks):
            channels = config.dim * mult
            block: list[nn.Module] = [res_block(outputs[-1], channels, config, make)]
            if config.attention_at(level):
                block += transformers(channels, config, make)
            blocks.append(nn.ModuleList(block))
            outputs.append(channels)
        if level < config.downsamplings:
            blocks.append(Downsample(outputs[-1], make=make))
            outputs.append(outputs[-1])
    return nn.ModuleList(blocks), outputs


def middle_block(config: UNetConfig, make: Factory) -> nn.ModuleList:
    """Makes the block at the coarsest level, between encoder and decoder."""
    channels = config.dim * config.dim_mult[-1]
    blocks = [res_block(channels, channels, config, make) for _ in range(2)]
    return nn.ModuleList([blocks[0], *transformers(channels, config, make), blocks[1]])


def run_block(
    block: nn.Module | list[nn.Module],
    channels: list[Tensor],
    emb: Tensor,
    context: Tensor,
    frames: int,
    slicing: Slicing | None = None,
) -> Tensor:
    """Runs one block, a layer or a list of layers, on x and returns the result (b·f c h w).

    channels: a list with x (b·f c h w), or with tensors whose channels together are x. They are
    removed from the list, so that they are freed as soon as they are read unless the caller keeps a
    reference.
    emb: timestep embedding (b·f d). context: text embedding (b l d). frames: f.
    slicing: how much a layer computes at a time, None for everything.
    """
    for layer in block if isinstance(block, (nn.ModuleList, list)) else [block]:
        if isinstance(layer, ResBlock):
            x = layer(channels, emb, frames, slicing)
            channels.clear()  # where hooks, as FSDP's, have given the layer a list of its own
        elif isinstance(layer, SpatialTransformer):
            x = layer(channels.pop(), context, slicing)
        elif isinstance(layer, TemporalTransformer):
            clip = rearrange(channels.pop(), "(b f) c h w -> b c f h w", f=frames)
            x = rearrange(layer(clip, slicing), "b c f h w -> (b f) c h w")
            del clip
        else:
            assert isinstance(layer, (Downsample, Upsample, nn.Conv2d)), type(layer)
            x = over_frames(layer, slicing, channels.pop())
        channels.append(x)
        del x
    return channels.pop()


def first_convolution(
    blocks: nn.ModuleList,
    x: Tensor,
    slicing: Slicing | None = None,
    hint_block: nn.Module | None = None,
    hint: Tensor | None = None,
) -> Tensor:
    """Runs the encoder's first convolution: x (b c f h w) -> (b·f c h w).

    blocks: the encoder's. hint_block, hint: a convolution of the hint (b c f h w) that is added to
    the result; None for none. slicing: how much is computed at a time, None for everything.
    """
    first = blocks[0]
    assert isinstance(first, nn.ModuleList)
    x = rearrange(x, "b c f h w -> (b f) c h w")
    if hint_block is None or hint is None:
        return over_frames(first[0], slicing, x)
    hint = rearrange(hint, "b c f h w -> (b f) c h w")
    return over_frames(lambda x, hint: first[0](x) + hint_block(hint), slicing, x, hint)


def encode(
    blocks: nn.ModuleList,
    channels: list[Tensor],
    emb: Tensor,
    context: Tensor,
    frames: int,
    slicing: Slicing | None = None,
) -> Iterator[None]:
    """Runs the encoder's blocks; yields after each, with its output in `channels`.

    channels: a list with the output of `first_convolution`. The caller should keep no other
    reference to its tensors, so that they can be freed.
    emb: timestep embedding (b·f d). context: text embedding (b l d). frames: f.
    slicing: how much a layer computes at a time, None for everything.
    """
    first = blocks[0]
    assert isinstance(first, nn.ModuleList)
    for block in (list(first)[1:], *list(blocks)[1:]):
        channels.append(run_block(block, channels, emb, context, frames, slicing))
        yield
