"""What a model brings along as data."""

from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class SamplingDefaults:
    """How a model wants to be sampled where the user says nothing.

    The values here are those of the published I2VGen-XL checkpoints (specification, section 8); a
    model file that carries others in its metadata overrides them.
    steps: network evaluations in normal mode. noise_level: 0 to 1000, where sampling starts.
    cfg: guidance scale, 1 switches guidance off. upsample: how the input gets to its final size.
    decode_window: frames that the VAE decodes together.
    schedule: of the noise, see `diffusion.levels`; the rest is about "scaled_linear" alone. shift:
    of its SNR. levels: which of its levels a run takes, see `diffusion.scaled_linear.run_levels`.
    cfg_mode: "dynamic" lets the scale swing between 1 and 1 + cfg.
    chunk_frames: how many frames the network sees together.
    same_size_strength: see `usual_strength`.
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
    schedule: Literal["cosine", "scaled_linear"] = "cosine"
    shift: float = 1.0
    levels: Literal["star", "diffusers"] = "star"
    cfg_mode: Literal["constant", "dynamic"] = "constant"
    chunk_frames: int = 32
    same_size_strength: float = 1.0

    def usual_strength(self, scale: float) -> float:
        """Of a run (`Settings.strength`) whose result is `scale` times as large as the input: from
        `same_size_strength` at 1, where most of the input must stay as it is, to 1 at 2."""
        return self.same_size_strength + (1 - self.same_size_strength) * min(scale - 1, 1.0)


@dataclass(frozen=True, kw_only=True)
class LatentFormat:
    """How a model sees its VAE's latents; the defaults are Stable Diffusion's.

    scale: what raw latents are multiplied by. frames: how many frames of the video one of latents
    holds; where it is more than 1, the first holds one alone. rgb: one row of (r, g, b) a channel
    that turns scaled latents into a small picture in [-1, 1]; None where a host has its own.
    """

    scale: float = 0.18215
    frames: int = 1
    rgb: tuple[tuple[float, ...], ...] | None = None


SD_LATENTS = LatentFormat()


# A run of CogVideoX starts from pure noise: from less it was never trained to go on as it does.
COGVIDEOX_SAMPLING = SamplingDefaults(
    steps=50,
    solver_mode="normal",
    sampler="dpmpp_2m_sde_renewed",
    cfg=6.0,
    cfg_rescale=0.0,
    noise_level=1000,
    upsample="bicubic",
    schedule="scaled_linear",
    cfg_mode="dynamic",
    chunk_frames=25,
)
COGVIDEOX_LATENTS = LatentFormat(scale=0.7, frames=4)

# CogVideoX-2B as published; with which numbers STAR trained a network of its size is unknown.
COGVIDEOX_2B_SAMPLING = replace(COGVIDEOX_SAMPLING, shift=3.0)
COGVIDEOX_2B_LATENTS = replace(COGVIDEOX_LATENTS, scale=1.15258426)
