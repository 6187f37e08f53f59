"""Attention over tokens, as one function that a host can replace by its own."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

Attention = Callable[[Tensor, Tensor, Tensor, int], Tensor]  # (q, k, v, heads) -> out

ATTENTIONS = {"sdpa": "torch", "flash": "flash-attn", "sage": "sageattention"}  # packages

# CUDA kernels index batch times heads in a grid dimension of 65535; temporal attention has one row
# per pixel, which exceeds that for outputs of about 8 megapixels or more.
MAX_ROWS = 16384


def scaled_dot_product(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Returns softmax(q kᵀ / √d) v without a mask, by torch's fused kernels.

    q: (b n h·d). k, v: (b m h·d). heads: h. Returns (b n h·d).
    """

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (rearrange(x, "b n (h d) -> b h n d", h=heads) for x in (q, k, v))
        return rearrange(F.scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)")

    return in_rows(attend, q, k, v, heads)


def attention_of(name: str) -> Attention:
    """Returns the attention of a package by its name.

    sdpa: torch's own. flash: FlashAttention (Dao 2023, arXiv:2307.08691). sage: SageAttention
    (Zhang et al. 2024, arXiv:2410.02367), which rounds queries and keys to 8 bit. Raises ValueError
    for another name and if the package is not installed; so does the attention itself unless it
    gets float16 or bfloat16.
    """
    if name == "sdpa":
        return scaled_dot_product
    try:
        if name == "flash":
            from flash_attn import flash_attn_func as fused  # pyright: ignore
        elif name == "sage":
            from sageattention import sageattn  # pyright: ignore

            fused = partial(sageattn, tensor_layout="NHD")
        else:
            raise ValueError(f"attention must be one of {', '.join(ATTENTIONS)}, got {name!r}")
    except ImportError:
        raise ValueError(
            f"--attention {name} needs a package: pip install {ATTENTIONS[name]}"
        ) from None

    def attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
        if q.dtype not in (torch.float16, torch.bfloat16):
            raise ValueError(
                f"--attention {name} computes in 16 bits: choose --dtype float16 or bfloat16"
            )

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (rearrange(x, "b n (h d) -> b n h d", h=heads) for x in (q, k, v))
            return rearrange(fused(q, k, v), "b n h d -> b n (h d)")

        return in_rows(attend, q, k, v, heads)

    return attention


def in_rows(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor], q: Tensor, k: Tensor, v: Tensor, heads: int
) -> Tensor:
    """Calls `attend(q, k, v)` on slices of the batch, so that no kernel's grid overflows.

    q, k, v: (b n d) with equal b. A slice has at most MAX_ROWS / heads rows of the batch.
    """
    rows = max(1, MAX_ROWS // heads)
    if q.shape[0] <= rows:
        return attend(q, k, v)
    slices = zip(q.split(rows), k.split(rows), v.split(rows), strict=True)
    return torch.cat([attend(*qkv) for qkv in slices])


@dataclass(frozen=True, kw_only=True)
class AttentionWindow:
    """Restricts self-attention to windows of a frame (Liu et al. 2021, arXiv:2103.14030).

    size: largest side of a window in tokens. shifted: moves the windows down and right by half a
    window. Alternating layers hide the borders in this way. Shifted windows wrap around the edges
    of the frame without a mask, because this attention has no positions.
    """

    size: int
    shifted: bool = False


def windowed_attention(
    window: AttentionWindow | None,
    attend: Callable[[Tensor], Tensor],
    tokens: Tensor,
    height: int,
) -> Tensor:
    """Applies self-attention to the tokens of frames, window by window.

    attend: self-attention, (b n d) -> (b n d). tokens: (b h·w d). height: rows h of a frame.
    window: None for one window of the whole frame. Returns (b h·w d).
    """
    sides = (height, tokens.shape[1] // height)
    counts = [math.ceil(side / window.size) if window else 1 for side in sides]
    if window is None or counts == [1, 1]:
        return attend(tokens)
    shift = [0, 0]
    if window.shifted:
        shift = [max(1, side // count // 2) for side, count in zip(sides, counts, strict=True)]
    frames = rearrange(tokens, "b (h w) d -> b h w d", h=height)
    frames = frames.roll([-by for by in shift], (1, 2))

    def attend_window(tokens: Tensor) -> Tensor:
        return attend(tokens.flatten(1, 2)).unflatten(1, tokens.shape[1:3])

    rows = [
        torch.cat([attend_window(part) for part in row.tensor_split(counts[1], dim=2)], dim=2)
        for row in frames.tensor_split(counts[0], dim=1)
    ]
    return torch.cat(rows, dim=1).roll(shift, (1, 2)).flatten(1, 2)
