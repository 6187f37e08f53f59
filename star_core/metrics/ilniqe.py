"""ILNIQE, naturalness of a frame's parts without a ground truth (Zhang, Zhang and Bovik 2015)."""

import math
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from .gaussian import gaussian_window, local_mean
from .matlab_resize import imresize
from .niqe import asymmetric_gaussian, natural_features, normalized
from .weights import find_weights

SIDE, BLOCK = 524, 84
# Opponent colours from R, G, B; the last one is the lightness.
_OPPONENT = ((0.3, 0.04, -0.35), (0.34, -0.6, 0.17), (0.06, 0.63, 0.27))
# From the logarithms of R, G, B (Ruderman et al. 1998): intensity, blue-yellow, red-green.
_RUDERMAN = (
    tuple(x / math.sqrt(3) for x in (1, 1, 1)),
    tuple(x / math.sqrt(6) for x in (1, 1, -2)),
    tuple(x / math.sqrt(2) for x in (1, -1, 0)),
)
_SCALES, _ORIENTATIONS = 3, 4
FEATURES = 468


class ILNIQE:
    """The mean distance of a frame's blocks from those of undistorted pictures; lower is better.

    mean (n), covariance (n n): of natural blocks' features, after subtracting their mean `centre`
    (468) and projecting on the principal `axes` (468 n). Raises ValueError for other shapes.
    """

    def __init__(self, mean: Tensor, covariance: Tensor, centre: Tensor, axes: Tensor) -> None:
        self.mean, self.covariance = mean.double().flatten(), covariance.double()
        self.centre, self.axes = centre.double().flatten(), axes.double()
        if self.axes.shape != (FEATURES, len(self.mean)) or len(self.centre) != FEATURES:
            raise ValueError(f"this is not a model of ILNIQE: its axes are {tuple(axes.shape)}")

    def __call__(self, frame: Tensor) -> float:
        """Returns the distance of a frame (c h w) in [0, 1] of any size; nan without texture.

        The frame is resized to 524x524 first, as in the paper.
        """
        rgb = (frame[:3].cpu().double() * 255).round()
        rgb = imresize(rgb, (SIDE, SIDE)).clamp(0, 255)
        side = SIDE // BLOCK * BLOCK
        rgb = rgb[:, :side, :side]
        colours = _mix(rgb, _OPPONENT)
        scales = []
        for scale in (1, 2):
            scales.append(_features(rgb, colours, scale))
            rgb, colours = _halved(rgb), _halved(colours)
        features = torch.cat(scales, dim=1).clamp(max=10_000)  # (blocks 468)
        features = (features - self.centre) @ self.axes
        complete = features[~features.isnan().any(dim=1)]
        if len(complete) < 2:
            return math.nan
        features = torch.where(features.isnan(), features.nanmean(dim=0), features)
        inverse = torch.linalg.pinv((self.covariance + torch.cov(complete.T)) / 2)
        differences = features - self.mean
        squares = torch.einsum("n i, i j, n j -> n", differences, inverse, differences)
        return squares.clamp(min=0).sqrt().mean().item()


def _features(rgb: Tensor, colours: Tensor, scale: int) -> Tensor:
    """Returns statistics (blocks 234) of a picture (3 h w) and its opponent colours."""
    lightness = colours[2:]
    structure = _blocks(normalized(lightness, gaussian_window(5, 5 / 6)), scale)[:, 0]
    across, down = _derivatives(colours, scale)
    logs = (rgb + 1e-5).log()
    logs = _mix(logs - logs.mean(dim=(1, 2), keepdim=True), _RUDERMAN)
    waves = _log_gabor(lightness[0], scale)  # (filters 2 h w)
    waves_across, waves_down = _derivatives(rearrange(waves, "n p h w -> (n p) h w"), scale)
    slopes = rearrange(torch.stack((across, down)), "d c h w -> (c d) h w")
    waves_slopes = rearrange(torch.stack((waves_across, waves_down)), "d c h w -> (c d) h w")
    responses = rearrange(waves, "n p h w -> (n p) h w")
    return torch.cat(
        (
            natural_features(structure),
            _weibull(_blocks(_length(across, down), scale)),
            _moments(_blocks(logs, scale)),
            _shapes(_blocks(torch.cat((slopes, responses, waves_slopes)), scale)),
            _weibull(_blocks(_length(waves_across, waves_down), scale)),
        ),
        dim=1,
    )


def _mix(picture: Tensor, matrix: tuple[tuple[float, ...], ...]) -> Tensor:
    weights = torch.tensor(matrix, dtype=picture.dtype)
    return torch.einsum("o c, c h w -> o h w", weights, picture)


def _blocks(maps: Tensor, scale: int) -> Tensor:
    """Divides maps into blocks: (c h w) -> (blocks c h w)."""
    side = BLOCK // scale
    return rearrange(maps, "c (y h) (x w) -> (x y) c h w", h=side, w=side)


def _length(x: Tensor, y: Tensor) -> Tensor:
    return (x**2 + y**2 + 1e-8).sqrt()


