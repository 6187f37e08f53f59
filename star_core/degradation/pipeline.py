"""Degrades clean video to the small, distorted video from which restoration starts.

A recipe is a sequence of stages (blur, resize, noise, JPEG, codec). Its random parameters are drawn
once per clip and drift slowly in time, like those of a camera and a transmission.
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
BETAS: dict[ops.KernelKind, tuple[Range, Range]] = {  # one or the other range, equally often
    "generalized": ((0.5, 1.0), (1.0, 4.0)),
    "plateau": ((1.0, 1.0), (1.0, 2.0)),
}


class ClipRandom(SeededRandom):
    """Draws the random parameters of a clip.

    frames: the clip's number of frames. drift: see `Recipe`.
    """

    def __init__(self, generator: torch.Generator, frames: int, drift: float) -> None:
        super().__init__(generator)
        self.frames, self.drift = frames, drift

    def drifting(self, bounds: Range) -> float | list[float]:
        """Draws a number uniformly in `bounds`; with drift a slow sine around it, one per frame."""
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
    """A step of a recipe."""

    def draw(self, rng: ClipRandom) -> list[tuple["Stage", Parameters]]:
        """Draws the parameters; returns the stages to apply with them, none to leave it out."""
        ...

    def apply(
        self, video: Tensor, parameters: Parameters, generator: torch.Generator, clean: Size
    ) -> Tensor:
        """Degrades frames (f 3 h w) in [0, 1].

        parameters: drawn by `draw`. generator: for noise. clean: height and width of the video
        before all stages.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Blur:
    """Blurs with a Gaussian of `sigma` pixels.

    anisotropic: the probability of two widths and an angle.
    """

    sigma: Range
    anisotropic: float = 0.0

    def draw(self, rng: ClipRandom) -> list[tuple[Stage, Parameters]]:
        """Draws the width, or two widths and an angle."""
        parameters: Parameters = {"op": "blur", "sigma": rng.drifting(self.sigma)}
        if rng.chance(self.anisotropic):
            parameters["sigma_y"] = rng.drifting(self.sigma)
            parameters["theta"] = rng.drifting((-math.pi, math.pi))
        return [(self, parameters)]

    def apply(
        self, video: Tensor, parameters: Parameters, generator: torch.Generator, clean: Size
    ) -> Tensor:
        """Blurs frames (f 3 h w)."""
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
    """Blurs with a random kernel, as in Real-ESRGAN.

    The kernel is a Gaussian, generalised Gaussian or plateau, round or elliptic, of width `sigma`
    in pixels. probability: of this stage. sinc: of a sinc filter instead. size: a range of odd
    kernel sizes.
    """

    sigma: Range
    probability: float = 1.0
    sinc: float = 0.1
    size: Size = (7, 21)

    def draw(self, rng: ClipRandom) -> list[tuple[Stage, Parameters]]:
        """Draws the kernel; nothing with probability 1 - `probability`."""
        if not rng.chance(self.probability):
            return []
        size = self.size[0] + 2 * rng.below((self.size[1] - self.size[0]) // 2 + 1)
        if rng.chance(self.sinc):
            lowest = math.pi / (3 if size < 13 else 5)
            cutoff = rng.drifting((lowest, math.pi))
            return [(self, {"op": "sinc", "size": size, "cutoff": cutoff})]
        kind, round_ = rng.choice(KERNEL_KINDS)
        parameters: Parameters = {"op": "kernel", "kind": kind, "size": size}
        parameters["sigma"] = rng.drifting(self.sigma)
        if not round_:
            parameters["sigma_y"] = rng.drifting(self.sigma)
            parameters["theta"] = rng.drifting((-math.pi, math.pi))
        if kind != "gaussian":
            low, high = BETAS[kind]
            parameters["beta"] = rng.drifting(low if rng.chance(0.5) else high)
        return [(self, parameters)]

    def apply(
        self, video: Tensor, parameters: Parameters, generator: torch.Generator, clean: Size
    ) -> Tensor:
        """Blurs frames (f 3 h w) with the kernels drawn."""
        size = parameters["size"]

        def kernel(values: Parameters) -> Tensor:
            if values["op"] == "sinc":
                return ops.sinc_kernel(size, values["cutoff"])
            sigma = (values["sigma"], values.get("sigma_y", values["sigma"]))
            theta, beta = values.get("theta", 0.0), values.get("beta", 1.0)
            return ops.blur_kernel(size, sigma, theta, kind=values["kind"], beta=beta)

        kernels = [kernel(values) for values in each_frame(parameters, video)]
        return ops.blur(video, torch.stack(kernels))


@dataclass(frozen=True, kw_only=True)
class Sinc:
    """Filters with a sinc, which causes the ringing of resized and sharpened video.

    probability: of this stage. size: a range of odd kernel sizes. cutoff: in radians per pixel.
    """

    probability: float = 0.8
    size: Size = (7, 21)
    cutoff: Range = (math.pi / 3, math.pi)

    def draw(self, rng: ClipRandom) -> list[tuple[Stage, Parameters]]:
        """Draws the cutoff and size; nothing with probability 1 - `probability`."""
        if not rng.chance(self.probability):
            return []
        size = self.size[0] + 2 * rng.below((self.size[1] - self.size[0]) // 2 + 1)
        return [(self, {"op": "sinc", "size": size, "cutoff": rng.drifting(self.cutoff)})]

    def apply(
        self, video: Tensor, parameters: Parameters, generator: torch.Generator, clean: Size
    ) -> Tensor:
        """Filters frames (f 3 h w)."""
        kernels = [
            ops.sinc_kernel(parameters["size"], values["cutoff"])
            for values in each_frame(parameters, video)
        ]
        return ops.blur(video, torch.stack(kernels))


@dataclass(frozen=True, kw_only=True)
class Resize:
    """Resizes to `scale` times the clean video's size (sides rounded down).

    modes: the interpolation modes with their weights. up, down: the probabilities of a larger or
    smaller size than that, each with the range of factors. of_now: whether `scale` refers to the
    video's current size instead of the clean one. reference_width: whether to compute the width as
    the released code's second resize does, which forgets to scale it.
    """

    scale: float
    modes: dict[ops.ResizeMode, float]
    up: tuple[float, Range] = (0.0, (1.0, 1.0))
    down: tuple[float, Range] = (0.0, (1.0, 1.0))
    of_now: bool = False
    reference_width: bool = False

    def draw(self, rng: ClipRandom) -> list[tuple[Stage, Parameters]]:
        """Draws the factor and the interpolation mode."""
        factor = 1.0
        if self.up[0] or self.down[0]:
            same = 1 - self.up[0] - self.down[0]
            ranges = {"up": self.up[1], "down": self.down[1], "same": (1.0, 1.0)}
            weights = {"up": self.up[0], "down": self.down[0], "same": same}
            factor = rng.uniform(*ranges[rng.choice(weights)])
        mode = rng.choice(self.modes)
        return [(self, {"op": "resize", "scale": self.scale * factor, "mode": mode})]

    def apply(
        self, video: Tensor, parameters: Parameters, generator: torch.Generator, clean: Size
    ) -> Tensor:
        """Resizes frames (f 3 h w); `clean` is the clean video's (h, w)."""
        scale = parameters["scale"]
        size = video.shape[-2:] if self.of_now else clean
        # Slightly more, because rounding errors would turn 0.3 * 10 into 2.
        h, w = (math.floor(side * scale + 1e-6) for side in size)
        if self.reference_width:
            w = math.floor(clean[1] / self.scale * scale + 1e-6)
        return ops.resize(video, (h, w), parameters["mode"])


@dataclass(frozen=True, kw_only=True)
class Noise:
    """Adds white noise of standard deviation `sigma` in units of the range, or photon noise.

    scale: of the photon noise, see `ops.poisson_noise`. poisson: the probability of photon noise.
    grey: the probability of noise that is equal in all channels.
    """

    sigma: Range
    scale: Range = (0.0, 0.0)
    poisson: float = 0.0
    grey: float = 0.0

    def draw(self, rng: ClipRandom) -> list[tuple[Stage, Parameters]]:
        """Draws the kind of noise and its strength."""
        if rng.chance(self.poisson):
            parameters = {"op": "poisson_noise", "scale": rng.drifting(self.scale)}
        else:
            parameters = {"op": "gaussian_noise", "sigma": rng.drifting(self.sigma)}
        return [(self, parameters | {"grey": rng.chance(self.grey)})]

    def apply(
        self, video: Tensor, parameters: Parameters, generator: torch.Generator, clean: Size
    ) -> Tensor:
        """Adds noise from `generator` to frames (f 3 h w)."""
        grey = parameters["grey"]
        if "scale" in parameters:
            scale = torch.as_tensor(parameters["scale"])
            return ops.poisson_noise(video, scale, generator=generator, grey=grey)
        sigma = torch.as_tensor(parameters["sigma"])
        return ops.gaussian_noise(video, sigma, generator=generator, grey=grey)


@dataclass(frozen=True, kw_only=True)
class Jpeg:
    """Compresses every frame as a JPEG picture of `quality` in [1, 100]."""

    quality: Range

    def draw(self, rng: ClipRandom) -> list[tuple[Stage, Parameters]]:
        """Draws the quality."""
        return [(self, {"op": "jpeg", "quality": rng.drifting(self.quality)})]

    def apply(
        self, video: Tensor, parameters: Parameters, generator: torch.Generator, clean: Size
    ) -> Tensor:
        """Compresses frames (f 3 h w)."""
        return jpeg(video, torch.as_tensor(parameters["quality"]))


@dataclass(frozen=True, kw_only=True)
class Codec:
    """Compresses the clip as video, at a constant quality or a constant rate.

    quality: a range in the codec's scale (crf, or qscale for mpeg4; larger is worse). frame_bits:
    instead of it, a range of the average bits per frame. preset: of libx264 and libx265.
    """

    codec: VideoCodec
    quality: Range | None = None
    frame_bits: Range | None = None
    preset: str = "medium"

    def draw(self, rng: ClipRandom) -> list[tuple[Stage, Parameters]]:
        """Draws the quality or the bit rate."""
        parameters: Parameters = {"op": "codec", "codec": self.codec}
        if self.frame_bits is not None:
            # One frame per second, so that bits per second are bits per frame.
            rate = float(math.floor(rng.uniform(*self.frame_bits)))
            return [(self, parameters | {"bitrate": rate, "fps": 1.0})]
        assert self.quality is not None
        rate = "qscale" if self.codec == "mpeg4" else "crf"
        return [(self, parameters | {rate: rng.uniform(*self.quality)})]

    def apply(
        self, video: Tensor, parameters: Parameters, generator: torch.Generator, clean: Size
    ) -> Tensor:
        """Encodes and decodes frames (f 3 h w)."""
        arguments = {key: value for key, value in parameters.items() if key != "op"}
        return codec_round_trip(video, **arguments, preset=self.preset)


@dataclass(frozen=True)
class OneOf:
    """Applies one of several sequences of stages, chosen at random by weight."""

    weights: tuple[float, ...]
    sequences: tuple[tuple[Stage, ...], ...]

    def draw(self, rng: ClipRandom) -> list[tuple[Stage, Parameters]]:
        """Draws a sequence and the parameters of its stages."""
        index = rng.choice(dict(enumerate(self.weights)))
        return [step for stage in self.sequences[index] for step in stage.draw(rng)]

    def apply(
        self, video: Tensor, parameters: Parameters, generator: torch.Generator, clean: Size
    ) -> Tensor:
        """Raises AssertionError: `draw` returns the chosen stages instead."""
        raise AssertionError("draw() returns the chosen stages instead of this one")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A sequence of stages.

    drift: how far a drawn parameter swings in time, as a share of its range. sharpen: whether the
    clean video is sharpened first; the sharpened one is then the target (`clean_target`).
    per_frame: whether every frame has parameters of its own and is degraded alone, even by codecs,
    as in the released code.
    """

    name: str
    stages: tuple[Stage, ...] = field(repr=False)
    drift: float = 0.0
    sharpen: bool = False
    per_frame: bool = False


# The number of frames that are degraded at once. A clip's parameters extend over all its parts.
PART = 64


def batched(frames: Iterable[Tensor], count: int) -> Iterator[list[Tensor]]:
    """Yields lists of `count` frames, the last of which may be shorter."""
    frames = iter(frames)
    while part := list(islice(frames, count)):
        yield part


def clean_target(video: Tensor, recipe: Recipe) -> Tensor:
    """Returns the target (f 3 h w) in [0, 1] of a network whose input is the degraded clip."""
    return ops.usm_sharpen(video) if recipe.sharpen else video


class Degradation:
    """A recipe with all parameters drawn, for one clip.

    frames: the clip's number of frames. seed: from 0 to 2^64 - 1; ValueError for another one. Equal
    clip, recipe and seed give equal results on one machine.
    record: recipe, seed and the stages' parameters as JSON; a parameter that drifts is a list.
    """

    def __init__(self, recipe: Recipe, frames: int, seed: int) -> None:
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed must be in [0, 2^64), got {seed}")
        self.recipe, self.frames = recipe, frames
        generator = torch.Generator().manual_seed(seed)
        length = 1 if recipe.per_frame else frames
        # All parameters first, so that they do not depend on the number of noisy pixels.
        clips = [
            [step for stage in recipe.stages for step in stage.draw(rng)]
            for rng in (
                ClipRandom(generator, length, recipe.drift)
                for _ in range(frames if recipe.per_frame else 1)
            )
        ]
        self._clips, self._generator = clips, generator
        drawn = [[parameters for _, parameters in steps] for steps in clips]
        self.record: Parameters = {"recipe": recipe.name, "seed": seed}
        self.record |= {"frames": drawn} if recipe.per_frame else {"stages": drawn[0]}

    def apply(self, frames: Iterable[Tensor]) -> Iterator[Tensor]:
        """Yields degraded frames (3 h w) in [0, 1], rounded to 8-bit levels; call it only once.

        frames: the clean ones, (3 h w) in [0, 1]. At most `PART` of them are in memory. Raises
        ValueError for frames that are not RGB.
        """
        done, length = 0, 1 if self.recipe.per_frame else PART
        for part in batched(frames, length):
            if any(frame.ndim != 3 or len(frame) != 3 for frame in part):
                raise ValueError(f"frames must be RGB (3 h w), got {tuple(part[0].shape)}")
            video = clean_target(torch.stack(part), self.recipe)
            clean = (video.shape[-2], video.shape[-1])
            for stage, parameters in self._clips[done if self.recipe.per_frame else 0]:
                if not self.recipe.per_frame:
                    parameters = part_of(parameters, range(done, done + len(part)), self.frames)
                video = stage.apply(video, parameters, self._generator, clean)
            done += len(part)
            yield from (video.clamp(0, 1) * 255).round() / 255


def degrade_video(video: Tensor, recipe: Recipe, seed: int) -> tuple[Tensor, Parameters]:
    """Degrades one clip (f 3 h w) in [0, 1]; returns it and the record, see `Degradation`.

    The degraded clip (f 3 h//4 w//4) for recipes of scale 4 is in [0, 1], rounded to 8-bit levels,
    on the device of `video`. Raises ValueError for another shape or a seed outside 0 to 2^64 - 1.
    """
    if video.ndim != 4 or video.shape[1] != 3:
        raise ValueError(f"degrade_video needs RGB frames (f 3 h w), got {tuple(video.shape)}")
    degradation = Degradation(recipe, len(video), seed)
    return torch.stack(list(degradation.apply(video))), degradation.record


def part_of(parameters: Parameters, part: range, frames: int) -> Parameters:
    """Returns the parameters of a part of a clip of `frames` frames."""
    drifting = {k: v for k, v in parameters.items() if isinstance(v, list) and len(v) == frames}
    return parameters | {key: value[part.start : part.stop] for key, value in drifting.items()}


def each_frame(parameters: Parameters, video: Tensor) -> list[Parameters]:
    """Returns the parameters of every frame as plain numbers."""
    return [
        {key: value[i] if isinstance(value, list) else value for key, value in parameters.items()}
        for i in range(len(video))
    ]


def _per_frame(value: float | list[float], frames: int) -> list[float]:
    return value if isinstance(value, list) else [value] * frames
