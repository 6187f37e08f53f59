"""Settings of a run: those that determine its result, and those of its execution."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .color_fix import COLOR_FIXES
from .diffusion.levels import levels_of
from .diffusion.noise import FrameNoise
from .diffusion.samplers import SAMPLERS
from .diffusion.scaled_linear import NoiseLevels
from .diffusion.shortcuts import Shortcuts
from .models.slicing import Slicing
from .parity import DEFAULT, Behaviour
from .sampling_defaults import SamplingDefaults
from .windows.chunking import ChunkConfig
from .windows.tiling import Tile


@dataclass(frozen=True, kw_only=True)
class Execution:
    """How a run is computed, which changes nothing in its result.

    device: where the modules work. slicing: how much the network's layers work on at a time, and
    whether idle weights and skip connections are offloaded to main memory.
    """

    device: torch.device | str = "cpu"
    slicing: Slicing = field(default_factory=Slicing)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that the result depends on besides the model, the prompts and the frames.

    strength: how far each prediction of x_0 moves away from the input's latents, 0 to 1; at 0 the
    result is the bicubic enlargement. shrink: by what factor, at least 1, the input is reduced
    before it is enlarged for the model; the size of the result stays the same. seed: 0 to 2^64-1.
    chunk: temporal windows. tile, latent_tile: spatial tiles of the VAE and of the network, in
    pixels of the result; None for whole frames. shortcuts: work that the network leaves out.
    behaviour: the repaired default or that of the reference. ValueError for values out of range.
    """

    sampling: SamplingDefaults = field(default_factory=SamplingDefaults)
    strength: float = 1.0
    shrink: float = 1.0
    seed: int = 666
    chunk: ChunkConfig = field(default_factory=ChunkConfig)
    tile: Tile | None = None
    latent_tile: Tile | None = None
    shortcuts: Shortcuts = field(default_factory=Shortcuts)
    behaviour: Behaviour = DEFAULT

    def __post_init__(self) -> None:
        sampling = self.sampling
        if not 0 <= self.strength <= 1:
            raise ValueError(f"strength must be from 0 to 1, got {self.strength}")
        if not (math.isfinite(self.shrink) and self.shrink >= 1):
            raise ValueError(f"shrink must be a finite number from 1 up, got {self.shrink:g}")
        if not math.isfinite(sampling.cfg):
            raise ValueError(f"cfg must be a finite number, got {sampling.cfg}")
        if not 0 <= sampling.cfg_rescale <= 1:
            raise ValueError(f"cfg rescale must be from 0 to 1, got {sampling.cfg_rescale}")
        for what, value, known in (
            ("sampler", sampling.sampler, SAMPLERS),
            ("color fix", sampling.color_fix, COLOR_FIXES),
        ):
            if value not in known:
                raise ValueError(f"{what} must be one of {', '.join(known)}, got {value!r}")
        if sampling.color_fix == "wavelet" and self.behaviour.color_reference == "source":
            raise ValueError(
                "the wavelet colour fix compares frames of one size, the reference leaves the "
                "input's small: use adain, or leave out reference"
            )
        FrameNoise(self.seed)
        _ = self.levels

    @property
    def levels(self) -> NoiseLevels:
        """The schedule and the EDM noise levels of the run. ValueError if there are none."""
        return levels_of(self.sampling, exact=self.behaviour.noise != "reference")

    @property
    def sigmas(self) -> Tensor:
        """The EDM noise levels of the run with a trailing 0, float32 on the CPU."""
        return self.levels.sigmas

    @property
    def evaluations(self) -> int:
        """Evaluations of each window, both prompts counted as one."""
        steps = len(self.sigmas) - 1
        # Two a step, except in the last one.
        return 2 * steps - 1 if steps and self.sampling.sampler == "heun" else steps
