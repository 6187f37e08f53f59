"""The denoiser: turns a network that predicts velocity into the x_0 prediction that solvers use.

Classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598), with the standard deviation
rescaled towards that of the conditional prediction (Lin et al. 2023, arXiv:2305.08891).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..devices import send
from .schedule import NoiseSchedule
from .shortcuts import DeepFeatures, Shortcuts, clear_unless_in_step
from .step_cache import StepCache


def guided_velocity(
    v_c: Tensor, v_u: Tensor, scale: float | Tensor, rescale: float | None
) -> Tensor:
    """Returns the velocity guided from the unconditional v_u towards the conditional v_c.

    v_c, v_u: (b c f h w). scale: 1 returns v_c; a number, or (b 1 1 1 1). rescale: from 0 or None
    (no rescaling) to 1 (each sample gets the standard deviation of its v_c). The deviation is taken
    over all of (c f h w), so it depends on the frames passed in.
    """
    v = v_u + scale * (v_c - v_u)
    if not rescale:
        return v
    std = (1, 2, 3, 4)
    ratio = v_c.std(std, keepdim=True) / (v.std(std, keepdim=True) + 1e-12)
    return v * (rescale * ratio + 1 - rescale)


def dynamic_guidance(t: Tensor, *, scale: float, steps: int, exponent: int = 5) -> float:
    """Returns CogVideoX's guidance scale at timestep t (b,), from 1 to 1 + scale.

    It was meant to grow with the step number, but the original uses the timestep in place of the
    step number (specification of the second backbone, section 0), so it jumps between steps.
    """
    progress = (steps - float(t[0])) / steps
    return 1 + scale * (1 - math.cos(math.pi * progress**exponent)) / 2


def threshold(x_0: Tensor, percentile: float | None, clamp: float | None) -> Tensor:
    """Bounds a prediction x_0 (b c f h w); returns it unchanged if both are None, as in STAR.

    percentile: dynamic thresholding (Saharia et al. 2022, arXiv:2205.11487): each sample is clamped
        to this quantile (0 to 1) of its magnitudes, or to 1 if that is more, and divided by it.
    clamp: clamps to [-clamp, clamp]; ignored if percentile is not None.
    """
    if percentile is not None:
        magnitudes = x_0.flatten(1).abs().float()
        bound = torch.quantile(magnitudes, percentile, dim=1).clamp(min=1).reshape(-1, 1, 1, 1, 1)
        return x_0.clamp(-bound, bound) / bound
    return x_0 if clamp is None else x_0.clamp(-clamp, clamp)


@dataclass(frozen=True, kw_only=True, eq=False)
class Denoiser:
    """Predicts x_0 with the network and guidance: `denoiser(x_in, edm_sigma)`.

    Each run needs a new one, because it caches features and prompts. network: called as
    `models.unet.ControlledVideoUNet`, with timesteps on the device of the noise levels.
    positive, negative: text embeddings (b l d). hint: latents of the low-quality video (b c f h w).
    guidance_scale: a number or a function of the timesteps t (b,); 1 skips the negative prompt,
    which halves the work. guidance_rescale: see `guided_velocity`.
    percentile, clamp: see `threshold`.
    dtype: dtype of the network's input; guidance and x_0 are computed in the dtype of x_in.
    shortcuts: only its guidance, reuse and cache are applied here.
    last: EDM noise level () of the last evaluation, which no cache replaces; None if unknown.
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
    last: Tensor | None = None
    # For each window, the features of the positive and of the negative prompt.
    _deep: dict[range | None, tuple[DeepFeatures, DeepFeatures]] = field(
        default_factory=dict, init=False
    )
    _caches: dict[range | None, StepCache] = field(default_factory=dict, init=False)
    _prompts: dict[int, Tensor] = field(default_factory=dict, init=False)  # where the network is

    def __call__(self, x_in: Tensor, edm_sigma: Tensor, window: range | None = None) -> Tensor:
        """Returns x_0 (b c f h w) for latents x_in scaled to unit variance.

        edm_sigma: noise level, () or (b,). The network gets the rounded timestep, whose alpha and
        sigma also convert its velocity. window: indices of the frames of x_in in the clip, None if
        x_in is the whole clip.
        """
        t = self.schedule.model_timestep(edm_sigma).expand(len(x_in))
        if not (limit := self.shortcuts.cache):
            return self._x_0(x_in, t, window)
        cache, timestep = self._caches.setdefault(window, StepCache(limit=limit)), int(t[0])
        is_last = self.last is not None and bool((edm_sigma <= self.last).all())
        x_0 = None if is_last else cache.recall(timestep)
        if x_0 is None:
            x_0 = self._x_0(x_in, t, window)
            cache.keep(timestep, x_0)
        return x_0

    def _x_0(self, x_in: Tensor, t: Tensor, window: range | None) -> Tensor:
        low, high = self.shortcuts.guidance
        scale = self.guidance_scale(t) if callable(self.guidance_scale) else self.guidance_scale
        guided = scale != 1 and bool(((low <= t) & (t < high)).all())
        hint = self.hint
        if hint is not None:
            hint = hint if window is None else hint[:, :, window.start : window.stop]
            hint = send(hint, x_in.device, self.dtype)

        prompts = [self.positive, self.negative] if guided else [self.positive]
        deep = None
        if max_age := self.shortcuts.reuse:
            both = self._deep.setdefault(
                window, (DeepFeatures(max_age=max_age), DeepFeatures(max_age=max_age))
            )
            clear_unless_in_step(deep := both[: len(prompts)])

        def velocity(number: int) -> Tensor:
            if number not in self._prompts:
                self._prompts[number] = send(prompts[number], x_in.device, self.dtype)
            y = self._prompts[number].expand(len(x_in), -1, -1)
            reused = {"deep": deep[number]} if deep else {}
            return self.network(x_in.to(self.dtype), t, y, hint, **reused).to(x_in.dtype)

        v = velocity(0)
        if guided:
            v = guided_velocity(v, velocity(1), scale, self.guidance_rescale)
        return threshold(self.schedule.x_0(x_in, v, t), self.percentile, self.clamp)
