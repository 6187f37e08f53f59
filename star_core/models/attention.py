"""Attention over tokens. One function, so that a host can hand in its own."""

from collections.abc import Callable

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
