"""The second backbone's schedule, and the levels of a run."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from star_core.diffusion.denoiser import dynamic_guidance
from star_core.diffusion.samplers import SAMPLERS
from star_core.diffusion.scaled_linear import run_levels, scaled_linear_schedule


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_last_level_has_no_signal_and_levels_descend(shift):
    alphas = scaled_linear_schedule(shift).alphas
    assert alphas[-1] == 0 and alphas[0] > 0.99 and (alphas.diff() < 0).all()


@settings(max_examples=40)
@given(steps=st.integers(1, 998), level=st.integers(999, 1000))
def test_each_level_of_a_run_is_seen_at_its_own_timestep(steps, level):
    run = run_levels(steps, noise_level=level)
    t = run.schedule.model_timestep(run.sigmas[:-1])
    last = level - 1
    assert t.tolist() == [math.floor(last - i * last / steps) for i in range(steps)]
    assert run.sigmas[-1] == 0 and (run.sigmas.diff() < 0).all()
    assert run.sigmas[0].isinf() == (level == 1000)


@settings(max_examples=40)
@given(steps=st.integers(1, 300))
def test_velocities_are_converted_at_one_of_the_trained_levels(steps):
    run = run_levels(steps)
    t = run.schedule.model_timestep(run.sigmas[:-1])
    assert torch.isin(run.schedule.alphas[t], scaled_linear_schedule().alphas).all()


# Where the steps do not divide 1000, the scheduler steps to other levels than it then stands on.
@pytest.mark.parametrize("steps", [4, 20, 50])
def test_levels_of_diffusers_sample_as_its_scheduler_does(steps):
    from diffusers.schedulers.scheduling_dpm_cogvideox import CogVideoXDPMScheduler

    theirs: Any = CogVideoXDPMScheduler(
        beta_start=0.00085, beta_end=0.012, clip_sample=False, prediction_type="v_prediction",
        rescale_betas_zero_snr=True, snr_shift_scale=1.0, timestep_spacing="trailing",
    )  # fmt: skip
    theirs.set_timesteps(steps)
    run = run_levels(steps, spacing="diffusers")
    x = torch.randn(1, 2, 1, 2, 2)
    draws = torch.randn(2 * steps, *x.shape)

    def velocity(x, t):
        return torch.sin(2 * x) + 0.1 * math.sin(0.01 * float(t))

    def denoise(x_in, sigma):
        t = run.schedule.model_timestep(sigma)
        return run.schedule.x_0(x_in, velocity(x_in, t), t[None])

    ours = SAMPLERS["dpmpp_2m_sde_renewed"](
        denoise, x, run.sigmas, noise=lambda step, sigma, sigma_next: draws[2 * step]
    )
    noises, old, previous = iter(draws), None, None
    with pytest.MonkeyPatch.context() as patch:
        module = "diffusers.schedulers.scheduling_dpm_cogvideox.randn_tensor"
        patch.setattr(module, lambda *args, **kwargs: next(noises))
        for t in theirs.timesteps:
            x, old = theirs.step(velocity(x, t), old, t, previous, x, return_dict=False)
            previous = t
    torch.testing.assert_close(ours, x, rtol=1e-4, atol=1e-4)


def test_the_levels_of_star_are_others_than_those_of_diffusers():
    star, diffusers = run_levels(12), run_levels(12, spacing="diffusers")
    assert not torch.allclose(star.sigmas[1:], diffusers.sigmas[1:], rtol=1e-3)


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"steps": 1000}, {"noise_level": 1001},
                                   {"spacing": "karras"}])  # fmt: skip
def test_runs_that_cannot_be_are_refused(wrong):
    with pytest.raises(ValueError, match="|".join(wrong).replace("_", " ")):
        run_levels(**{"steps": 5} | wrong)


def test_dynamic_guidance_stays_between_none_and_all_of_its_scale():
    t = run_levels(50).schedule.model_timestep(run_levels(50).sigmas[:-1])
    scales = [dynamic_guidance(each[None], scale=6, steps=50) for each in t]
    assert 1 <= min(scales) < 1.5 and 6.5 < max(scales) <= 7
    assert sum(scales) / 50 == pytest.approx(3.82, abs=0.01)  # specification, section 0
