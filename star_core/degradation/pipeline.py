"""Recipes of degradation: from a clean video to the small, bad one that restoration starts from.

A recipe is a sequence of stages (blur, resize, noise, JPEG, codec). Its random parameters are drawn
once per clip and drift slowly in time, as those of a camera and a transmission do.
"""

import math
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from ..draws import Draws
from . import ops
from .compression import VideoCodec, codec_round_trip, jpeg

Range = tuple[float, float]
Parameters = dict[str, Any]  # JSON: numbers, strings, and a list where a parameter drifts


class ClipDraws(Draws):
    """Parameters of one clip of `frames` frames."""

    def __init__(self, generator: torch.Generator, frames: int, drift: float) -> None:
        super().__init__(generator)
        self.frames, self.drift = frames, drift

    def drifting(self, bounds: Range) -> float | list[float]:
        """Uniform in `bounds`; with drift a slow sine around that, one value per frame."""
        low, high = bounds
        if low == high:
            return low
        value = self.uniform(low, high)
        if not self.drift:
            return value
        period, phase = self.uniform(24, 96), self.uniform(0, 2 * math.pi)
        swing = self.drift * (high - low)
        angles = (phase + 2 * math.pi * frame / period for frame in range(self.frames))
        return [min(max(value + swing * math.sin(angle), low), high) for angle in angles]


class Stage(Protocol):
    """A step of a recipe: `draw` fixes what to do, `apply` does it to frames (f 3 h w)."""

    def draw(self, draws: ClipDraws) -> list[tuple["Stage", Parameters]]: ...

    def apply(
        self, video: Tensor, parameters: Parameters, generator: torch.Generator
    ) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class Blur:
    """Gaussian blur of `sigma` pixels; with probability `anisotropic` two widths and an angle."""

    sigma: Range
    anisotropic: float = 0.0

    def draw(self, draws: ClipDraws) -> list[tuple[Stage, Parameters]]:
        parameters: Parameters = {"op": "blur", "sigma": draws.drifting(self.sigma)}
        if draws.chance(self.anisotropic):
            parameters["sigma_y"] = draws.drifting(self.sigma)
            parameters["theta"] = draws.drifting((-math.pi, math.pi))
        return [(self, parameters)]

    def apply(self, video: Tensor, parameters: Parameters, generator: torch.Generator) -> Tensor:
        if "sigma_y" not in parameters:
            return ops.gaussian_blur(video, torch.as_tensor(parameters["sigma"]))
        size = 2 * math.ceil(4 * self.sigma[1]) + 1
        values = (_per_frame(parameters[key], len(video)) for key in ("sigma", "sigma_y", "theta"))
        kernels = [
            ops.blur_kernel(size, (x, y), theta) for x, y, theta in zip(*values, strict=True)
        ]
        return ops.blur(video, torch.stack(kernels))


@dataclass(frozen=True, kw_only=True)
class Resize:
    """Resize to `scale` times the clean video's size (sides rounded down), mode by weight."""

    scale: float
    modes: dict[ops.ResizeMode, float]

    def draw(self, draws: ClipDraws) -> list[tuple[Stage, Parameters]]:
        return [(self, {"op": "resize", "scale": self.scale, "mode": draws.choice(self.modes)})]

    def apply(self, video: Tensor, parameters: Parameters, generator: torch.Generator) -> Tensor:
        h, w = (math.floor(side * parameters["scale"]) for side in video.shape[-2:])
        return ops.resize(video, (h, w), parameters["mode"])


@dataclass(frozen=True, kw_only=True)
class Noise:
    """White noise of standard deviation `sigma`, or with probability `poisson` photon noise of
    `scale`; with probability `grey` the same on all channels."""

    sigma: Range
    scale: Range = (0.0, 0.0)
    poisson: float = 0.0
    grey: float = 0.0

    def draw(self, draws: ClipDraws) -> list[tuple[Stage, Parameters]]:
        if draws.chance(self.poisson):
            parameters = {"op": "poisson_noise", "scale": draws.drifting(self.scale)}
        else:
            parameters = {"op": "gaussian_noise", "sigma": draws.drifting(self.sigma)}
        return [(self, parameters | {"grey": draws.chance(self.grey)})]

    def apply(self, video: Tensor, parameters: Parameters, generator: torch.Generator) -> Tensor:
        grey = parameters["grey"]
        if "scale" in parameters:
            scale = torch.as_tensor(parameters["scale"])
            return ops.poisson_noise(video, scale, generator=generator, grey=grey)
        sigma = torch.as_tensor(parameters["sigma"])
        return ops.gaussian_noise(video, sigma, generator=generator, grey=grey)