def _derivatives(maps: Tensor, scale: int) -> tuple[Tensor, Tensor]:
    """Returns horizontal and vertical slopes of (c h w) by a Gaussian's derivative, zero-padded."""
    sigma = 1.66 / scale**0.28
    radius = math.ceil(3 * sigma)
    h, w = maps.shape[-2:]
    size = h + 2 * radius, w + 2 * radius
    line = torch.arange(-radius, radius + 1, dtype=maps.dtype)
    bell = torch.exp(-(line**2) / (2 * sigma**2))
    # With Fourier transforms: faster in float64 than torch's convolution.
    spectrum = torch.fft.rfft2(maps, s=size)

    def filtered(rows: Tensor, columns: Tensor) -> Tensor:
        kernel = torch.fft.rfft2(torch.outer(rows, columns), s=size)
        padded = torch.fft.irfft2(spectrum * kernel, s=size)
        return padded[:, radius : radius + h, radius : radius + w]

    return filtered(bell, line * bell), filtered(line * bell, bell)


def _log_gabor(lightness: Tensor, scale: int) -> Tensor:
    """Returns real and imaginary responses (filters 2 h w) at 3 wavelengths and 4 orientations."""
    h, w = lightness.shape
    spectrum = torch.fft.fft2(lightness)
    return torch.stack(
        [
            torch.view_as_real(torch.fft.ifft2(spectrum * gabor)).movedim(-1, 0)
            for gabor in _filters(h, w, 2.4 / scale**0.87)
        ]
    )


@lru_cache(maxsize=2)
def _filters(h: int, w: int, shortest: float) -> Tensor:
    """Returns log-Gabor filters (12 h w) in the order of torch.fft."""
    down = torch.fft.fftfreq(h, dtype=torch.float64)[:, None]
    across = torch.fft.fftfreq(w, dtype=torch.float64)[None]
    radius = (across**2 + down**2).sqrt()
    radius[0, 0] = 1.0
    angle = torch.atan2(-down, across)
    spread = math.pi / (_ORIENTATIONS * 1.10)
    filters = []
    for n in range(_SCALES):
        radial = torch.exp(-((radius * shortest * 1.31**n).log() ** 2) / (2 * math.log(0.55) ** 2))
        radial[0, 0] = 0.0
        for k in range(_ORIENTATIONS):
            rotated = angle - k * math.pi / _ORIENTATIONS
            deviation = torch.atan2(rotated.sin(), rotated.cos())
            filters.append(radial * torch.exp(-(deviation**2) / (2 * spread**2)))
    return torch.stack(filters)


def _weibull(blocks: Tensor) -> Tensor:
    """Returns scale and shape of each block's Weibull distribution: (n c h w) -> (n 2c).

    They maximise the likelihood, by Newton's method on the shape.
    """
    logs = rearrange(blocks, "n c h w -> (n c) (h w)").log()
    shape = 1.2 / logs.std(dim=1)
    for _ in range(50):
        powers = (logs * shape[:, None]).exp()
        total, first = powers.sum(dim=1), (powers * logs).sum(dim=1)
        mean = first / total
        second = (powers * logs**2).sum(dim=1) / total
        residual = mean - logs.mean(dim=1) - 1 / shape
        step = residual / (second - mean**2 + 1 / shape**2)
        shape = shape - step
        if not step.abs().max() > 1e-6:
            break
    scale = (logs * shape[:, None]).exp().mean(dim=1) ** (1 / shape)
    return rearrange(torch.stack((scale, shape)), "k (n c) -> n (c k)", n=len(blocks))


def _moments(blocks: Tensor) -> Tensor:
    """Returns mean and variance: (n c h w) -> (n 2c)."""
    means, variances = blocks.mean(dim=(2, 3)), blocks.var(dim=(2, 3))
    return rearrange(torch.stack((means, variances)), "k n c -> n (c k)")


def _shapes(blocks: Tensor) -> Tensor:
    """Returns shape and scale of the generalized Gaussian: (n c h w) -> (n 2c)."""
    shape, left, right = asymmetric_gaussian(rearrange(blocks, "n c h w -> (n c) h w"))
    both = torch.stack((shape, (left + right) / 2))
    return rearrange(both, "k (n c) -> n (c k)", n=len(blocks))


def _halved(picture: Tensor) -> Tensor:
    """Returns every second pixel of (c h w) after a blur (Gaussian of 6x6, sigma 0.9)."""
    padded = F.pad(picture[None], (2, 3, 2, 3), mode="replicate")[0]
    return local_mean(padded, gaussian_window(6, 0.9))[:, ::2, ::2]


def load_ilniqe(*, folder: Path | str | None = None) -> ILNIQE:
    """Loads ILNIQE with its authors' model, a MATLAB file.

    folder: of the weights, None for `weights.default_folder()`. Raises ValueError if the model or
    SciPy is missing.
    """
    path = find_weights("ilniqe", folder)
    try:
        import scipy.io
    except ImportError as error:
        raise ValueError("ILNIQE needs SciPy to read its model: `pip install scipy`") from error
    try:
        mean, covariance, centre, axes = scipy.io.loadmat(path)["templateModel"][0]
    except (ValueError, KeyError, TypeError, NotImplementedError) as error:
        raise ValueError(f"{path} is not a model of ILNIQE ({error}): get it again") from None
    return ILNIQE(*(torch.from_numpy(array) for array in (mean, covariance, centre, axes)))
