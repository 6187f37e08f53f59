"""Degradation: from a clean video to the small, bad one that restoration starts from.

A recipe is a sequence of stages (blur, resize, noise, JPEG, codec). Its random parameters are drawn
once per clip and drift slowly in time, as those of a camera and a transmission do.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Protocol

import torch
from torch import Tensor

from ..seeded_random import SeededRandom
from . import ops
from .compression import VideoCodec, codec_round_trip, jpeg

Range = tuple[float, float]
Size = tuple[int, int]
Parameters = dict[str, Any]  # JSON: numbers, strings, and a list where a parameter drifts


KERNEL_KINDS: dict[tuple[ops.KernelKind, bool], float] = {  # kind and whether it is round
    ("gaussian", True): 0.45,
    ("gaussian", False): 0.25,
    ("generalized", True): 0.12,
    ("generalized", False): 0.03,
    ("plateau", True): 0.12,
    ("plateau", False): 0.03,
}
BETAS: dict[ops.KernelKind, tuple[Range, Range]] = {  # one or the other, half of the time
    "generalized": ((0.5, 1.0), (1.0, 4.0)),
    "plateau": ((1.0, 1.0), (1.0, 2.0)),
}


class ClipRandom(SeededRandom):
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
    """A step of a recipe: `draw` fixes what to do, `apply` does it to frames (f 3 h w).

    clean: height and width of the video before any stage.
    """

    def draw(self, draws: ClipRandom) -> list[tuple["Stage", Parameters]]: ...

    def apply(
        self, video: Tensor, parameters: Parameters, generator: torch.Generator, clean: Size
    ) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class Blur:
    """Gaussian blur of `sigma` pixels; with probability `anisotropic` two widths and an angle."""

    sigma: Range
    anisotropic: float = 0.0

    def draw(self, draws: ClipRandom) -> list[tuple[Stage, Parameters]]:
        parameters: Parameters = {"op": "blur", "sigma": draws.drifting(self.sigma)}
        if draws.chance(self.anisotropic):
            parameters["sigma_y"] = draws.drifting(self.sigma)
            parameters["theta"] = draws.drifting((-math.pi, math.pi))
        return [(self, parameters)]

    def apply(
        self, video: Tensor, parameters: Parameters, generator: torch.Generator, clean: Size
    ) -> Tensor:
        if "sigma_y" not in parameters:
            return ops.gaussian_blur(video, torch.as_tensor(parameters["sigma"]))
        size = 2 * math.ceil(4 * self.sigma[1]) + 1
        values = (_per_frame(parameters[key], len(video)) for key in ("sigma", "sigma_y", "theta"))
        kernels = [
            ops.blur_kernel(size, (x, y), theta) for x, y, theta in zip(*values, strict=True)
        ]
        return ops.blur(video, torch.stack(kernels))


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """With `probability` a blur by a random kernel of an odd `size` (Real-ESRGAN): Gaussian,
    generalised Gaussian or plateau, round or not, of width `sigma` and exponent `beta`; a sinc
    with probability `sinc`.
    """

    sigma: Range
    probability: float = 1.0
    sinc: float = 0.1
    size: Size = (7, 21)

    def draw(self, draws: ClipRandom) -> list[tuple[Stage, Parameters]]:
        if not draws.chance(self.probability):
            return []
        size = self.size[0] + 2 * draws.below((self.size[1] - self.size[0]) // 2 + 1)
        if draws.chance(self.sinc):
            lowest = math.pi / (3 if size < 13 else 5)
            cutoff = draws.drifting((lowest, math.pi))
            return [(self, {"op": "sinc", "size": size, "cutoff": cutoff})]
        kind, round_ = draws.choice(KERNEL_KINDS)
        parameters: Parameters = {"op": "kernel", "kind": kind, "size": size}
        parameters["sigma"] = draws.drifting(self.sigma)
        if not round_:
            parameters["sigma_y"] = draws.drifting(self.sigma)
            parameters["theta"] = draws.drifting((-math.pi, math.pi))
        if kind != "gaussian":
            low, high = BETAS[kind]
            parameters["beta"] = draws.drifting(low if draws.chance(0.5) else high)
        return [(self, parameters)]

    def apply(
        self, video: Tensor, parameters: Parameters, generator: torch.Generator, clean: Size
    ) -> Tensor:
        size = parameters["size"]

        def kernel(at: Parameters) -> Tensor:
            if at["op"] == "sinc":
                return ops.sinc_kernel(size, at["cutoff"])
            sigma = (at["sigma"], at.get("sigma_y", at["sigma"]))
            theta, beta = at.get("theta", 0.0), at.get("beta", 1.0)
            return ops.blur_kernel(size, sigma, theta, kind=at["kind"], beta=beta)

        return ops.blur(video, torch.stack([kernel(at) for at in each_frame(parameters, video)]))


@dataclass(frozen=True, kw_only=True)
class Sinc:
    """With `probability` a sinc filter: the ringing of resized and sharpened video."""

    probability: float = 0.8
    size: Size = (7, 21)
    cutoff: Range = (math.pi / 3, math.pi)

    def draw(self, draws: ClipRandom) -> list[tuple[Stage, Parameters]]:
        if not draws.chance(self.probability):
            return []
        size = self.size[0] + 2 * draws.below((self.size[1] - self.size[0]) // 2 + 1)
        return [(self, {"op": "sinc", "size": size, "cutoff": draws.drifting(self.cutoff)})]

    def apply(
        self, video: Tensor, parameters: Parameters, generator: torch.Generator, clean: Size
    ) -> Tensor:
        kernels = [
            ops.sinc_kernel(parameters["size"], at["cutoff"])
            for at in each_frame(parameters, video)
        ]
        return ops.blur(video, torch.stack(kernels))


@dataclass(frozen=True, kw_only=True)
class Resize:
    """Resize to `scale` times the clean video's size (sides rounded down), mode by weight.

    jitter: probabilities of making it larger or smaller than that, and the factors then.
    of_now: `scale` is of the size that the video has by now.
    reference_width: of the released code's second resize, which forgets to scale the width.
    """

    scale: float
    modes: dict[ops.ResizeMode, float]
    up: tuple[float, Range] = (0.0, (1.0, 1.0))
    down: tuple[float, Range] = (0.0, (1.0, 1.0))
    of_now: bool = False
    reference_width: bool = False

    def draw(self, draws: ClipRandom) -> list[tuple[Stage, Parameters]]:
        factor = 1.0
        if self.up[0] or self.down[0]:
            keep = 1 - self.up[0] - self.down[0]
            ranges = {"up": self.up[1], "down": self.down[1], "keep": (1.0, 1.0)}
            weights = {"up": self.up[0], "down": self.down[0], "keep": keep}
            factor = draws.uniform(*ranges[draws.choice(weights)])
        mode = draws.choice(self.modes)
        return [(self, {"op": "resize", "scale": self.scale * factor, "mode": mode})]

    def apply(
        self, video: Tensor, parameters: Parameters, generator: torch.Generator, clean: Size
    ) -> Tensor:
        scale = parameters["scale"]
        size = video.shape[-2:] if self.of_now else clean
        # A hair more, or 0.3 * 10 would be 2.
        h, w = (math.floor(side * scale + 1e-6) for side in size)
        if self.reference_width:
            w = math.floor(clean[1] / self.scale * scale + 1e-6)
        return ops.resize(video, (h, w), parameters["mode"])


@dataclass(frozen=True, kw_only=True)
class Noise:
    """White noise of standard deviation `sigma`, or with probability `poisson` photon noise of
    `scale`; with probability `grey` the same on all channels."""

    sigma: Range
    scale: Range = (0.0, 0.0)
    poisson: float = 0.0
    grey: float = 0.0

    def draw(self, draws: ClipRandom) -> list[tuple[Stage, Parameters]]:
        if draws.chance(self.poisson):
            parameters = {"op": "poisson_noise", "scale": draws.drifting(self.scale)}
        else:
            parameters = {"op": "gaussian_noise", "sigma": draws.drifting(self.sigma)}
        return [(self, parameters | {"grey": draws.chance(self.grey)})]

    def apply(
        self, video: Tensor, parameters: Parameters, generator: torch.Generator, clean: Size
    ) -> Tensor:
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

    def draw(self, draws: ClipRandom) -> list[tuple[Stage, Parameters]]:
        return [(self, {"op": "jpeg", "quality": draws.drifting(self.quality)})]

    def apply(
        self, video: Tensor, parameters: Parameters, generator: torch.Generator, clean: Size
    ) -> Tensor:
        return jpeg(video, torch.as_tensor(parameters["quality"]))


@dataclass(frozen=True, kw_only=True)
class Codec:
    """The clip as compressed video of constant quality, or of a constant rate.

    quality: range of its codec's scale (crf, or qscale of mpeg4; larger is worse).
    frame_bits: range of the bits for a frame, on average, instead.
    """

    codec: VideoCodec
    quality: Range | None = None
    frame_bits: Range | None = None
    preset: str = "medium"

    def draw(self, draws: ClipRandom) -> list[tuple[Stage, Parameters]]:
        parameters: Parameters = {"op": "codec", "codec": self.codec}
        if self.frame_bits is not None:
            # One frame a second, so that the rate of a second is that of a frame.
            rate = float(math.floor(draws.uniform(*self.frame_bits)))
            return [(self, parameters | {"bitrate": rate, "fps": 1.0})]
        assert self.quality is not None
        rate = "qscale" if self.codec == "mpeg4" else "crf"
        return [(self, parameters | {rate: draws.uniform(*self.quality)})]

    def apply(
        self, video: Tensor, parameters: Parameters, generator: torch.Generator, clean: Size
    ) -> Tensor:
        arguments = {key: value for key, value in parameters.items() if key != "op"}
        return codec_round_trip(video, **arguments, preset=self.preset)


@dataclass(frozen=True)
class OneOf:
    """One of several sequences of stages, chosen by weight."""

    weights: tuple[float, ...]
    sequences: tuple[tuple[Stage, ...], ...]

    def draw(self, draws: ClipRandom) -> list[tuple[Stage, Parameters]]:
        index = draws.choice(dict(enumerate(self.weights)))
        return [step for stage in self.sequences[index] for step in stage.draw(draws)]

    def apply(
        self, video: Tensor, parameters: Parameters, generator: torch.Generator, clean: Size
    ) -> Tensor:
        raise AssertionError("draw() returns the chosen stages, never this one")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Stages in order. drift: how far a drawn parameter swings in time, as a share of its range.

    sharpen: the clean video is sharpened first; it is then the sharpened one that goes with the
    result (`clean_target`). per_frame: every frame is drawn and degraded on its own, codecs
    included, as in the released code.
    """

    name: str
    stages: tuple[Stage, ...] = field(repr=False)
    drift: float = 0.0
    sharpen: bool = False
    per_frame: bool = False


