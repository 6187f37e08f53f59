"""Gaussian windows, by which metrics average over a pixel's neighbourhood."""

import torch
from torch import Tensor


def gaussian_window(side: int, sigma: float) -> Tensor:
    """Returns a Gaussian window (side side) in float64 that sums to 1; sigma: in pixels."""
    line = torch.arange(side, dtype=torch.float64) - (side - 1) / 2
    line = torch.exp(-(line**2) / (2 * sigma**2))
    return torch.outer(line, line) / line.sum() ** 2


def local_mean(maps: Tensor, window: Tensor) -> Tensor:
    """Averages over the windows that lie inside maps: (... h w) -> (... h-p+1 w-q+1).

    window: the weights (p q).
    """
    p, q = window.shape
    h, w = maps.shape[-2] - p + 1, maps.shape[-1] - q + 1
    means = maps.new_zeros(*maps.shape[:-2], h, w)
    # On a CPU, additions are several times faster than a convolution in float64, and as exact.
    for row, weights in enumerate(window.tolist()):
        for column, weight in enumerate(weights):
            means.add_(maps[..., row : row + h, column : column + w], alpha=weight)
    return means
