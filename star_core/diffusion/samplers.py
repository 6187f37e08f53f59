"""Solvers of the reverse process: functions of (denoise, start, sigmas).

All share one signature. `denoise(x_in, sigma) -> x_0` gets its input scaled to unit variance.
`start` is (b c f h w) noised latents of unit variance; solvers multiply it by sigmas[0], as the
reference does, although noised / alpha would be consistent: 0.09 % at STAR's level 900, 3 % at 600.
Divide by the schedule's sigma beforehand to start consistently. `sigmas` are descending EDM noise
levels with the trailing 0 of `schedule.sampling_sigmas`; the first may be inf.
`noise(step, sigma, sigma_next)` gives unit-variance noise like x; `on_step(step, total, x_0)` is
called after each step, counted from 1, and an exception from it aborts.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

Denoise = Callable[[Tensor, Tensor], Tensor]
SolverNoise = Callable[[int, Tensor, Tensor], Tensor]
OnStep = Callable[[int, int, Tensor], None]


def _denoise_at(denoise: Denoise, x: Tensor, sigma: Tensor) -> Tensor:
    return denoise(x / torch.sqrt(sigma**2 + 1), sigma)


def _scaled_start(start: Tensor, sigmas: Tensor) -> Tensor:
    """Pure noise, at an infinite sigma, keeps unit variance; so does what has no step to take."""
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
    """DPM-Solver++(2M) SDE (Lu et al. 2022, arXiv:2211.01095), one evaluation a step.

    eta: 0 deterministic, 1 the full SDE. s_noise: scale of the noise added.
    solver_type: "midpoint" or "heun", how the previous x_0 enters.
    renew: the step from an infinite level takes fresh noise, as the full SDE does there and
        CogVideoX's solver with it; False keeps that of the start, as the reference on I2VGen-XL.
    """
    if solver_type not in ("midpoint", "heun"):
        raise ValueError(f'solver type must be "midpoint" or "heun", got {solver_type!r}')
    total = len(sigmas) - 1
    x = _scaled_start(start, sigmas)
    previous, h_previous = None, None
    for step in range(total):
        sigma, sigma_next = sigmas[step], sigmas[step + 1]
        if sigma.isinf():
            # pure noise is already scaled; its x_0 has no finite step size to extrapolate with
            x_0 = denoise(x, sigma)
            if renew and eta > 0 and sigma_next > 0:
                x = noise(step, sigma, sigma_next).to(x)
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
                    x = x + noise(step, sigma, sigma_next).to(x) * scale
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
    """Heun's second-order method (Karras et al. 2022, algorithm 2), two evaluations a step.

    The last step, to 0, is Euler's and takes one. s_churn: how much noise is added and removed
    again at levels from s_tmin to s_tmax, with scale s_noise; 0 is deterministic.
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
                extra = torch.sqrt(raised**2 - sigma**2) * s_noise
                x = x + noise(step, sigma, sigma_next).to(x) * extra
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


SAMPLERS = {
    "dpmpp_2m_sde": sample_dpmpp_2m_sde,
    "dpmpp_2m_sde_renewed": partial(sample_dpmpp_2m_sde, renew=True),
    "heun": sample_heun,
}


def refuse_crashes(*, frames: int, chunk_length: int, sampler: str, evaluations: int) -> None:
    """ValueError for a run on which the reference crashes, naming the cure.

    evaluations: number of noise levels before the trailing 0.
    """
    cures = []
    if sampler != "dpmpp_2m_sde":
        cures.append("sampler dpmpp_2m_sde")
    if evaluations < 2:
        cures.append("at least 2 steps")
    if chunk_length < frames <= 1.25 * chunk_length:
        cures.append(f"chunks of {frames} frames")
    if cures:
        raise ValueError(
            f"the reference crashes on this: use {' and '.join(cures)}, or leave out reference"
        )
