"""STAR's network on I2VGen-XL: a video UNet with a ControlNet (specification, section 2)."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from ..devices import fetch, send
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
    BasicTransformerBlock,
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
    """Returns the velocity of E[x_0 | x_t, hint] and its standard deviation, (b 1 1 1 1).

    If x_0 is the hint plus Gaussian error of standard deviation s, and x_t = α x_0 + σ ε, then
    E[x_0 | x_t, hint] has the velocity σ (α (1 - s²) x_t - hint) / (s² α² + σ²), and the true
    velocity differs from it with standard deviation s / √(s² α² + σ²). A network that predicts this
    difference starts from copying the hint, which makes a small one trainable in hours.

    x: x_t (b c f h w). t: timesteps (b,). hint: (b c f h w), None for 0. spread: s.
    """
    schedule = star_schedule()
    alpha, sigma = (send(each(t), x.device, x.dtype) for each in (schedule.alpha, schedule.sigma))
    variance = spread**2 * alpha**2 + sigma**2
    scaled = alpha * (1 - spread**2) * x
    velocity = sigma * (scaled if hint is None else scaled - hint) / variance
    return velocity, spread / torch.sqrt(variance)


def hint_prior_guess(x: Tensor, t: Tensor, hint: Tensor | None, spread: float) -> Tensor:
    """Returns E[x_0 | x_t, hint] (b c f h w), the hint at high noise and x_t without noise.

    x: x_t (b c f h w). t: timesteps (b,). hint: (b c f h w), None for 0. spread: standard deviation
    of x_0 around the hint, see `hint_prior_velocity`.
    """
    schedule = star_schedule()
    alpha, sigma = (send(each(t), x.device, x.dtype) for each in (schedule.alpha, schedule.sigma))
    weighted = spread**2 * alpha * x
    weighted = weighted if hint is None else weighted + sigma**2 * hint
    return weighted / (spread**2 * alpha**2 + sigma**2)


def _add_control(h: Tensor, last: nn.Module, control: Tensor, slicing: Slicing | None) -> Tensor:
    """Runs a control's last convolution and adds it to a skip."""
    return over_frames(lambda h, control: h + last(control), slicing, h, control)


