"""Noise schedule of STAR on I2VGen-XL: log-SNR cosine, interpolated, zero terminal SNR.

Variance preserving: `x_t = alpha x_0 + sigma noise`. Index 0 is almost clean, the last index is
pure noise. Solvers work with the EDM noise level `sigma / alpha` (Karras et al. 2022,
arXiv:2206.00364), which is infinite where alpha is zero. Sources: Hoogeboom et al. 2023
(arXiv:2301.11093) for the cosine log-SNR and its interpolation between two shifts; Lin et al. 2023
(arXiv:2305.08891) for zero terminal SNR.
"""

import math
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from ..devices import send

SolverMode = Literal["fast", "normal"]
TimestepSpacing = Literal["trailing", "linspace", "leading"]

# From this timestep down, "fast" always takes the same eleven levels; above it takes four.
FAST_MIDDLE = 500


@dataclass(frozen=True, kw_only=True, eq=False)
class NoiseSchedule:
    """Tables of one schedule, float32 on the CPU, each (n,); `log_edm_sigmas` may end in inf.

    `alpha`, `sigma`, `edm_sigma` and `t` return tensors on the device of their argument. Elsewhere
    t may be on the CPU whatever the device of the latents, so that nothing waits for its values.
    """

    sigmas: Tensor
    alphas: Tensor
    log_edm_sigmas: Tensor

    def __len__(self) -> int:
        return len(self.sigmas)

    def alpha(self, t: Tensor) -> Tensor:
        """Returns the signal scale at integer timesteps: (b,) -> (b 1 1 1 1)."""
        return self.alphas.to(t.device)[t].reshape(-1, 1, 1, 1, 1)

    def sigma(self, t: Tensor) -> Tensor:
        """Returns the noise scale at integer timesteps: (b,) -> (b 1 1 1 1)."""
        return self.sigmas.to(t.device)[t].reshape(-1, 1, 1, 1, 1)

    def edm_sigma(self, t: Tensor) -> Tensor:
        """Returns the EDM noise level at timesteps that may be fractional; inf where alpha is 0."""
        table, t = self.log_edm_sigmas.to(t.device), t.float()
        low, high, w = t.floor().long(), t.ceil().long(), t.frac()
        log_sigma = (1 - w) * table[low] + w * table[high]
        # 0 * inf at the last entry is nan: the level is infinite there
        return torch.nan_to_num(log_sigma, nan=math.inf, posinf=math.inf).exp()

    def t(self, edm_sigma: Tensor) -> Tensor:
        """Returns the fractional timestep of EDM noise levels, float32; inverts `edm_sigma`.

        Levels below the table give 0; finite ones above its last finite entry give that entry.
        """
        table, log_sigma = self.log_edm_sigmas.to(edm_sigma.device), edm_sigma.float().log()
        low = torch.searchsorted(table, log_sigma, right=True).sub(1).clamp(0, len(table) - 2)
        below, above = table[low], table[low + 1]
        w = ((below - log_sigma) / (below - above)).clamp(0, 1)
        t = (1 - w) * low + w * (low + 1)
        return torch.where(log_sigma.isposinf(), float(len(table) - 1), t)

    def model_timestep(self, edm_sigma: Tensor) -> Tensor:
        """Returns the int64 timestep for the network at EDM noise levels, rounded half to even."""
        return self.t(edm_sigma).round().long()

    def add_noise(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Diffuses x_0 (b c f h w) to integer timesteps t (b,): alpha x_0 + sigma noise."""
        alpha, sigma = self._scales(t, x_0)
        return alpha * x_0 + sigma * noise

    def velocity(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Returns the network's training target, alpha noise - sigma x_0, (b c f h w).

        It is computed through x_t, as in the reference; near t = 0 cancellation costs 3e-4 in
        float32. x_0, noise: (b c f h w). t: integer timesteps (b,).
        """
        return self.velocity_between(self.add_noise(x_0, noise, t), x_0, t)

    def velocity_between(self, x_t: Tensor, x_0: Tensor, t: Tensor) -> Tensor:
        """Returns the velocity that leads from x_t to x_0 (b c f h w); inverts `x_0`."""
        alpha, sigma = self._scales(t, x_t)
        return (alpha * x_t - x_0) / sigma

    def x_0(self, x_t: Tensor, v: Tensor, t: Tensor) -> Tensor:
        """Returns clean latents, alpha x_t - sigma v, from a velocity v (b c f h w) at t (b,)."""
        alpha, sigma = self._scales(t, x_t)
        return alpha * x_t - sigma * v

    def _scales(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        return send(self.alpha(t), like.device), send(self.sigma(t), like.device)


def cosine_interpolated_logsnr(n: int, scale_min: float, scale_max: float) -> Tensor:
    """Returns the log-SNR of n levels from clean to noise, (n,) float32.

    It is the cosine log-SNR from 15 to -15, shifted by the resolution factor `scale_min` at the
    clean end and `scale_max` at the noisy end, and interpolated in between.
    """
    u = torch.linspace(1, 0, n)
    start, end = math.atan(math.exp(7.5)), math.atan(math.exp(-7.5))
    logsnr = -2 * torch.log(torch.tan(start + u * (end - start)))
    return u * (logsnr - 2 * math.log(scale_min)) + (1 - u) * (logsnr - 2 * math.log(scale_max))


def logsnr_cosine_schedule(
    *,
    n: int = 1000,
    scale_min: float = 2.0,
    scale_max: float = 4.0,
    zero_terminal_snr: bool = True,
) -> NoiseSchedule:
    """Returns the schedule of `n` levels; the defaults are STAR's.

    scale_min, scale_max: see `cosine_interpolated_logsnr`. zero_terminal_snr: rescales sigma (and
    not the signal scale, as Lin et al. do) so that its last entry is 1.
    """
    sigmas = torch.sigmoid(-cosine_interpolated_logsnr(n, scale_min, scale_max)).sqrt()
    low, high = sigmas.min(), sigmas.max()
    if zero_terminal_snr and high != 1:
        # rounding may exceed 1, where alpha would be nan
        sigmas = (low + (1 - low) / (high - low) * (sigmas - low)).clamp(max=1)
    alphas = (1 - sigmas**2).sqrt()
    log_edm_sigmas = torch.sqrt(sigmas**2 / (1 - sigmas**2)).log()
    return NoiseSchedule(sigmas=sigmas, alphas=alphas, log_edm_sigmas=log_edm_sigmas)


@cache
def star_schedule() -> NoiseSchedule:
    """Returns STAR's schedule, which is built once."""
    return logsnr_cosine_schedule()


def sampling_timesteps(
    *,
    solver_mode: SolverMode,
    steps: int,
    noise_level: int = 900,
    t_min: int = 0,
    spacing: TimestepSpacing = "trailing",
    exact: bool = True,
) -> Tensor:
    """Returns timesteps from noise_level - 1 down, (steps,) float32 and fractional.

    solver_mode: "normal" spaces `steps` levels evenly; "fast" ignores `steps` and returns (15,):
        four levels above 500 and eleven from there on (fewer if `noise_level` is below).
    t_min: smallest timestep.
    spacing: "trailing" contains the noisiest level, "leading" the cleanest, "linspace" both.
    exact: False keeps the reference's additional level where rounding makes `torch.arange` one
        longer than `steps` (95, 109, 190, ...).
    Raises ValueError for an unknown mode or spacing, and for "fast" unless trailing.
    """
    t_max = noise_level - 1
    if solver_mode == "fast":
        if spacing != "trailing":
            raise ValueError(
                f'solver mode "fast" has trailing timesteps only: use "normal" for {spacing}'
            )
        fine = torch.arange(FAST_MIDDLE, t_min - 1, -(FAST_MIDDLE - t_min + 1) / 11)[:11]
        if t_max <= FAST_MIDDLE:
            return torch.cat([torch.tensor([float(t_max)]), fine[fine < t_max]])
        coarse = torch.arange(t_max, FAST_MIDDLE, -(t_max - FAST_MIDDLE + 1) / 4)[:4]
        return torch.cat([coarse, fine])
    if solver_mode != "normal":
        raise ValueError(f'solver mode must be "fast" or "normal", got {solver_mode!r}')
    if spacing == "linspace":
        return torch.linspace(t_max, t_min, steps)
    if spacing not in ("trailing", "leading"):
        raise ValueError(f"unknown timestep spacing {spacing!r}: use trailing")
    step = (t_max - t_min + 1) / steps
    if exact and steps > 1:
        # with more steps than levels, timesteps would go below t_min
        step = min(step, (t_max - t_min) / (steps - 1))
    if step == 0:
        return torch.tensor([float(t_max)])
    if spacing == "trailing":
        timesteps = torch.arange(t_max, t_min - 1, -step)
    else:
        timesteps = torch.arange(t_min, t_max + 1, step)
    timesteps = timesteps[:steps] if exact else timesteps
    timesteps = timesteps if spacing == "trailing" else timesteps.flip(0)
    return timesteps.clamp(t_min, t_max)


def sampling_sigmas(
    schedule: NoiseSchedule,
    *,
    solver_mode: SolverMode,
    steps: int,
    noise_level: int = 900,
    t_min: int = 0,
    sampler: str = "dpmpp_2m_sde",
    spacing: TimestepSpacing = "trailing",
    exact: bool = True,
) -> Tensor:
    """Returns EDM noise levels for a sampler, descending, float32, with a trailing 0.

    The number of levels before the 0 is `steps` in normal mode; in fast mode it is 14 with
    dpmpp_2m_sde, which skips the last level but one, and 15 with heun. Equal levels are merged, so
    1000 steps from level 1000 are 999.

    solver_mode: "fast" or "normal", see `sampling_timesteps`. steps: at least 1, unused in "fast".
    noise_level: 0 to len(schedule), the number of levels that sampling uses, from the clean end; at
        0 there is nothing to sample and the result is (1,): only the 0.
    t_min: smallest timestep. sampler: key of `samplers.SAMPLERS`.
    spacing: "trailing", "linspace" or "leading", see `sampling_timesteps`.
    exact: False keeps the reference's additional level, see `sampling_timesteps`.
    Raises ValueError for an argument outside its range.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if not 0 <= noise_level <= len(schedule):
        raise ValueError(f"noise level must be in [0, {len(schedule)}], got {noise_level}")
    if noise_level == 0:
        return torch.zeros(1)
    discard_penultimate = sampler.startswith("dpmpp_2m_sde")
    timesteps = sampling_timesteps(
        solver_mode=solver_mode,
        steps=steps + discard_penultimate,
        noise_level=noise_level,
        t_min=t_min,
        spacing=spacing,
        exact=exact,
    )
    if discard_penultimate and len(timesteps) > 1:
        timesteps = timesteps[:-1]
    return torch.cat([schedule.edm_sigma(timesteps).unique_consecutive(), torch.zeros(1)])
