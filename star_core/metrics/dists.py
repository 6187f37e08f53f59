"""DISTS, structure and texture similarity (Ding et al. 2020)."""

from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor, nn

from ..checkpoints.tensors import open_tensors
from .features import VGG16
from .lpips import copy_backbone
from .weights import find_weights


class DISTS(nn.Module):
    """A distance of pictures by the means and covariances of VGG16's features; 0 for equal ones.

    alpha, beta: the weights of each channel's texture and structure; the picture's own three
    channels come first.
    """

    mean: Tensor
    std: Tensor
    channels = (3, *VGG16.channels)

    def __init__(self) -> None:
        super().__init__()
        self.network = VGG16(pool=l2_pool)
        self.alpha = nn.Parameter(torch.zeros(sum(self.channels)))
        self.beta = nn.Parameter(torch.zeros(sum(self.channels)))
        # ImageNet's, for pictures in [0, 1].
        mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])
        self.register_buffer("mean", rearrange(mean, "c -> c 1 1"), persistent=False)
        self.register_buffer("std", rearrange(std, "c -> c 1 1"), persistent=False)

    def forward(self, restored: Tensor, reference: Tensor) -> Tensor:
        """Returns differentiable distances (b,) of pictures (b c h w) in [0, 1].

        Alpha is not compared. Raises ValueError for sides below 16.
        """
        if (smallest := min(restored.shape[-2:])) < 16:
            raise ValueError(f"DISTS needs frames of at least 16x16, got a side of {smallest}")
        pictures = torch.cat((restored[:, :3], reference[:, :3]))
        maps = [pictures, *self.network((pictures - self.mean) / self.std)]
        total = self.alpha.sum() + self.beta.sum()
        similarity = pictures.new_zeros(len(restored))
        weights = zip(self.alpha.split(self.channels), self.beta.split(self.channels), strict=True)
        for features, (alpha, beta) in zip(maps, weights, strict=True):
            x, y = features.chunk(2)
            mean_x, mean_y = _mean(x), _mean(y)
            var_x, var_y = _mean((x - _as_map(mean_x)) ** 2), _mean((y - _as_map(mean_y)) ** 2)
            covariance = _mean(x * y) - mean_x * mean_y
            texture = (2 * mean_x * mean_y + 1e-6) / (mean_x**2 + mean_y**2 + 1e-6)
            structure = (2 * covariance + 1e-6) / (var_x + var_y + 1e-6)
            similarity = similarity + (alpha * texture + beta * structure).sum(dim=1) / total
        return 1 - similarity


def _mean(features: Tensor) -> Tensor:
    return reduce(features, "b c h w -> b c", "mean")


def _as_map(means: Tensor) -> Tensor:
    return rearrange(means, "b c -> b c 1 1")


def l2_pool(features: Tensor) -> Tensor:
    """Halves the sides of features (b c h w) without aliasing.

    Returns the root of the blurred squares (Hann window of 3) at every second pixel.
    """
    window = torch.tensor((0.25, 0.5, 0.25), dtype=features.dtype, device=features.device)
    kernel = (window[:, None] * window).expand(features.shape[1], 1, 3, 3)
    squares = F.conv2d(features**2, kernel, stride=2, padding=1, groups=features.shape[1])
    return (squares + 1e-12).sqrt()


def load_dists(*, folder: Path | str | None = None, device: torch.device | str = "cpu") -> DISTS:
    """Loads DISTS with its published weights on the VGG16 of LPIPS, frozen.

    folder: of the weights, None for `weights.default_folder()`. Raises ValueError, with a source,
    if weights are missing.
    """
    metric = DISTS()
    weights = open_tensors(find_weights("dists", folder))
    copy_backbone(metric.network, find_weights("lpips_vgg", folder))
    with torch.no_grad():
        metric.alpha.copy_(weights["alpha"].flatten())
        metric.beta.copy_(weights["beta"].flatten())
    return metric.requires_grad_(False).eval().to(device)
