"""Solvers of the reverse process: functions of (denoise, start, sigmas).

All share these arguments:
denoise: (x_in, sigma) -> x_0, whose input is scaled to unit variance.
start: noised latents (b c f h w) of unit variance. Solvers multiply it by sigmas[0], as the
    reference does, although noised / alpha would be consistent: the difference is 0.09 % at STAR's
    level 900 and 3 % at 600. Divide by the schedule's sigma beforehand for a consistent start.
sigmas: descending EDM noise levels with a trailing 0, as from `schedule.sampling_sigmas`; the first
    may be inf.
noise: (step, sigma, sigma_next) -> unit-variance noise of the shape of x.
on_step: called as (step, total, x_0) after each step, counted from 1; an exception aborts the run.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ..devices import send

Denoise = Callable[[Tensor, Tensor], Tensor]
SolverNoise = Callable[[int, Tensor, Tensor], Tensor]
OnStep = Callable[[int, int, Tensor], None]


def _denoise_at(denoise: Denoise, x: Tensor, sigma: Tensor) -> Tensor:
    return denoise(x / torch.sqrt(sigma**2 + 1), sigma)


def _scaled_start(start: Tensor, sigmas: Tensor) -> Tensor:
    """Scales `start` to sigmas[0], except for pure noise (sigma inf) and if there are no steps."""
    return start if len(sigmas) == 1 or sigmas[0].isinf() else start * sigmas[0]


def sample_dpmpp_2m_sde(
    denoise: Denoise,
    start: Tensor,
    sigmas: Tensor,
    *,
    noise: SolverNoise,
    eta: float = 1.0,
    s_noise: float = 1.0,
    solver_type: str = "midpoint",
    renew: bool = False,
    on_step: OnStep | None = None,
) -> Tensor:
    """Samples x_0 (b c f h w) with DPM-Solver++(2M) SDE, one evaluation per step.

    Lu et al. 2022, arXiv:2211.01095. denoise, start, sigmas, noise, on_step: see the module.
    eta: from 0, deterministic, to 1, the full SDE. s_noise: scale of the added noise.
    solver_type: "midpoint" or "heun", how the previous x_0 is used; ValueError for others.
    renew: the step from an infinite level draws fresh noise, as the full SDE and CogVideoX's solver
        do; False keeps the noise of the start, as the reference does on I2VGen-XL.
    """
    if solver_type not in ("midpoint", "heun"):
        raise ValueError(f'solver type must be "midpoint" or "heun", got {solver_type!r}')
    total = len(sigmas) - 1
    x = _scaled_start(start, sigmas)
    previous, h_previous = None, None
    for step in range(total):
        sigma, sigma_next = sigmas[step], sigmas[step + 1]
        if sigma.isinf():
            # pure noise is already scaled; without a finite step size there is no extrapolation
            x_0 = denoise(x, sigma)
            if renew and eta > 0 and sigma_next > 0:
                x = send(noise(step, sigma, sigma_next), x.device, x.dtype)
            x = x_0 + sigma_next * x
        else:
            x_0 = _denoise_at(denoise, x, sigma)
            if sigma_next == 0:
                x = x_0
            else:
                h = sigma.log() - sigma_next.log()
                gain = -torch.expm1(-h - eta * h)
                x = sigma_next / sigma * torch.exp(-eta * h) * x + gain * x_0
                if previous is not None and h_previous is not None:
                    slope = (x_0 - previous) / (h_previous / h)
                    midpoint = solver_type == "midpoint"
                    x = x + (0.5 * gain if midpoint else 1 - gain / (h + eta * h)) * slope
                if eta > 0:
                    scale = sigma_next * torch.sqrt(-torch.expm1(-2 * eta * h)) * s_noise
                    x = x + send(noise(step, sigma, sigma_next), x.device, x.dtype) * scale
                previous, h_previous = x_0, h
        if on_step:
            on_step(step + 1, total, x_0)
    return x


def sample_heun(
    denoise: Denoise,
    start: Tensor,
    sigmas: Tensor,
    *,
    noise: SolverNoise,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
    on_step: OnStep | None = None,
) -> Tensor:
    """Samples x_0 (b c f h w) with Heun's second-order method, two evaluations per step.

    Karras et al. 2022, algorithm 2. The last step, to 0, is an Euler step with one evaluation.
    denoise, start, sigmas, noise, on_step: see the module.
    s_churn: amount of noise that is added and removed again at levels from s_tmin to s_tmax, with
        scale s_noise; 0 is deterministic.
    """
    total = len(sigmas) - 1
    x = _scaled_start(start, sigmas)
    for step in range(total):
        sigma, sigma_next = sigmas[step], sigmas[step + 1]
        if sigma.isinf():
            x_0 = denoise(x, sigma)
            x = x_0 + sigma_next * x
        else:
            churn = min(s_churn / total, math.sqrt(2) - 1) if s_tmin <= sigma <= s_tmax else 0.0
            if churn > 0:
                raised = sigma * (1 + churn)
                scale = torch.sqrt(raised**2 - sigma**2) * s_noise
                x = x + send(noise(step, sigma, sigma_next), x.device, x.dtype) * scale
                sigma = raised
            x_0 = _denoise_at(denoise, x, sigma)
            slope = (x - x_0) / sigma
            if sigma_next == 0:
                x = x_0
            else:
                x_next = x + slope * (sigma_next - sigma)
                slope_next = (x_next - _denoise_at(denoise, x_next, sigma_next)) / sigma_next
                x = x + (slope + slope_next) / 2 * (sigma_next - sigma)
        if on_step:
            on_step(step + 1, total, x_0)
    return x


def sample_euler(
    denoise: Denoise,
    start: Tensor,
    sigmas: Tensor,
    *,
    noise: SolverNoise,
    renew: bool = False,
    on_step: OnStep | None = None,
) -> Tensor:
    """Samples x_0 (b c f h w) with Euler's method, one evaluation per step; for few steps.

    Song et al. 2020 (DDIM), arXiv:2010.02502. denoise, start, sigmas, noise, on_step: see the
    module.
    renew: instead of following the path, each step noises x_0 anew. That is multistep sampling of
        consistency models (Song et al. 2023, arXiv:2303.01469, algorithm 1).
    """
    total = len(sigmas) - 1
    x = _scaled_start(start, sigmas)
    for step in range(total):
        sigma, sigma_next = sigmas[step], sigmas[step + 1]
        x_0 = denoise(x, sigma) if sigma.isinf() else _denoise_at(denoise, x, sigma)
        if sigma_next == 0:
            x = x_0
        elif renew:
            x = x_0 + sigma_next * send(noise(step, sigma, sigma_next), x.device, x.dtype)
        else:
            x = x_0 + sigma_next * (x if sigma.isinf() else (x - x_0) / sigma)
        if on_step:
            on_step(step + 1, total, x_0)
    return x


SAMPLERS = {
    "dpmpp_2m_sde": sample_dpmpp_2m_sde,
    "dpmpp_2m_sde_renewed": partial(sample_dpmpp_2m_sde, renew=True),
    "dpmpp_2m": partial(sample_dpmpp_2m_sde, eta=0.0),
    "heun": sample_heun,
    "euler": sample_euler,
    "lcm": partial(sample_euler, renew=True),
}


def refuse_crashes(*, frames: int, chunk_length: int, sampler: str, evaluations: int) -> None:
    """Raises a ValueError that names the remedy if the reference implementation would crash.

    frames: of the clip. chunk_length: frames of a window. evaluations: number of noise levels
    before the trailing 0.
    """
    remedies = []
    if sampler != "dpmpp_2m_sde":
        remedies.append("sampler dpmpp_2m_sde")
    if evaluations < 2:
        remedies.append("at least 2 steps")
    if chunk_length < frames <= 1.25 * chunk_length:
        remedies.append(f"chunks of {frames} frames")
    if remedies:
        raise ValueError(
            f"the reference crashes on this: use {' and '.join(remedies)}, or leave out reference"
        )
