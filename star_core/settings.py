"""What a user chooses about a run."""

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
class Settings:
    """What a user chooses.

    strength: how far each prediction of x_0 goes from the input's latents, 0 to 1; at 0 the result
    is the bicubic input. shrink: from 1, how much smaller the input is made before it is enlarged
    for the model; the result's size stays. seed: 0 to 2^64-1. tile: spatial tiles of the VAE.
    latent_tile: spatial tiles of the network. slicing: its work at a time. shortcuts: work that it
    leaves out. device: where to compute.
    """

    sampling: SamplingDefaults = field(default_factory=SamplingDefaults)
    strength: float = 1.0
    shrink: float = 1.0
    seed: int = 666
    chunk: ChunkConfig = field(default_factory=ChunkConfig)
    tile: Tile | None = None
    latent_tile: Tile | None = None
    slicing: Slicing = field(default_factory=Slicing)
    shortcuts: Shortcuts = field(default_factory=Shortcuts)
    behaviour: Behaviour = DEFAULT
    device: torch.device | str = "cpu"

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
        """Schedule and EDM noise levels; ValueError if there are none."""
        return levels_of(self.sampling, exact=self.behaviour.noise != "reference")

    @property
    def sigmas(self) -> Tensor:
        """EDM noise levels of the run with a trailing 0, float32."""
        return self.levels.sigmas

    @property
    def evaluations(self) -> int:
        """How often the network looks at each window, once for both prompts."""
        steps = len(self.sigmas) - 1
        # two a step, but for the last
        return 2 * steps - 1 if steps and self.sampling.sampler == "heun" else steps
