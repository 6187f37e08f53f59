"""NIQE, naturalness of a frame without a ground truth (Mittal et al. 2013)."""

import math
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor

from .fidelity import luma, size_of
from .gaussian import local_mean
from .matlab_resize import imresize
from .weights import find_weights

BLOCK = 96


class NIQE:
    """The distance of a frame's statistics from those of undistorted pictures; lower is better.

    mean (36), covariance (36 36): of the features of natural pictures' blocks. window (7 7): for
    local means.
    """

    def __init__(self, mean: Tensor, covariance: Tensor, window: Tensor) -> None:
        self.mean = mean.double().flatten()
        self.covariance = covariance.double()
        self.window = window.double()

    def __call__(self, frame: Tensor) -> float:
        """Returns the distance of a frame (c h w) in [0, 1]; nan if too few blocks have texture.

        As in the authors' program, luma is rounded to 8 bits, blocks do not overlap, and pixels
        that do not fill a block are cut. Raises ValueError for a frame of fewer than two blocks of
        96x96.
        """
        rows, columns = (side // BLOCK for side in frame.shape[-2:])
        if rows * columns < 2:
            raise ValueError(
                f"NIQE needs frames of at least two blocks of {BLOCK}x{BLOCK}, got "
                f"{size_of(frame)}: leave it out of `metrics`"
            )
        picture = (luma(frame).cpu().double() * 255).round()[:, : rows * BLOCK, : columns * BLOCK]
        halved = imresize(picture, (rows * BLOCK // 2, columns * BLOCK // 2))
        scales = [
            self._features(scaled, BLOCK // scale) for scale, scaled in ((1, picture), (2, halved))
        ]
        features = torch.cat(scales, dim=1)  # (blocks 36)
        complete = features[~features.isnan().any(dim=1)]
        if len(complete) < 2:
            return math.nan
        difference = self.mean - features.nanmean(dim=0)
        inverse = torch.linalg.pinv((self.covariance + torch.cov(complete.T)) / 2)
        return math.sqrt(max((difference @ inverse @ difference).item(), 0))

    def _features(self, picture: Tensor, block: int) -> Tensor:
        """Returns statistics (blocks 18) of the picture (1 h w)."""
        blocks = rearrange(
            normalized(picture, self.window), "1 (y h) (x w) -> (y x) h w", h=block, w=block
        )
        return natural_features(blocks)


def natural_features(blocks: Tensor) -> Tensor:
    """Returns statistics (n 18) of normalized blocks (n h w): of values, products of neighbours."""
    shape, left, right = asymmetric_gaussian(blocks)
    features = [shape, (left + right) / 2]
    for shift in ((0, 1), (1, 0), (1, 1), (1, -1)):
        products = blocks * blocks.roll(shift, dims=(1, 2))
        shape, left, right = asymmetric_gaussian(products)
        skew = (right - left) * torch.exp(torch.lgamma(2 / shape) - torch.lgamma(1 / shape))
        features += [shape, skew, left, right]
    return torch.stack(features, dim=1)


def normalized(picture: Tensor, window: Tensor) -> Tensor:
    """Divides each pixel's difference from its local mean by its local deviation plus 1.

    picture: (c h w) from 0 to 255. window: (k k), the weights of the neighbourhood.
    """
    margin = window.shape[-1] // 2
    padded = F.pad(picture[None], (margin,) * 4, mode="replicate")[0]
    mean = local_mean(padded, window)
    deviation = (local_mean(padded**2, window) - mean**2).abs().sqrt()
    return (picture - mean) / (deviation + 1)


def asymmetric_gaussian(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Fits asymmetric generalized Gaussians to blocks (n h w); returns shapes, left, right scales.

    The fit is by moments (Lasmar et al. 2009), with shapes from 0.2 to 10 in steps of 0.001. Each
    result is (n), and nan for a block without values on both sides of 0.
    """
    shapes, ratios = _shape_table()
    ratios = ratios.to(blocks)
    squares = blocks**2
    below, above = (blocks < 0).to(squares), (blocks > 0).to(squares)
    left = (_total(squares * below) / _total(below)).sqrt()
    right = (_total(squares * above) / _total(above)).sqrt()
    skew = left / right
    ratio = reduce(blocks.abs(), "n h w -> n", "mean") ** 2 / reduce(squares, "n h w -> n", "mean")
    ratio = ratio * (skew**3 + 1) * (skew + 1) / (skew**2 + 1) ** 2
    index = torch.searchsorted(ratios, ratio).clamp(1, len(ratios) - 1)
    is_lower_nearer = (ratio - ratios[index - 1] <= ratios[index] - ratio).long()
    shape = shapes.to(blocks)[index - is_lower_nearer]
    scale = torch.exp((torch.lgamma(1 / shape) - torch.lgamma(3 / shape)) / 2)
    left, right = left * scale, right * scale
    return shape + 0 * (left + right), left, right  # a nan makes all three nan


def _total(blocks: Tensor) -> Tensor:
    return reduce(blocks, "n h w -> n", "sum")


@lru_cache
def _shape_table() -> tuple[Tensor, Tensor]:
    """Returns shapes, and mean(|x|)^2 / mean(x^2) of the generalized Gaussian of each."""
    shapes = 0.2 + 0.001 * torch.arange(9801, dtype=torch.float64)
    logs = 2 * torch.lgamma(2 / shapes) - torch.lgamma(1 / shapes) - torch.lgamma(3 / shapes)
    return shapes, logs.exp()


def load_niqe(*, folder: Path | str | None = None) -> NIQE:
    """Loads NIQE with its authors' model of natural pictures.

    folder: of the weights, None for `weights.default_folder()`. Raises ValueError, with a source,
    if the model is missing.
    """
    with np.load(find_weights("niqe", folder), allow_pickle=False) as arrays:
        names = ("mu_pris_param", "cov_pris_param", "gaussian_window")
        return NIQE(*(torch.from_numpy(arrays[name]) for name in names))
