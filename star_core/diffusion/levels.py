"""Noise levels and guidance of a run from a model's sampling settings."""

from collections.abc import Callable
from functools import partial

from torch import Tensor

from ..sampling_defaults import SamplingDefaults
from .denoiser import dynamic_guidance
from .scaled_linear import NoiseLevels, run_levels, scaled_linear_schedule
from .schedule import NoiseSchedule, sampling_sigmas, star_schedule


def levels_of(sampling: SamplingDefaults, *, exact: bool = True) -> NoiseLevels:
    """Returns the schedule of a run and its EDM noise levels.

    exact: False reproduces the reference's rounding, see `schedule.sampling_timesteps`.
    Raises ValueError for steps, a noise level or a solver mode that the schedule does not have.
    """
    if sampling.schedule == "scaled_linear":
        if sampling.solver_mode != "normal":
            raise ValueError("this model has no fast steps: choose solver mode normal")
        return run_levels(
            sampling.steps,
            shift=sampling.shift,
            noise_level=sampling.noise_level,
            spacing=sampling.spacing,
        )
    sigmas = sampling_sigmas(
        star_schedule(),
        solver_mode=sampling.solver_mode,
        steps=sampling.steps,
        noise_level=sampling.noise_level,
        sampler=sampling.sampler,
        exact=exact,
    )
    return NoiseLevels(star_schedule(), sigmas)


def trained_schedule(sampling: SamplingDefaults) -> NoiseSchedule:
    """Returns the schedule that a model was trained with, independent of a run's noise levels."""
    if sampling.schedule == "scaled_linear":
        return scaled_linear_schedule(sampling.shift)
    return star_schedule()


def guidance_of(sampling: SamplingDefaults) -> float | Callable[[Tensor], float]:
    """Returns the guidance scale: a number, or a function of the timesteps t (b,)."""
    if sampling.cfg_mode == "dynamic" and sampling.cfg != 1:
        return partial(dynamic_guidance, scale=sampling.cfg, steps=sampling.steps)
    return sampling.cfg
