"""MATLAB's imresize, on which the scores of NIQE and ILNIQE depend."""

from functools import lru_cache

import torch
from torch import Tensor


def imresize(picture: Tensor, size: tuple[int, int]) -> Tensor:
    """Resizes (c h w) in float64 to `size` (h, w): bicubic, antialiased, edges mirrored."""
    rows, columns = (
        _weights(side, target).to(picture.device)
        for side, target in zip(picture.shape[-2:], size, strict=True)
    )
    return rows @ picture @ columns.mT


@lru_cache(maxsize=8)
def _weights(side: int, target: int) -> Tensor:
    """Returns the weights (target side) of `side` source pixels in each of `target` pixels."""
    stretch = max(side / target, 1.0)  # the kernel is wider if the number of pixels decreases
    centres = (torch.arange(target, dtype=torch.float64) + 0.5) * (side / target) - 0.5
    taps = int(4 * stretch) + 3
    first = (centres - 2 * stretch).floor()
    positions = first[:, None] + torch.arange(taps)  # (target taps)
    weights = _cubic((positions - centres[:, None]) / stretch)
    weights = weights / weights.sum(dim=1, keepdim=True)
    mirrored = positions.long() % (2 * side)
    mirrored = torch.where(mirrored < side, mirrored, 2 * side - 1 - mirrored)
    return torch.zeros(target, side, dtype=torch.float64).scatter_add(1, mirrored, weights)


def _cubic(x: Tensor) -> Tensor:
    """Returns the values of Keys' kernel, a = -1/2."""
    x = x.abs()
    near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return torch.where(x <= 1, near, torch.where(x <= 2, far, 0.0))