# Clips are degraded in parts of so many frames; the clip's drawn parameters go on through them.
PART = 64


def batched(frames: Iterable[Tensor], count: int) -> Iterator[list[Tensor]]:
    frames = iter(frames)
    while part := list(islice(frames, count)):
        yield part


def clean_target(video: Tensor, recipe: Recipe) -> Tensor:
    """What a network that gets the degraded clip should put out: (f 3 h w) in [0, 1]."""
    return ops.usm_sharpen(video) if recipe.sharpen else video


class Degradation:
    """A recipe with everything drawn, for one clip of `frames` frames.

    record: what was drawn, as JSON (recipe, seed, stages with their parameters; a list where one
    drifts). The same clip, recipe and seed (0 to 2^64 - 1) give the same result on one machine.
    """

    def __init__(self, recipe: Recipe, frames: int, seed: int) -> None:
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed must be in [0, 2^64), got {seed}")
        self.recipe, self.frames = recipe, frames
        generator = torch.Generator().manual_seed(seed)
        length = 1 if recipe.per_frame else frames
        # All parameters first: they must not depend on how many pixels drew noise.
        clips = [
            [step for stage in recipe.stages for step in stage.draw(draws)]
            for draws in (
                ClipRandom(generator, length, recipe.drift)
                for _ in range(frames if recipe.per_frame else 1)
            )
        ]
        self._clips, self._generator = clips, generator
        drawn = [[parameters for _, parameters in steps] for steps in clips]
        self.record: Parameters = {"recipe": recipe.name, "seed": seed}
        self.record |= {"frames": drawn} if recipe.per_frame else {"stages": drawn[0]}

    def apply(self, frames: Iterable[Tensor]) -> Iterator[Tensor]:
        """Clean frames (3 h w) in [0, 1] -> small ones in 8-bit levels; may be called once.

        At most 64 frames are held. ValueError for what is not RGB.
        """
        done, length = 0, 1 if self.recipe.per_frame else PART
        for part in batched(frames, length):
            if any(frame.ndim != 3 or len(frame) != 3 for frame in part):
                raise ValueError(f"RGB frames (3 h w) are degraded, got {tuple(part[0].shape)}")
            video = clean_target(torch.stack(part), self.recipe)
            clean = (video.shape[-2], video.shape[-1])
            for stage, parameters in self._clips[done if self.recipe.per_frame else 0]:
                if not self.recipe.per_frame:
                    parameters = part_of(parameters, range(done, done + len(part)), self.frames)
                video = stage.apply(video, parameters, self._generator, clean)
            done += len(part)
            yield from (video.clamp(0, 1) * 255).round() / 255


