"""STAR on CogVideoX: its transformer with the low-quality video as additional channels, and LIEM.

Built from parts of diffusers' `CogVideoXTransformer3DModel` (Yang et al. 2024, arXiv:2408.06072),
with the same weight names. STAR's additions (specification of the second backbone, section 1): the
patches contain the noisy latents and those of the low-quality video, and in each block the image
tokens pass both LIEM gates between the modulated norm and the joint attention.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.models.embeddings import (
    apply_rotary_emb,
    get_3d_rotary_pos_embed,
    get_3d_sincos_pos_embed,
)
from diffusers.models.transformers.cogvideox_transformer_3d import (
    CogVideoXBlock,
    CogVideoXTransformer3DModel,
)
from einops import rearrange
from torch import Tensor, nn

from ..devices import send, supports
from ..windows.tiling import Tile, blend_tiles
from .attention import Attention, scaled_dot_product
from .cogvideox_weights import PATCH, CogVideoXConfig
from .liem import SpatialLIEM, TemporalLIEM
from .slicing import Slicing


class CogVideoXDiT(nn.Module):
    """Predicts the velocity of noisy latents from text and the low-quality video.

    operations: torch.nn, or a host's layers. attention: see `models.attention`. device: "meta" for
    a network whose weights come from a file.

    Latents larger than the trained grid are computed in tiles of that size, each with its own
    positions, and blended. Two attributes, set by `working`, reduce memory. slicing: the same
    result in slices, only without gradients. tile: smaller tiles, in latents.
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
        with torch.device(device or "cpu"):
            model = CogVideoXTransformer3DModel(
                num_attention_heads=config.num_heads,
                attention_head_dim=config.dim // config.num_heads,
                in_channels=2 * config.in_dim,
                out_channels=config.in_dim,
                time_embed_dim=config.time_dim,
                text_embed_dim=config.context_dim,
                max_text_seq_length=config.context_length,
                num_layers=0,
                # Without it, diffusers adds a table for one size. Here it depends on the input.
                use_rotary_positional_embeddings=True,
            )
            blocks = nn.ModuleList(Block(config, attention) for _ in range(config.num_layers))
        self.patch_embed = model.patch_embed
        self.time_proj = model.time_proj
        self.time_embedding = model.time_embedding
        self.transformer_blocks = blocks
        self.norm_final = model.norm_final
        self.norm_out = model.norm_out
        self.norm_out.norm.eps = 1e-6
        self.proj_out = model.proj_out
        if operations is not nn:
            _use_layers_of(operations, self)
        self.to(dtype)

    @property
    def blocks(self) -> Iterator[nn.Module]:
        """The modules that gradient checkpointing recomputes as units."""
        return iter(self.transformer_blocks)

    def compile_blocks(self) -> None:
        """Lets torch compile the transformer blocks, which share code, when they first run."""
        for block in self.transformer_blocks:
            block.compile(dynamic=True)

    def check_size(self, height: int, width: int) -> None:
        """Raises ValueError for latents that do not divide into whole patches."""
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
        """Sets `slicing` and `tile` within a `with` block and restores them afterwards.

        attention_window: must be None; ValueError otherwise, because this network has no windows.
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
        """Returns the velocity (b c f h w) of noisy latents.

        x: noisy latents (b c f h w). t: timesteps (b,). y: text embedding (b l d), l = 226 for the
        published model. hint: latents of the low-quality video (b c f h w). deep: must be None.
        Raises ValueError for latents with an odd side, a missing hint, and features to reuse, which
        this network does not support.
        """
        if hint is None:
            raise ValueError("this model needs the latents of a low-quality video: pass a hint")
        if deep is not None:
            raise ValueError("this model cannot reuse features: set reuse to 0")
        h, w = x.shape[-2:]
        self.check_size(h, w)
        rows, columns = self.config.tiles((h, w), self.tile)
        if len(rows) == len(columns) == 1:
            return self._velocity(x, t, y, hint)
        return blend_tiles(
            lambda rows, columns: self._velocity(
                x[..., rows, columns], t, y, hint[..., rows, columns]
            ),
            rows,
            columns,
        )

    def _velocity(self, x: Tensor, t: Tensor, y: Tensor, hint: Tensor) -> Tensor:
        f, h, w = x.shape[2:]
        grid = (f, h // PATCH, w // PATCH)
        emb = self.time_embedding(self.time_proj(send(t, x.device)).to(x.dtype))
        tokens = self.patch_embed(
            y, rearrange(torch.cat([x, hint], dim=1), "b c f h w -> b f c h w")
        )
        text, image = tokens[:, : y.shape[1]], tokens[:, y.shape[1] :]
        rotary = None
        if self.config.positions == "rotary":
            rotary = rotary_table(self.config, grid, x.device)
        else:
            image = image + sincos_table(self.config, grid, x.device).to(image)
        for block in self.transformer_blocks:
            image, text = block(image, text, emb, grid, rotary, self.slicing)
        image = self.proj_out(self.norm_out(self.norm_final(image), temb=emb))
        return rearrange(
            image,
            "b (f h w) (c p q) -> b c f (h p) (w q)",
            f=f,
            h=grid[1],
            w=grid[2],
            p=PATCH,
            q=PATCH,
        )


class Block(CogVideoXBlock):
    """diffusers' block with LIEM between the first norm and attention, on image tokens only."""

    def __init__(self, config: CogVideoXConfig, attention: Attention = scaled_dot_product) -> None:
        super().__init__(
            dim=config.dim,
            num_attention_heads=config.num_heads,
            attention_head_dim=config.dim // config.num_heads,
            time_embed_dim=config.time_dim,
            attention_bias=True,
        )
        self.attn1.set_processor(JointAttention(attention))  # pyright: ignore
        self.spa_local = SpatialLIEM()
        self.temp_local = TemporalLIEM()

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        image: Tensor,
        text: Tensor,
        emb: Tensor,
        grid: tuple[int, int, int],
        rotary: tuple[Tensor, Tensor] | None = None,
        slicing: Slicing | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Returns the block's image tokens and text tokens.

        image: (b f·h·w d) of a grid (f, h, w). text: (b l d). emb: timestep embedding (b d).
        rotary: see `rotary_table`, None for positions that are in the tokens already.
        slicing: limits the feed-forward layer to a part of the tokens at a time, for inference.
        """
        a_image, a_text, gate, text_gate = self.norm1(image, text, emb)
        a_image = self.temp_local(self._spatial_gate(a_image, grid))
        a_image, a_text = self.attn1(a_image, a_text, image_rotary_emb=rotary)
        image, text = image + gate * a_image, text + text_gate * a_text
        del a_image, a_text
        m_image, m_text, gate, text_gate = self.norm2(image, text, emb)
        if slicing is None or torch.is_grad_enabled():
            m_image = self.ff(m_image)
        else:  # the hidden layer is four times as wide
            parts = m_image.split(slicing.spatial_pixels, dim=1)
            m_image = torch.cat([self.ff(part) for part in parts], dim=1)
        return image + gate * m_image, text + text_gate * self.ff(m_text)

    def _spatial_gate(self, tokens: Tensor, grid: tuple[int, int, int]) -> Tensor:
        f, h, w = grid
        maps = rearrange(tokens, "b (f h w) d -> (b f) d h w", f=f, h=h, w=w)
        return rearrange(self.spa_local(maps), "(b f) d h w -> b (f h w) d", f=f)


class JointAttention:
    """Processor of diffusers' `Attention` for text and image tokens together.

    attention: the attention function, see `models.attention`.
    """

    def __init__(self, attention: Attention) -> None:
        self.attention = attention

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Returns image tokens and text tokens after joint attention; the arguments are diffusers'.

        hidden_states: image tokens (b n d). encoder_hidden_states: text tokens (b l d).
        attention_mask: ignored. image_rotary_emb: see `rotary_table`.
        """
        length = encoder_hidden_states.shape[1]
        tokens = torch.cat([encoder_hidden_states, hidden_states], dim=1)

        def normed_and_rotated(x: Tensor, norm: nn.Module) -> Tensor:
            x = norm(rearrange(x, "b n (h d) -> b h n d", h=attn.heads))
            if image_rotary_emb is not None:
                rotated = apply_rotary_emb(x[:, :, length:], image_rotary_emb)  # pyright: ignore
                assert isinstance(rotated, Tensor)
                x = torch.cat([x[:, :, :length], rotated], dim=2)
            return rearrange(x, "b h n d -> b n (h d)")

        q, k = (
            normed_and_rotated(attn.to_q(tokens), attn.norm_q),
            normed_and_rotated(attn.to_k(tokens), attn.norm_k),
        )
        out = attn.to_out[0](self.attention(q, k, attn.to_v(tokens), attn.heads))
        return out[:, length:], out[:, :length]


