"""From a velocity network to the prediction of x_0 that solvers ask for.

Classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598), with the standard deviation
rescaled towards that of the conditional prediction (Lin et al. 2023, arXiv:2305.08891).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .schedule import NoiseSchedule
from .shortcuts import DeepFeatures, Shortcuts, in_step


def guided_velocity(v_c: Tensor, v_u: Tensor, scale: float, rescale: float | None) -> Tensor:
    """Guidance of the conditional velocity v_c away from the unconditional v_u, (b c f h w).

    rescale: 0 or None leaves the result as it is, 1 gives each sample the standard deviation of its
    v_c. That is taken over all of (c f h w), so it depends on the frames passed in.
    """
    v = v_u + scale * (v_c - v_u)
    if not rescale:
        return v
    std = (1, 2, 3, 4)
    ratio = v_c.std(std, keepdim=True) / (v.std(std, keepdim=True) + 1e-12)
    return v * (rescale * ratio + 1 - rescale)


def dynamic_guidance(t: Tensor, *, scale: float, steps: int, exponent: int = 5) -> float:
    """Guidance scale at timestep t (b,): 1 to 1 + scale, as CogVideoX's samplers take it.

    Meant to grow with the steps, but the timestep stands where their number should (specification
    of the second backbone, section 0): it jumps from step to step.
    """
    progress = (steps - float(t[0])) / steps
    return 1 + scale * (1 - math.cos(math.pi * progress**exponent)) / 2


def threshold(x_0: Tensor, percentile: float | None, clamp: float | None) -> Tensor:
    """Bound a prediction (b c f h w); both None leave it as it is, as STAR does.

    percentile: dynamic thresholding (Saharia et al. 2022, arXiv:2205.11487): each sample is clamped
        to this quantile (0 to 1) of its magnitudes, or to 1 if that is more, and divided by it.
    clamp: to [-clamp, clamp], where no percentile is given.
    """
    if percentile is not None:
        magnitudes = x_0.flatten(1).abs().float()
        bound = torch.quantile(magnitudes, percentile, dim=1).clamp(min=1).reshape(-1, 1, 1, 1, 1)
        return x_0.clamp(-bound, bound) / bound
    return x_0 if clamp is None else x_0.clamp(-clamp, clamp)


@dataclass(frozen=True, kw_only=True, eq=False)
class Denoiser:
    """Calls the network and turns its velocity into x_0: `denoiser(x_in, edm_sigma)`.

    One for each run. network: as `models.unet.ControlledVideoUNet`.
    positive, negative: text embeddings (b l d). hint: latents of the low-quality video (b c f h w).
    guidance_scale: 1 leaves out the negative prompt and halves the work; or a function of t (b,).
    guidance_rescale, percentile, clamp: see `guided_velocity` and `threshold`.
    dtype: what the network gets; guidance and x_0 are computed in the dtype of x_in.
    shortcuts: guidance and reuse; `attention_window` is for the network itself.
    """

    network: Callable[..., Tensor]
    schedule: NoiseSchedule
    positive: Tensor
    negative: Tensor
    hint: Tensor | None
    guidance_scale: float | Callable[[Tensor], float] = 7.5
    guidance_rescale: float | None = 0.2
    percentile: float | None = None
    clamp: float | None = None
    dtype: torch.dtype = torch.float32
    shortcuts: Shortcuts = Shortcuts()
    # Of each window those of the positive and those of the negative prompt.
    _deep: dict[range | None, tuple[DeepFeatures, DeepFeatures]] = field(
        default_factory=dict, init=False
    )

    def __call__(self, x_in: Tensor, edm_sigma: Tensor, window: range | None = None) -> Tensor:
        """x_0 of x_in (b c f h w), which the solver has scaled to unit variance.

        The network sees the rounded timestep, whose alpha and sigma convert its velocity; solvers
        keep the exact edm_sigma, () or (b,). window: which frames of the clip x_in holds.
        """
        t = self.schedule.model_timestep(edm_sigma).expand(len(x_in))
        low, high = self.shortcuts.guidance
        scale = self.guidance_scale(t) if callable(self.guidance_scale) else self.guidance_scale
        guided = scale != 1 and bool(((low <= t) & (t < high)).all())
        t = t.to(x_in.device)
        hint = self.hint
        if hint is not None:
            hint = hint if window is None else hint[:, :, window.start : window.stop]
            hint = hint.to(x_in.device, self.dtype)

        prompts = [self.positive, self.negative] if guided else [self.positive]
        deep = None
        if within := self.shortcuts.reuse:
            both = self._deep.setdefault(
                window, (DeepFeatures(within=within), DeepFeatures(within=within))
            )
            in_step(deep := both[: len(prompts)])

        def velocity(number: int) -> Tensor:
            y = prompts[number].to(x_in.device, self.dtype).expand(len(x_in), -1, -1)
            known = {"deep": deep[number]} if deep else {}
            return self.network(x_in.to(self.dtype), t, y, hint, **known).to(x_in.dtype)

        v = velocity(0)
        if guided:
            v = guided_velocity(v, velocity(1), scale, self.guidance_rescale)
        return threshold(self.schedule.x_0(x_in, v, t), self.percentile, self.clamp)
