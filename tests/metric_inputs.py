"""Pictures and weights by formula, the same everywhere: what tests/golden/metrics was made from."""

from collections.abc import Iterable

import torch
from torch import Tensor


def waves(shape: tuple[int, ...], seed: float) -> Tensor:
    """Something in -1 to 1 that repeats nowhere, float32."""
    count = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return (
        torch.sin(count * (0.73 + seed) + torch.sin(count * 0.0131 * (1 + seed)))
        .view(shape)
        .float()
    )


def pictures(h: int, w: int, moved: int = 0) -> tuple[Tensor, Tensor]:
    """A restored picture (3 h w) in [0, 1] and its ground truth; `moved` pixels to the left."""
    y, x = torch.meshgrid(
        torch.arange(h, dtype=torch.float64),
        torch.arange(moved, moved + w, dtype=torch.float64),
        indexing="ij",
    )
    channels = [
        torch.sin(0.21 * x + k)
        + torch.sin(0.17 * y - 0.05 * x)
        + 0.7 * torch.sin(0.011 * x * y + k)
        for k in range(3)
    ]
    truth = 0.5 + 0.18 * torch.stack(channels)
    noise = torch.sin(12.9898 * x + 78.233 * y) * 43758.5453
    restored = 0.9 * truth + 0.05 + 0.1 * (noise - noise.floor() - 0.5)
    return restored.clamp(0, 1).float(), truth.clamp(0, 1).float()


def fill(parameters: Iterable[Tensor]) -> None:
    """Weights of convolutions and heads: activations keep their size, heads are positive."""
    with torch.no_grad():
        for number, p in enumerate(parameters):
            values = waves(tuple(p.shape), 0.01 * number)
            if p.ndim > 1 and p.shape[0] > 1:
                p.copy_(values * (4 / p[0].numel()) ** 0.5)
            elif p.ndim == 1:
                p.copy_(values * 0.1)
            else:
                p.copy_(values.abs())