@dataclass(frozen=True, kw_only=True)
class Jpeg:
    """Every frame a JPEG picture of `quality` in [1, 100]."""

    quality: Range

    def draw(self, draws: ClipDraws) -> list[tuple[Stage, Parameters]]:
        return [(self, {"op": "jpeg", "quality": draws.drifting(self.quality)})]

    def apply(self, video: Tensor, parameters: Parameters, generator: torch.Generator) -> Tensor:
        return jpeg(video, torch.as_tensor(parameters["quality"]))


@dataclass(frozen=True, kw_only=True)
class Codec:
    """The clip as compressed video; `quality` is the range of its codec's constant-quality scale
    (crf, or qscale of mpeg4; larger is worse)."""

    codec: VideoCodec
    quality: Range
    preset: str = "medium"

    def draw(self, draws: ClipDraws) -> list[tuple[Stage, Parameters]]:
        quality = draws.uniform(*self.quality)
        rate = "qscale" if self.codec == "mpeg4" else "crf"
        return [(self, {"op": "codec", "codec": self.codec, rate: quality})]

    def apply(self, video: Tensor, parameters: Parameters, generator: torch.Generator) -> Tensor:
        arguments = {key: value for key, value in parameters.items() if key != "op"}
        return codec_round_trip(video, **arguments, preset=self.preset)


@dataclass(frozen=True)
class OneOf:
    """One of several sequences of stages, chosen by weight."""

    weights: tuple[float, ...]
    sequences: tuple[tuple[Stage, ...], ...]

    def draw(self, draws: ClipDraws) -> list[tuple[Stage, Parameters]]:
        index = draws.choice(dict(enumerate(self.weights)))
        return [step for stage in self.sequences[index] for step in stage.draw(draws)]

    def apply(self, video: Tensor, parameters: Parameters, generator: torch.Generator) -> Tensor:
        raise AssertionError("draw() returns the chosen stages, never this one")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Stages in order. drift: how far a drawn parameter swings in time, as a share of its range."""

    name: str
    stages: tuple[Stage, ...] = field(repr=False)
    drift: float = 0.0


def degrade_video(video: Tensor, recipe: Recipe, seed: int) -> tuple[Tensor, Parameters]:
    """Degrade one clip (f 3 h w) in [0, 1] -> (lq, record).

    lq: (f 3 h//4 w//4) in [0, 1], rounded to 8-bit levels, on the clip's device.
    record: what was drawn, as JSON (recipe, seed, stages with their parameters). The same clip,
    recipe and seed (0 to 2^64 - 1) give the same lq on the same machine.
    """
    if video.ndim != 4 or video.shape[1] != 3:
        raise ValueError(f"degrade_video takes RGB frames (f 3 h w), got {tuple(video.shape)}")
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed must be in [0, 2^64), got {seed}")
    generator = torch.Generator().manual_seed(seed)
    draws = ClipDraws(generator, len(video), recipe.drift)
    # All parameters first: they must not depend on how many pixels drew noise.
    steps = [step for stage in recipe.stages for step in stage.draw(draws)]
    for stage, parameters in steps:
        video = stage.apply(video, parameters, generator)
    record = {
        "recipe": recipe.name,
        "seed": seed,
        "stages": [parameters for _, parameters in steps],
    }
    return (video.clamp(0, 1) * 255).round() / 255, record


def _per_frame(value: float | list[float], frames: int) -> list[float]:
    return value if isinstance(value, list) else [value] * frames


def _fixed(name: str, sigma: float, noise: float, quality: float) -> Recipe:
    return Recipe(
        name=name,
        stages=(
            Blur(sigma=(sigma, sigma)),
            Resize(scale=1 / 4, modes={"area": 1}),
            Noise(sigma=(noise / 255, noise / 255)),
            Jpeg(quality=(quality, quality)),
        ),
    )


MILD = _fixed("mild", 1.0, 4, 60)
HEAVY = _fixed("heavy", 1.6, 12, 30)

COMPRESSION = Recipe(
    name="compression",
    stages=(
        Resize(scale=1 / 4, modes={"area": 1}),
        Codec(codec="libx264", quality=(30, 30)),
    ),
)

# What the built-in model trains on: spans and surrounds mild to heavy.
_X264 = Codec(codec="libx264", quality=(20, 36), preset="veryfast")
_MPEG4 = Codec(codec="mpeg4", quality=(2, 12))
TRAINING = Recipe(
    name="training",
    drift=0.1,
    stages=(
        Blur(sigma=(0.2, 2.2), anisotropic=0.3),
        Resize(scale=1 / 4, modes={"area": 0.7, "bicubic": 0.15, "bilinear": 0.15}),
        Noise(sigma=(0, 18 / 255), scale=(0, 1.6), poisson=0.25, grey=0.3),
        OneOf(
            (0.75, 0.0625, 0.0625, 0.0625, 0.0625),
            (
                (Jpeg(quality=(20, 95)),),
                (_X264,),
                (_MPEG4,),
                (Jpeg(quality=(60, 95)), _X264),
                (Jpeg(quality=(60, 95)), _MPEG4),
            ),
        ),
    ),
)