class ControlledVideoUNet(nn.Module):
    """UNet and ControlNet in one module, as in the published files.

    operations: torch.nn, or a host's namespace with Linear, Conv1d to Conv3d, GroupNorm and
    LayerNorm. attention: see `models.attention`. device: "meta" for a network whose weights come
    from a file.

    Three attributes, set by `working`, reduce memory or work. slicing: the same result in slices,
    only without gradients. tile: overlapping tiles, in latents, so that memory does not depend on
    the size of the frame. attention_window: side, in latents, of the windows that limit spatial
    attention at the finest level.
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
        """The modules that gradient checkpointing recomputes as units."""
        kinds = ResBlock, SpatialTransformer, TemporalTransformer
        return (module for module in self.modules() if isinstance(module, kinds))

    def compile_blocks(self) -> None:
        """Lets torch compile transformer blocks and the spatial half of residual blocks.

        Layers of one shape share their code. It is compiled when it first runs.
        """
        for module in self.modules():
            if isinstance(module, BasicTransformerBlock):
                module.compile(dynamic=True)
            elif isinstance(module, ResBlock):
                module._spatial = torch.compile(module._spatial, dynamic=True)

    def check_size(self, height: int, width: int) -> None:
        """Raises ValueError for latents whose skips would not fit (specification, 2.6)."""
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
        """Sets the three attributes within a `with` block and restores them afterwards.

        slicing: how much each layer computes at a time, None for everything. tile: in latents, None
        for the whole frame. attention_window: side in latents, None for the whole frame.
        """
        before = self.slicing, self.tile, self.attention_window
        try:
            self.slicing, self.tile, self.attention_window = slicing, tile, attention_window
            yield
        finally:
            self.slicing, self.tile, self.attention_window = before

    @property
    def attention_window(self) -> int | None:
        """Side, in latents, of the finest spatial attention's windows; None for whole frames."""
        return self._attention_window

    @attention_window.setter
    def attention_window(self, side: int | None) -> None:
        self._attention_window = side
        levels = len(self.config.dim_mult)
        level = next((i for i in range(levels) if self.config.attention_at(i)), 0)
        tokens = side and max(1, round(side / 2**level))
        blocks = self.config.num_res_blocks + 1  # blocks of a level in encoder or decoder
        down, up = 1 + level * blocks, (levels - 1 - level) * blocks
        for half, start in (
            (self.input_blocks, down),
            (self.VideoControlNet.input_blocks, down),
            (self.output_blocks, up),
        ):
            layers = [layer for block in half[start : start + blocks] for layer in block.modules()]
            finest = [layer for layer in layers if isinstance(layer, SpatialTransformer)]
            for index, layer in enumerate(finest):
                # Every other layer is shifted, to hide the borders of the windows.
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
        """Returns the velocity (b c f h w) of noisy latents.

        x: noisy latents (b c f h w). t: timesteps (b,), 0 to 999; on the CPU, reading them
        makes no device wait. y: text embedding (b l d).
        hint: latents of the low-quality video (b c f h w). deep: features of calls for the same
        clip and prompt at earlier timesteps, reused and updated here.
        Raises ValueError for latents of a size that the network cannot take, see `check_size`.
        """
        height, width = x.shape[-2:]
        self.check_size(height, width)
        rows, columns = self.config.tiles((height, width), self.tile)
        if len(rows) == len(columns) == 1:
            return self._velocity(x, t, y, hint, deep)

        def velocity(rows: slice, columns: slice) -> Tensor:
            hint_tile = None if hint is None else hint[..., rows, columns]
            place = rows.start, rows.stop, columns.start, columns.stop
            return self._velocity(x[..., rows, columns], t, y, hint_tile, deep, place)

        return blend_tiles(velocity, rows, columns)

    def control_features(
        self, x: Tensor, t: Tensor, y: Tensor, hint: Tensor | None = None
    ) -> list[Tensor]:
        """Returns the ControlNet's last features (b·f c h w) of each level, the finest first.

        Those of the coarsest level come from the middle block. Arguments are as in `forward`.
        """
        self.check_size(*x.shape[-2:])
        features: dict[torch.Size, Tensor] = {}
        for _, each in self.VideoControlNet.controls(self._shown(x, t, hint), t, y, hint):
            features[each.shape[-2:]] = each
        return list(features.values())

    def _shown(self, x: Tensor, t: Tensor, hint: Tensor | None) -> Tensor:
        """Returns what both encoders get of noisy latents."""
        if not self.config.guess_input:
            return x
        return hint_prior_guess(x, t, hint, self.config.hint_prior)

    def _velocity(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor,
        hint: Tensor | None,
        deep: DeepFeatures | BatchedFeatures | None,
        place: tuple[int, ...] = (),
    ) -> Tensor:
        x_t, x = x, self._shown(x, t, hint)
        frames = x.shape[2]
        emb = self.time_embed(sinusoidal_embedding(send(t, x.device), self.config.dim).to(x.dtype))
        emb = emb.repeat_interleave(frames, dim=0)
        # Slices overwrite tensors that gradients would need.
        slicing = None if torch.is_grad_enabled() else self.slicing
        conditioning = (emb, y, frames, slicing)
        # Both encoders run in lockstep, so that only one control exists at a time.
        controls = self.VideoControlNet.controls(x, t, y, hint, slicing)
        channels = [first_convolution(self.input_blocks, x, slicing)]
        outputs = encode(self.input_blocks, channels, *conditioning)
        finest = self.config.num_res_blocks + 1  # blocks of the finest level in either half
        cached = deep and deep.recall(place, t)
        skips = []

        def offloaded(x: Tensor) -> Tensor:
            return slicing.offloaded(x) if slicing else x

        for _ in outputs if cached is None else islice(outputs, finest):
            skips.append(offloaded(_add_control(channels[0], *next(controls), slicing)))
        blocks = [list(block.children()) for block in self.output_blocks]
        ascent = [blocks[-finest - 1].pop()] if len(blocks) > finest else []

        arriving: list[Callable[[], Tensor]] = []

        def fetch_skip() -> None:
            if skips:
                arriving.append(fetch(skips.pop(), x.device))

        def decode(blocks: list[list[nn.Module]]) -> None:
            for first, *rest in blocks:
                channels.append(arriving.pop()())
                channels.append(run_block([first], channels, *conditioning))
                fetch_skip()  # the residual block has freed the one before
                channels.append(run_block(rest, channels, *conditioning))

        if cached is None:
            h = run_block(self.middle_block, channels, *conditioning)
            channels.append(_add_control(h, *next(controls), slicing))
            del h
            fetch_skip()
            decode(blocks[:-finest])
            if deep:
                deep.keep(place, t, offloaded(channels[0]))
        else:
            channels[:] = [send(cached, x.device)]
            fetch_skip()
        del controls
        channels.append(run_block(ascent, channels, *conditioning))
        decode(blocks[-finest:])
        v = over_frames(self.out, slicing, channels.pop())
        v = rearrange(v, "(b f) c h w -> b c f h w", f=frames)
        if self.config.hint_prior:
            prior, uncertainty = hint_prior_velocity(x_t, t, hint, self.config.hint_prior)
            v = prior + uncertainty * v
        return v
