import math

import pytest
import torch

from star_core.diffusion.samplers import SAMPLERS, refuse_crashes, sample_dpmpp_2m_sde, sample_heun
from star_core.diffusion.schedule import sampling_sigmas, star_schedule

SHAPE = (1, 4, 3, 4, 4)
each_sampler = pytest.mark.parametrize("sampler", list(SAMPLERS))


def start(seed=0):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def noise(step, sigma, sigma_next):
    return start(100 + step)


def no_noise(step, sigma, sigma_next):
    raise AssertionError("a deterministic run draws no noise")


def gaussian_denoiser(x_in, sigma):
    """The exact x_0 of data from a Gaussian of variance 1/4 around 0.3."""
    x = x_in * torch.sqrt(sigma**2 + 1)
    return 0.3 + (x - 0.3) * 0.25 / (0.25 + sigma**2)


def gaussian_flow(x, sigma):
    """Where the probability flow takes x from sigma to 0 for those data."""
    return 0.3 + (x - 0.3) * 0.5 / torch.sqrt(0.25 + sigma**2)


def levels(steps):
    return torch.cat([torch.logspace(1, -2, steps), torch.zeros(1)])


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name != "lcm"])
def test_deterministic_solvers_converge_on_the_probability_flow(sampler):
    settings = {"eta": 0.0} if "sde" in sampler else {}

    def error(steps):
        sigmas = levels(steps)
        out = SAMPLERS[sampler](gaussian_denoiser, start(), sigmas, noise=no_noise, **settings)
        return (out - gaussian_flow(start() * sigmas[0], sigmas[0])).abs().max()

    assert error(160) < (0.05 if sampler == "euler" else 0.01) and error(160) < 0.5 * error(20)


def test_second_order_beats_the_first():
    """Without the previous x_0 (one step at a time) the multistep solver is first order."""
    sigmas, x = levels(20), start() * 10
    exact = gaussian_flow(x, sigmas[0])
    settings = {"noise": no_noise, "eta": 0.0}
    second = sample_dpmpp_2m_sde(gaussian_denoiser, start(), sigmas, **settings)
    for pair in sigmas.unfold(0, 2, 1):
        h = (pair[0] / pair[1]).log() if pair[1] > 0 else torch.tensor(math.inf)
        x_0 = gaussian_denoiser(x / torch.sqrt(pair[0] ** 2 + 1), pair[0])
        x = torch.exp(-h) * x - torch.expm1(-h) * x_0
    assert (second - exact).abs().max() < 0.5 * (x - exact).abs().max()


@pytest.mark.parametrize("solver_type", ["midpoint", "heun"])
def test_the_sde_keeps_the_variance_of_the_data(solver_type):
    generator = torch.Generator().manual_seed(0)
    out = sample_dpmpp_2m_sde(
        gaussian_denoiser,
        torch.randn(1, 4, 8, 16, 16, generator=generator),
        levels(60),
        noise=lambda *_: torch.randn(1, 4, 8, 16, 16, generator=generator),
        solver_type=solver_type,
    )
    assert out.mean().item() == pytest.approx(0.3, abs=0.02)
    assert out.std().item() == pytest.approx(0.5, abs=0.03)


@each_sampler
def test_the_start_is_multiplied_by_the_first_level(sampler):
    inputs = []

    def denoise(x_in, sigma):
        inputs.append(x_in)
        return x_in

    SAMPLERS[sampler](denoise, start(), levels(3), noise=noise)
    torch.testing.assert_close(inputs[0], start() * 10 / math.sqrt(101))


def test_a_renewed_start_takes_fresh_noise_from_an_infinite_level_alone():
    levels = torch.tensor([math.inf, 3.0, 0.0])

    def halved(x_in, sigma):
        return x_in * 0.5

    def renewed(start, noise, **settings):
        return SAMPLERS["dpmpp_2m_sde_renewed"](halved, start, levels, noise=noise, **settings)

    def first_draw(seed):
        return lambda step, sigma, sigma_next: start(seed) if step == 0 else start(1)

    assert not torch.equal(renewed(start(), first_draw(7)), renewed(start(), first_draw(8)))
    kept = SAMPLERS["dpmpp_2m_sde"](halved, start(), levels, noise=no_noise)
    assert torch.equal(renewed(start(), no_noise, eta=0.0), kept)


def test_lcm_keeps_the_distribution_that_a_consistency_model_has_learned():
    """Each evaluation gives a sample of the data, whose noise the next one is to take away."""
    generator = torch.Generator().manual_seed(0)
    shape = (1, 4, 8, 16, 16)

    def consistent(x_in, sigma):
        return gaussian_flow(x_in * torch.sqrt(sigma**2 + 1), sigma)

    sigmas = torch.tensor([100.0, 3.0, 0.5, 0.0])
    out = SAMPLERS["lcm"](
        consistent,
        torch.randn(shape, generator=generator),
        sigmas,
        noise=lambda *_: torch.randn(shape, generator=generator),
    )
    assert out.mean().item() == pytest.approx(0.3, abs=0.02)
    assert out.std().item() == pytest.approx(0.5, abs=0.02)


