"""What a model brings along as data."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class SamplingDefaults:
    """How a model wants to be sampled where the user says nothing.

    The values here are those of the published I2VGen-XL checkpoints (specification, section 8); a
    model file that carries others in its metadata overrides them.
    steps: network evaluations in normal mode. noise_level: 0 to 1000, where sampling starts.
    cfg: guidance scale, 1 switches guidance off. upsample: how the input gets to its final size.
    decode_window: frames that the VAE decodes together.
    """

    steps: int = 15
    solver_mode: Literal["fast", "normal"] = "fast"
    sampler: str = "dpmpp_2m_sde"
    cfg: float = 7.5
    cfg_rescale: float = 0.2
    noise_level: int = 900
    upsample: Literal["bilinear", "bicubic"] = "bilinear"
    color_fix: Literal["adain", "wavelet", "none"] = "adain"
    decode_window: int = 3


@dataclass(frozen=True, kw_only=True)
class LatentFormat:
    """How a model sees its VAE's latents; the defaults are Stable Diffusion's.

    scale: what raw latents are multiplied by. rgb: one row of (r, g, b) a channel that turns scaled
    latents into a small picture in [-1, 1]; None where a host has its own.
    """

    scale: float = 0.18215
    rgb: tuple[tuple[float, ...], ...] | None = None


SD_LATENTS = LatentFormat()
