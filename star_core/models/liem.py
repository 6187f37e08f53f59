"""LIEM, the Local Information Enhancement Module (paper, section 3.2).

A gate between 0 and 1 in front of every global attention block. It weights tokens by local
statistics of their channels, so that global attention does not blur local detail.
"""

from typing import Any

import torch
from torch import Tensor, nn


class SpatialLIEM(nn.Module):
    """Gates each pixel by the maximum and mean over channels in its 7x7 neighbourhood.

    Specification, 2.10. operations: torch.nn, or a host's layers.
    """

    def __init__(self, *, operations: Any = nn, device=None, dtype=None):
        super().__init__()
        self.conv1 = operations.Conv2d(2, 1, 7, padding=3, bias=False, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Returns frames x (b c h w) times their gate."""
        pooled = torch.cat([x.amax(1, keepdim=True), x.mean(1, keepdim=True)], dim=1)
        return torch.sigmoid(self.conv1(pooled)) * x


class TemporalLIEM(nn.Module):
    """Gates each token by the maximum and mean of its channels (specification, 2.10).

    operations: torch.nn, or a host's layers.
    """

    def __init__(self, *, operations: Any = nn, device=None, dtype=None):
        super().__init__()
        self.conv1 = operations.Linear(2, 1, bias=False, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Returns tokens x (... d) times their gate."""
        pooled = torch.cat([x.amax(-1, keepdim=True), x.mean(-1, keepdim=True)], dim=-1)
        return torch.sigmoid(self.conv1(pooled)) * x