def rotary_table(
    config: CogVideoXConfig, grid: tuple[int, int, int], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Returns cosines and sines (f·h·w d) of the rotary positions of a grid (f, h, w) of tokens.

    Positions are integers; those of a grid larger than the trained one are scaled down to it, as
    diffusers does.
    """
    f, h, w = grid
    rows, columns = min(h, config.grid[0]), min(w, config.grid[1])
    cos, sin = get_3d_rotary_pos_embed(
        config.dim // config.num_heads, ((0, 0), (rows, columns)), (h, w), f, device=device
    )
    return cos, sin


def sincos_table(
    config: CogVideoXConfig, grid: tuple[int, int, int], device: torch.device
) -> Tensor:
    """Returns the positions (1 f·h·w d) that are added to image tokens of a grid (f, h, w)."""
    f, h, w = grid
    place = device if supports(device, torch.float64) else torch.device("cpu")
    table = get_3d_sincos_pos_embed(
        config.dim, (w, h), f, 1.875, 1.0, device=place, output_type="pt"
    )
    assert isinstance(table, Tensor)
    return send(table, device).reshape(1, f * h * w, config.dim)


def _use_layers_of(operations: Any, module: nn.Module) -> None:
    """Replaces torch's layers in a module by a host's layers of the same names."""
    for name, child in module.named_children():
        options = {"device": getattr(getattr(child, "weight", None), "device", None)}
        match child:
            case nn.Linear(in_features=inner, out_features=outer, bias=bias):
                layer = operations.Linear(inner, outer, bias=bias is not None, **options)
            case nn.LayerNorm(normalized_shape=shape, eps=eps, elementwise_affine=affine):
                layer = operations.LayerNorm(shape, eps=eps, elementwise_affine=affine, **options)
            case nn.Conv2d(in_channels=inner, out_channels=outer, kernel_size=size, bias=bias):
                layer = operations.Conv2d(
                    inner,
                    outer,
                    size,
                    stride=child.stride,
                    padding=child.padding,
                    bias=bias is not None,
                    **options,
                )
            case _:
                _use_layers_of(operations, child)
                continue
        setattr(module, name, layer)
