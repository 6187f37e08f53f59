"""Properties of a model as data: its default sampling settings and its latent format."""

from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class SamplingDefaults:
    """Sampling settings of a model, used unless the user chooses others.

    The defaults are those of the published I2VGen-XL checkpoints (specification, section 8); the
    metadata of a model file overrides them.

    steps: network evaluations in normal mode. noise_level: 0 to 1000, where sampling starts.
    cfg: guidance scale, 1 switches guidance off. upsample: how the input is enlarged.
    decode_window: frames that the VAE decodes together.
    schedule: noise schedule, see `diffusion.levels`.
    shift: shift of the SNR, for "scaled_linear" only. spacing: timestep spacing of a run, for
    "scaled_linear" only, see `diffusion.scaled_linear.run_levels`.
    cfg_mode: "dynamic" varies the scale between 1 and 1 + cfg.
    chunk_frames: frames of one window of the network.
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
    spacing: Literal["star", "diffusers"] = "star"
    cfg_mode: Literal["constant", "dynamic"] = "constant"
    chunk_frames: int = 32
    same_size_strength: float = 1.0

    def usual_strength(self, scale: float) -> float:
        """Returns the default strength (`Settings.strength`) for a result `scale` times as large.

        It grows from `same_size_strength` at scale 1, where the input needs the least change, to 1
        at scale 2.
        """
        return self.same_size_strength + (1 - self.same_size_strength) * min(scale - 1, 1.0)


@dataclass(frozen=True, kw_only=True)
class LatentFormat:
    """Format of the latents that a model takes; the defaults are Stable Diffusion's.

    scale: factor that raw VAE latents are multiplied by. frames: video frames per latent frame; if
    more than 1, the first latent frame holds a single frame. rgb: one row (r, g, b) per channel
    that maps scaled latents to a small preview in [-1, 1]; None if the host has its own.
    """

    scale: float = 0.18215
    frames: int = 1
    rgb: tuple[tuple[float, ...], ...] | None = None


SD_LATENTS = LatentFormat()


# CogVideoX starts from pure noise: it was not trained to continue from less, as a run would do.
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

# CogVideoX-2B as published; the values that STAR used with a network of this size are unknown.
COGVIDEOX_2B_SAMPLING = replace(COGVIDEOX_SAMPLING, shift=3.0)
COGVIDEOX_2B_LATENTS = replace(COGVIDEOX_LATENTS, scale=1.15258426)
