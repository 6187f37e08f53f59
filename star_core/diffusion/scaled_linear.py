"""Noise schedule of CogVideoX: scaled-linear, zero terminal SNR, and the levels of one run.

Betas as in latent diffusion (Rombach et al. 2022), an SNR shift (Yang et al. 2024,
arXiv:2408.06072), the mean of the signal stretched until the last level has none (Lin et al. 2023,
arXiv:2305.08891). Specification of the second backbone, section 5.
"""

import math
from functools import cache
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .schedule import NoiseSchedule

TimestepSpacing = Literal["star", "diffusers"]


class NoiseLevels(NamedTuple):
    """The levels of one run: the schedule by which velocities are converted, and EDM noise levels,
    descending from inf, with a trailing 0."""

    schedule: NoiseSchedule
    sigmas: Tensor


@cache
def scaled_linear_schedule(shift: float = 1.0) -> NoiseSchedule:
    """The 1000 levels that the network was trained on. shift: of the SNR, 3 for CogVideoX-2B."""
    return _schedule_of(_zero_terminal(_signal(shift)))


def run_levels(
    steps: int, *, shift: float = 1.0, noise_level: int = 1000, levels: TimestepSpacing = "star"
) -> NoiseLevels:
    """Levels for `steps` network evaluations, which see the last first: timestep noise_level - 1.

    levels: "star" stretches the run's own levels and snaps each to the nearest of the 1000 where
    a velocity is converted, as the reference implementation; "diffusers" takes the 1000 at
    CogVideoXDPMScheduler's trailing timesteps. ValueError for more steps than there are levels.
    """
    if not 2 <= noise_level <= 1000:
        raise ValueError(f"noise level must be from 2 to 1000 for this model, got {noise_level}")
    last = noise_level - 1
    if not 1 <= steps <= last:
        raise ValueError(f"steps must be from 1 to {last} from this noise level, got {steps}")
    trained = scaled_linear_schedule(shift)
    if levels == "diffusers":
        spacing = noise_level / steps
        t = torch.tensor([round(noise_level - i * spacing) - 1 for i in range(steps)])
        sigmas = trained.edm_sigma(t)
        return NoiseLevels(trained, torch.cat([sigmas, torch.zeros(1)]))
    if levels != "star":
        raise ValueError(f'levels must be "star" or "diffusers", got {levels!r}')
    t = torch.tensor([math.floor(last - i * last / steps) for i in range(steps)])
    signal = _signal(shift)[t.flip(0)]
    alphas = _zero_terminal(signal).flip(0) if noise_level == 1000 else trained.alphas[t]
    nearest = (trained.alphas - alphas[:, None]).abs().argmin(dim=1)
    # Between the steps of the run, levels go on evenly: any of them has its timestep.
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
    """Share of the signal at each timestep before it is stretched, (1000,) float32."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    power = (1 - betas).cumprod(0)
    return (power / (shift + (1 - shift) * power)).float().sqrt()


def _zero_terminal(signal: Tensor) -> Tensor:
    """Stretched so that the last is 0 and the first stays."""
    first, last = signal[0], signal[-1]
    if len(signal) == 1:
        return torch.zeros(1)
    return (signal - last) * (first / (first - last))


def _schedule_of(alphas: Tensor) -> NoiseSchedule:
    sigmas = (1 - alphas**2).sqrt()
    return NoiseSchedule(alphas=alphas, sigmas=sigmas, log_edm_sigmas=(sigmas / alphas).log())