def test_lcm_noises_the_prediction_anew_and_euler_keeps_its_noise():
    sigmas, inputs = torch.tensor([10.0, 3.0, 0.0]), []

    def denoise(x_in, sigma):
        inputs.append(x_in * torch.sqrt(sigma**2 + 1))
        return torch.full_like(x_in, 0.25)

    SAMPLERS["lcm"](denoise, start(), sigmas, noise=noise)
    torch.testing.assert_close(inputs[1], 0.25 + 3 * noise(0, None, None))
    SAMPLERS["euler"](denoise, start(), sigmas, noise=no_noise)
    torch.testing.assert_close(inputs[3], 0.25 + 3 * (10 * start() - 0.25) / 10)


@pytest.mark.parametrize("sampler", ["dpmpp_2m_sde", "heun", "euler"])
def test_an_infinite_first_level_takes_the_start_as_it_is(sampler):
    sigmas = torch.tensor([math.inf, 3.0, 0.0])
    inputs = []

    def denoise(x_in, sigma):
        inputs.append(x_in)
        return x_in * 0.5

    SAMPLERS[sampler](denoise, start(), sigmas, noise=no_noise)
    assert torch.equal(inputs[0], start())
    torch.testing.assert_close(inputs[1], start() * 3.5 / math.sqrt(10))


@each_sampler
@pytest.mark.parametrize("first", [23.5, math.inf])
def test_one_step_returns_the_prediction(sampler, first):
    out = SAMPLERS[sampler](
        lambda x_in, sigma: torch.full_like(x_in, 0.7),
        start(),
        torch.tensor([first, 0.0]),
        noise=no_noise,
    )
    torch.testing.assert_close(out, torch.full(SHAPE, 0.7))


@each_sampler
def test_no_step_returns_the_start(sampler):
    assert torch.equal(SAMPLERS[sampler](None, start(), torch.zeros(1), noise=no_noise), start())


@each_sampler
@pytest.mark.parametrize("noise_level", [1, 2, 900, 999, 1000])
@pytest.mark.parametrize("steps", [1, 2, 15, 1000])
def test_every_schedule_gives_a_finite_result(sampler, noise_level, steps):
    sigmas = sampling_sigmas(
        star_schedule(),
        solver_mode="normal",
        steps=steps,
        noise_level=noise_level,
        sampler=sampler,
    )
    small = torch.ones(1, 1, 1, 2, 2)
    out = SAMPLERS[sampler](lambda x_in, sigma: x_in * 0.5, small, sigmas, noise=lambda *_: small)
    assert out.isfinite().all()


@each_sampler
def test_on_step_counts_to_the_end_and_can_abort(sampler):
    seen = []

    def on_step(step, total, x_0):
        seen.append((step, total, x_0.shape))
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        SAMPLERS[sampler](gaussian_denoiser, start(), levels(5), noise=noise, on_step=on_step)
    assert seen == [(step, 5, SHAPE) for step in (1, 2, 3)]


def test_churn_adds_noise_only_between_its_bounds():
    drawn = []

    def record(step, sigma, sigma_next):
        drawn.append(sigma.item())
        return start(step)

    sample_heun(gaussian_denoiser, start(), levels(20), noise=record, s_churn=5, s_tmin=0.1)
    assert drawn == [sigma for sigma in levels(20).tolist() if sigma >= 0.1]


def test_unknown_solver_type_is_refused():
    with pytest.raises(ValueError, match="midpoint"):
        sample_dpmpp_2m_sde(gaussian_denoiser, start(), levels(2), noise=noise, solver_type="euler")


RUNS = {"frames": 32, "chunk_length": 32, "sampler": "dpmpp_2m_sde", "evaluations": 2}


@pytest.mark.parametrize(
    ("run", "cure"),
    [
        ({"frames": 33}, "chunks of 33 frames"),
        ({"frames": 40}, "chunks of 40 frames"),
        ({"evaluations": 1}, "2 steps"),
        ({"sampler": "heun"}, "dpmpp_2m_sde"),
    ],
)
def test_what_crashes_the_reference_is_refused_with_the_cure(run, cure):
    with pytest.raises(ValueError, match=cure):
        refuse_crashes(**{**RUNS, **run})


@pytest.mark.parametrize("frames", [1, 32, 41, 1000])
def test_what_runs_in_the_reference_is_not_refused(frames):
    refuse_crashes(**{**RUNS, "frames": frames})
