import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from star_core.diffusion.schedule import (
    logsnr_cosine_schedule,
    sampling_sigmas,
    sampling_timesteps,
    star_schedule,
)


def network_timesteps(**settings):
    sigmas = sampling_sigmas(star_schedule(), **settings)
    return star_schedule().model_timestep(sigmas[:-1]).tolist()


@pytest.mark.parametrize(
    ("t", "sigma", "alpha", "log_edm_sigma"),  # specification, section 6
    [
        (0, 0.00110626, 0.9999994, -6.8068),
        (100, 0.3226204, 0.9465284, -1.0763),
        (500, 0.9430097, 0.3327653, 1.0416),
        (899, 0.9990937, 0.0425660, 3.1558),
        (998, 0.9999999, 0.00048828, 7.6246),
        (999, 1.0, 0.0, math.inf),
    ],
)
def test_star_schedule_has_the_published_values(t, sigma, alpha, log_edm_sigma):
    schedule, t = star_schedule(), torch.tensor([t])
    assert schedule.sigma(t).item() == pytest.approx(sigma, rel=1e-5)
    assert schedule.alpha(t).item() == pytest.approx(alpha, rel=1e-5)
    assert schedule.edm_sigma(t).log().item() == pytest.approx(log_edm_sigma, rel=1e-4)


@pytest.mark.parametrize("zero_terminal_snr", [True, False])
@pytest.mark.parametrize(("n", "scale_min"), [(10, 1.0), (1000, 1.0), (10, 0.25)])
def test_only_zero_terminal_snr_ends_in_pure_noise(n, scale_min, zero_terminal_snr):
    schedule = logsnr_cosine_schedule(
        n=n, scale_min=scale_min, scale_max=1.0, zero_terminal_snr=zero_terminal_snr
    )
    assert (schedule.alphas[-1] == 0) == zero_terminal_snr
    assert (schedule.sigmas.diff() > 0).all() and len(schedule) == n


@given(st.floats(0, 998))
def test_timestep_and_edm_sigma_are_inverse(t):
    schedule = star_schedule()
    assert schedule.t(schedule.edm_sigma(torch.tensor(t))).item() == pytest.approx(t, abs=0.01)


def test_levels_outside_the_table_go_to_its_ends():
    levels = torch.tensor([0.0, 1e-6, 1e6, math.inf])
    assert star_schedule().t(levels).tolist() == [0, 0, 998, 999]
    assert star_schedule().edm_sigma(torch.tensor([998.5, 999.0])).isinf().all()


def test_halves_round_to_even_for_the_network():
    # 936.5, 811.5, 686.5, 61.5 among the timesteps of 15 steps from 999
    settings = {"solver_mode": "normal", "noise_level": 1000}
    assert sampling_timesteps(steps=16, **settings)[[1, 3]].tolist() == [936.5, 811.5]
    assert network_timesteps(steps=15, **settings)[:4] == [999, 936, 874, 812]


def test_velocity_and_x_0_are_inverse():
    schedule, generator = star_schedule(), torch.Generator().manual_seed(0)
    t = torch.tensor([10, 500, 999])
    x_0, noise = torch.randn(2, 3, 4, 2, 3, 3, generator=generator)
    v = schedule.velocity(x_0, noise, t)
    torch.testing.assert_close(v, schedule.alpha(t) * noise - schedule.sigma(t) * x_0)
    torch.testing.assert_close(schedule.x_0(schedule.add_noise(x_0, noise, t), v, t), x_0)


def test_fast_mode_takes_four_levels_above_500_and_ignores_steps():
    expected = [899, 799, 699, 599, 500, 454, 409, 363, 318, 272, 227, 181, 136, 90]
    assert network_timesteps(solver_mode="fast", steps=15) == expected
    assert network_timesteps(solver_mode="fast", steps=3) == expected
    assert network_timesteps(solver_mode="fast", steps=3, sampler="heun") == [*expected, 45]


@given(
    st.integers(1, 3000), st.integers(1, 999), st.sampled_from(["dpmpp_2m_sde", "heun"]), st.data()
)
def test_normal_mode_makes_exactly_the_steps_asked_for(steps, noise_level, sampler, data):
    kind = data.draw(st.sampled_from(["trailing", "leading", "linspace"]))
    sigmas = sampling_sigmas(
        star_schedule(),
        solver_mode="normal",
        steps=steps,
        noise_level=noise_level,
        sampler=sampler,
        spacing=kind,
    )
    assert len(sigmas) == (steps if noise_level > 1 else 1) + 1
    assert (sigmas.diff() < 0).all() and sigmas[-1] == 0


def test_only_inexact_spacing_has_the_extra_level_of_the_reference():
    lengths = {
        exact: [
            n
            for n in range(1, 301)
            if len(sampling_sigmas(star_schedule(), solver_mode="normal", steps=n, exact=exact))
            != n + 1
        ]
        for exact in (True, False)
    }
    assert lengths == {True: [], False: [94, 108, 189, 194, 198, 200, 212, 217]}


@given(st.integers(1, 1000), st.sampled_from(["dpmpp_2m_sde", "heun"]))
def test_fast_mode_descends_from_any_noise_level(noise_level, sampler):
    sigmas = sampling_sigmas(
        star_schedule(), solver_mode="fast", steps=1, noise_level=noise_level, sampler=sampler
    )
    start = star_schedule().edm_sigma(torch.tensor(noise_level - 1))
    assert sigmas[0] == start and (sigmas.diff() < 0).all() and sigmas[-1] == 0


def test_noise_level_0_has_nothing_to_sample():
    settings = {"solver_mode": "normal", "steps": 5, "noise_level": 0}
    assert sampling_sigmas(star_schedule(), **settings).tolist() == [0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "at least 1"),
        ({"noise_level": 1001}, "1000"),
        ({"noise_level": -1}, "1000"),
        ({"solver_mode": "slow"}, "fast"),
        ({"solver_mode": "fast", "spacing": "leading"}, "normal"),
        ({"spacing": "middle"}, "trailing"),
    ],
)
def test_impossible_settings_are_refused_with_the_cure(settings, message):
    with pytest.raises(ValueError, match=message):
        sampling_sigmas(star_schedule(), **{"solver_mode": "normal", "steps": 5, **settings})