def degrade_video(video: Tensor, recipe: Recipe, seed: int) -> tuple[Tensor, Parameters]:
    """Degrade one clip (f 3 h w) in [0, 1] -> (lq, record) as `Degradation` does.

    lq: (f 3 h//4 w//4) in [0, 1], rounded to 8-bit levels, on the clip's device.
    """
    if video.ndim != 4 or video.shape[1] != 3:
        raise ValueError(f"degrade_video takes RGB frames (f 3 h w), got {tuple(video.shape)}")
    degradation = Degradation(recipe, len(video), seed)
    return torch.stack(list(degradation.apply(video))), degradation.record


def part_of(parameters: Parameters, part: range, frames: int) -> Parameters:
    """Those of a few of a clip's frames."""
    drifting = {k: v for k, v in parameters.items() if isinstance(v, list) and len(v) == frames}
    return parameters | {key: value[part.start : part.stop] for key, value in drifting.items()}


def each_frame(parameters: Parameters, video: Tensor) -> list[Parameters]:
    """Parameters of every frame, plain numbers."""
    return [
        {key: value[i] if isinstance(value, list) else value for key, value in parameters.items()}
        for i in range(len(video))
    ]


def _per_frame(value: float | list[float], frames: int) -> list[float]:
    return value if isinstance(value, list) else [value] * frames
