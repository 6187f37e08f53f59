"""STAR's network on I2VGen-XL: a video UNet steered by a ControlNet (specification, section 2)."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from ..diffusion.schedule import star_schedule
from ..diffusion.shortcuts import BatchedFeatures, DeepFeatures
from ..windows.tiling import Tile, blend_tiles
from .attention import Attention, AttentionWindow, scaled_dot_product
from .controlnet import VideoControlNet
from .encoder import (
    UNetConfig,
    encode,
    first_convolution,
    input_blocks,
    middle_block,
    res_block,
    run_block,
    transformers,
)
from .slicing import Slicing, over_frames
from .unet_blocks import (
    Factory,
    ResBlock,
    SpatialTransformer,
    TemporalTransformer,
    Upsample,
    sinusoidal_embedding,
    timestep_mlp,
)

__all__ = ["ControlledVideoUNet", "UNetConfig"]


def hint_prior_velocity(
    x: Tensor, t: Tensor, hint: Tensor | None, spread: float
) -> tuple[Tensor, Tensor]:
    """Velocity of the best guess of x_0 that knows only x_t and the hint, and its uncertainty.

    If x_0 is the hint plus Gaussian error of standard deviation `spread`, and x_t = α x_0 + σ ε,
    then E[x_0 | x_t, hint] has the velocity σ (α (1 - s²) x_t - hint) / (s² α² + σ²), and the true
    velocity differs from it with standard deviation s / √(s² α² + σ²). A network that predicts that
    difference starts from copying the hint, which makes a small one trainable in hours.
    """
    schedule = star_schedule()
    alpha, sigma = (schedule.alpha(t).to(x), schedule.sigma(t).to(x))
    variance = spread**2 * alpha**2 + sigma**2
    known = alpha * (1 - spread**2) * x
    velocity = sigma * (known if hint is None else known - hint) / variance
    return velocity, spread / torch.sqrt(variance)


def hint_prior_guess(x: Tensor, t: Tensor, hint: Tensor | None, spread: float) -> Tensor:
    """E[x_0 | x_t, hint] of `hint_prior_velocity`: the hint at high noise, x_t at none."""
    schedule = star_schedule()
    alpha, sigma = (schedule.alpha(t).to(x), schedule.sigma(t).to(x))
    known = spread**2 * alpha * x
    known = known if hint is None else known + sigma**2 * hint
    return known / (spread**2 * alpha**2 + sigma**2)


def added(h: Tensor, last: nn.Module, control: Tensor, slicing: Slicing | None) -> Tensor:
    """A control, after its last convolution, on its skip."""
    return over_frames(lambda h, control: h + last(control), slicing, h, control)


class ControlledVideoUNet(nn.Module):
    """UNet and ControlNet in one module, as in the published files.

    operations: namespace of Linear, Conv1d to Conv3d, GroupNorm and LayerNorm; a host hands in its
    own. attention: see `attention.scaled_dot_product`.

    How it works may be set, see `working`. slicing: the same result in less memory, where gradients
    are switched off. tile: overlapping tiles of the latents, sizes in latents, so that memory does
    not depend on their size. attention_window: side in latents of the windows within which the
    finest attention in space stays.
    """

    star_parts = ("VideoControlNet.", ".local1.", ".local2.")  # what STAR trains

    def __init__(
        self,
        config: UNetConfig,
        *,
        operations: Any = nn,
        attention: Attention = scaled_dot_product,
        device=None,
        dtype=None,
    ):
        super().__init__()
        make = Factory(
            operations=operations,
            attention=attention,
            device=device,
            dtype=dtype,
            norm_groups=config.norm_groups,
        )
        self.config = config
        self.slicing: Slicing | None = None
        self.tile: Tile | None = None
        self.time_embed = timestep_mlp(config.dim, config.emb_channels, make=make)
        self.input_blocks, skips = input_blocks(config, make)
        self.middle_block = middle_block(config, make)
        self.output_blocks = nn.ModuleList()
        channels = skips[-1]
        for level, mult in reversed(list(enumerate(config.dim_mult))):
            for index in range(config.num_res_blocks + 1):
                block: list[nn.Module] = [
                    res_block(channels + skips.pop(), config.dim * mult, config, make)
                ]
                channels = config.dim * mult
                if config.attention_at(level):
                    block += transformers(channels, config, make)
                if level > 0 and index == config.num_res_blocks:
                    block.append(Upsample(channels, make=make))
                self.output_blocks.append(nn.ModuleList(block))
        self.out = nn.Sequential(
            make.group_norm(channels),
            nn.SiLU(),
            make.conv2d(channels, config.out_dim, 3, padding=1),
        )
        self.VideoControlNet = VideoControlNet(config, make=make)
        self.attention_window = None

    @property
    def blocks(self) -> Iterator[nn.Module]:
        """What gradient checkpointing computes again as a whole."""
        kinds = ResBlock, SpatialTransformer, TemporalTransformer
        return (module for module in self.modules() if isinstance(module, kinds))

    def check_size(self, height: int, width: int) -> None:
        """Raises ValueError for latents that the skips cannot meet (specification, 2.6)."""
        step = 2**self.config.downsamplings
        if height < 2 or width < 1 or (height - 2) % step or width % step:
            raise ValueError(
                f"latents of {height}x{width} do not fit this network: the height must be 2 plus a "
                f"multiple of {step}, the width a multiple of {step}; pad the video first"
            )

    @contextmanager
    def working(
        self,
        *,
        slicing: Slicing | None,
        tile: Tile | None = None,
        attention_window: int | None = None,
    ) -> Iterator[None]:
        """Works in this way for the block, and as before afterwards."""
        before = self.slicing, self.tile, self.attention_window
        try:
            self.slicing, self.tile, self.attention_window = slicing, tile, attention_window
            yield
        finally:
            self.slicing, self.tile, self.attention_window = before

    @property
    def attention_window(self) -> int | None:
        return self._attention_window

    @attention_window.setter
    def attention_window(self, side: int | None) -> None:
        self._attention_window = side
        levels = len(self.config.dim_mult)
        level = next((i for i in range(levels) if self.config.attention_at(i)), 0)
        tokens = side and max(1, round(side / 2**level))
        blocks = self.config.num_res_blocks + 1  # of a level, in either half
        down, up = 1 + level * blocks, (levels - 1 - level) * blocks
        for half, start in (
            (self.input_blocks, down),
            (self.VideoControlNet.input_blocks, down),
            (self.output_blocks, up),
        ):
            inside = [layer for block in half[start : start + blocks] for layer in block.modules()]
            finest = [layer for layer in inside if isinstance(layer, SpatialTransformer)]
            for index, layer in enumerate(finest):
                # Layers take turns, so that no border of a window lasts.
                window = tokens and AttentionWindow(size=tokens, shifted=index % 2 == 1)
                layer.window = window or None

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor,
        hint: Tensor | None = None,
        *,
        deep: DeepFeatures | BatchedFeatures | None = None,
    ) -> Tensor:
        """Velocity of x.

        x: noisy latents (b c f h w). t: timesteps (b,), 0 to 999. y: text embedding (b l d).
        hint: latents of the low-quality video (b c f h w). deep: of calls for the same clip and
        prompt at earlier timesteps. Returns (b c f h w).
        """
        height, width = x.shape[-2:]
        self.check_size(height, width)
        rows, columns = self.config.tiles((height, width), self.tile)
        if len(rows) == len(columns) == 1:
            return self._velocity(x, t, y, hint, deep)

        def velocity(rows: slice, columns: slice) -> Tensor:
            part = None if hint is None else hint[..., rows, columns]
            place = rows.start, rows.stop, columns.start, columns.stop
            return self._velocity(x[..., rows, columns], t, y, part, deep, place)

        return blend_tiles(velocity, rows, columns)

    def _velocity(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor,
        hint: Tensor | None,
        deep: DeepFeatures | BatchedFeatures | None,
        place: tuple[int, ...] = (),
    ) -> Tensor:
        x_t = x
        if self.config.guess_input:
            x = hint_prior_guess(x, t, hint, self.config.hint_prior)
        frames = x.shape[2]
        emb = self.time_embed(sinusoidal_embedding(t, self.config.dim).to(x.dtype))
        emb, context = (e.repeat_interleave(frames, dim=0) for e in (emb, y))
        # Slices are written in place, which gradients do not survive.
        slicing = None if torch.is_grad_enabled() else self.slicing
        about = (emb, context, frames, slicing)
        # In step, so that each control is added to its skip at once.
        controls = self.VideoControlNet.controls(x, t, y, hint, slicing)
        channels = [first_convolution(self.input_blocks, x, slicing)]
        outputs = encode(self.input_blocks, channels, *about)
        finest = self.config.num_res_blocks + 1  # blocks of the finest level in either half
        known = deep and deep.recall(place, t)
        skips = []

        def kept(x: Tensor) -> Tensor:
            return slicing.waiting(x) if slicing else x

        for _ in outputs if known is None else islice(outputs, finest):
            skips.append(kept(added(channels[0], *next(controls), slicing)))
        blocks = [list(block.children()) for block in self.output_blocks]
        ascent = [blocks[-finest - 1].pop()] if len(blocks) > finest else []

        def decode(blocks: list[list[nn.Module]]) -> None:
            for block in blocks:
                channels.append(skips.pop().to(x.device, non_blocking=x.is_cuda))
                channels.append(run_block(block, channels, *about))

        if known is None:
            h = run_block(self.middle_block, channels, *about)
            channels.append(added(h, *next(controls), slicing))
            del h
            decode(blocks[:-finest])
            if deep:
                deep.keep(place, t, kept(channels[0]))
        else:
            channels[:] = [known.to(x.device, non_blocking=x.is_cuda)]
        del controls
        channels.append(run_block(ascent, channels, *about))
        decode(blocks[-finest:])
        v = over_frames(self.out, slicing, channels.pop())
        v = rearrange(v, "(b f) c h w -> b c f h w", f=frames)
        if self.config.hint_prior:
            prior, uncertainty = hint_prior_velocity(x_t, t, hint, self.config.hint_prior)
            v = prior + uncertainty * v
        return v
