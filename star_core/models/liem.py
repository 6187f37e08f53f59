"""LIEM, the Local Information Enhancement Module (paper, section 3.2).

A gate between 0 and 1 in front of every global attention block: it weighs tokens by what their
channels say locally, so that attention, which is global, does not wash local detail out.
"""

from typing import Any

import torch
from torch import Tensor, nn


class SpatialLIEM(nn.Module):
    """Gate of each pixel from its 7x7 neighbourhood, per frame (specification, 2.10)."""

    def __init__(self, *, operations: Any = nn, device=None, dtype=None):
        super().__init__()
        self.conv1 = operations.Conv2d(2, 1, 7, padding=3, bias=False, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(b c h w) -> (b c h w)."""
        pooled = torch.cat([x.amax(1, keepdim=True), x.mean(1, keepdim=True)], dim=1)
        return torch.sigmoid(self.conv1(pooled)) * x


class TemporalLIEM(nn.Module):
    """Gate of each token from the maximum and mean of its channels (specification, 2.10)."""

    def __init__(self, *, operations: Any = nn, device=None, dtype=None):
        super().__init__()
        self.conv1 = operations.Linear(2, 1, bias=False, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(... d) -> (... d)."""
        pooled = torch.cat([x.amax(-1, keepdim=True), x.mean(-1, keepdim=True)], dim=-1)
        return torch.sigmoid(self.conv1(pooled)) * x
