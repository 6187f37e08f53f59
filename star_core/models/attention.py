"""Attention over tokens. One function, so that a host can hand in its own."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

Attention = Callable[[Tensor, Tensor, Tensor, int], Tensor]

# CUDA kernels index batch times heads in a grid dimension of 65535; temporal attention has one row
# per pixel, which exceeds that from about 8 megapixels of output on.
MAX_ROWS = 16384


def scaled_dot_product(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """softmax(q kᵀ / √d) v without a mask: (b n h·d), (b m h·d), (b m h·d) -> (b n h·d)."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (rearrange(x, "b n (h d) -> b h n d", h=heads) for x in (q, k, v))
        return rearrange(F.scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)")

    return in_rows(attend, q, k, v, heads)


def in_rows(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor], q: Tensor, k: Tensor, v: Tensor, heads: int
) -> Tensor:
    """`attend(q, k, v)` for a part of the batch at a time, so that no kernel's grid overflows."""
    rows = max(1, MAX_ROWS // heads)
    if q.shape[0] <= rows:
        return attend(q, k, v)
    parts = zip(q.split(rows), k.split(rows), v.split(rows), strict=True)
    return torch.cat([attend(*part) for part in parts])


@dataclass(frozen=True, kw_only=True)
class AttentionWindow:
    """Parts of a frame that attend to themselves alone (Liu et al. 2021, arXiv:2103.14030).

    size: most tokens a side. shifted: windows lie half a window further down and to the right, so
    that where layers take turns, no border lasts. What is beyond an edge goes on at the opposite
    one, without a mask: this attention knows no positions and would see the whole frame.
    """

    size: int
    shifted: bool = False


def within(
    window: AttentionWindow | None,
    attend: Callable[[Tensor], Tensor],
    tokens: Tensor,
    height: int,
) -> Tensor:
    """Self-attention `attend` of tokens (b h·w d) of frames of `height` rows, window by window."""
    sides = (height, tokens.shape[1] // height)
    counts = [math.ceil(side / window.size) if window else 1 for side in sides]
    if window is None or counts == [1, 1]:
        return attend(tokens)
    shift = [0, 0]
    if window.shifted:
        shift = [max(1, side // count // 2) for side, count in zip(sides, counts, strict=True)]
    frames = rearrange(tokens, "b (h w) d -> b h w d", h=height)
    frames = frames.roll([-by for by in shift], (1, 2))

    def attended(part: Tensor) -> Tensor:
        return attend(part.flatten(1, 2)).unflatten(1, part.shape[1:3])

    rows = [
        torch.cat([attended(part) for part in row.tensor_split(counts[1], dim=2)], dim=2)
        for row in frames.tensor_split(counts[0], dim=1)
    ]
    return torch.cat(rows, dim=1).roll(shift, (1, 2)).flatten(1, 2)
