"""Noise schedule of CogVideoX: scaled-linear, zero terminal SNR, and the levels of one run.

Betas as in latent diffusion (Rombach et al. 2022), an SNR shift (Yang et al. 2024,
arXiv:2408.06072), and the signal rescaled so that it is 0 at the last level (Lin et al. 2023,
arXiv:2305.08891). Specification of the second backbone, section 5.
"""

import math
from functools import cache
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .schedule import NoiseSchedule


class NoiseLevels(NamedTuple):
    """The noise levels of one run.

    schedule: converts the network's velocities. sigmas: EDM noise levels, descending, with a
    trailing 0; the first may be inf.
    """

    schedule: NoiseSchedule
    sigmas: Tensor


@cache
def scaled_linear_schedule(shift: float = 1.0) -> NoiseSchedule:
    """Returns the 1000 levels that the network was trained on.

    shift: shift of the SNR, 1 for CogVideoX-5B and 3 for CogVideoX-2B.
    """
    return _schedule_of(_zero_terminal(_signal(shift)))


def run_levels(
    steps: int,
    *,
    shift: float = 1.0,
    noise_level: int = 1000,
    spacing: Literal["star", "diffusers"] = "star",
) -> NoiseLevels:
    """Returns the levels for `steps` network evaluations, from timestep noise_level - 1 down.

    shift: shift of the SNR, see `scaled_linear_schedule`. noise_level: from 2 to 1000.
    spacing: "star" rescales the run's own levels and converts velocities at the nearest of the 1000
    trained levels, as the reference implementation does; "diffusers" takes trained levels at
    CogVideoXDPMScheduler's trailing timesteps.
    Raises ValueError for more steps than there are levels and for a noise level out of range.
    """
    if not 2 <= noise_level <= 1000:
        raise ValueError(f"noise level must be from 2 to 1000 for this model, got {noise_level}")
    last = noise_level - 1
    if not 1 <= steps <= last:
        raise ValueError(f"steps must be from 1 to {last} from this noise level, got {steps}")
    trained = scaled_linear_schedule(shift)
    if spacing == "diffusers":
        stride = noise_level / steps
        t = torch.tensor([round(noise_level - i * stride) - 1 for i in range(steps)])
        sigmas = trained.edm_sigma(t)
        return NoiseLevels(trained, torch.cat([sigmas, torch.zeros(1)]))
    if spacing != "star":
        raise ValueError(f'timestep spacing must be "star" or "diffusers", got {spacing!r}')
    t = torch.tensor([math.floor(last - i * last / steps) for i in range(steps)])
    signal = _signal(shift)[t.flip(0)]
    alphas = _zero_terminal(signal).flip(0) if noise_level == 1000 else trained.alphas[t]
    nearest = (trained.alphas - alphas[:, None]).abs().argmin(dim=1)
    # Levels between the steps of the run are interpolated, so that each has its timestep.
    between = np.interp(np.arange(1000), t.flip(0), alphas.flip(0))
    table = torch.from_numpy(between).float()
    table[noise_level:] = trained.alphas[noise_level:]
    table[: t[-1]] = trained.alphas[: t[-1]] * alphas[-1] / trained.alphas[t[-1]]
    run = _schedule_of(table)
    converting = trained.alphas.clone()
    converting[t] = trained.alphas[nearest]
    schedule = NoiseSchedule(
        alphas=converting,
        sigmas=(1 - converting**2).sqrt(),
        log_edm_sigmas=run.log_edm_sigmas,
    )
    return NoiseLevels(schedule, torch.cat([run.edm_sigma(t), torch.zeros(1)]))


def _signal(shift: float) -> Tensor:
    """Returns the signal scale at each timestep before rescaling, (1000,) float32."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    power = (1 - betas).cumprod(0)
    return (power / (shift + (1 - shift) * power)).float().sqrt()


def _zero_terminal(signal: Tensor) -> Tensor:
    """Rescales signal scales so that the last is 0 and the first does not change."""
    first, last = signal[0], signal[-1]
    if len(signal) == 1:
        return torch.zeros(1)
    return (signal - last) * (first / (first - last))


def _schedule_of(alphas: Tensor) -> NoiseSchedule:
    sigmas = (1 - alphas**2).sqrt()
    return NoiseSchedule(alphas=alphas, sigmas=sigmas, log_edm_sigmas=(sigmas / alphas).log())
