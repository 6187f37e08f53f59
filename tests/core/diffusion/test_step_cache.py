import pytest
import torch

from star_core.diffusion.denoiser import Denoiser
from star_core.diffusion.samplers import SAMPLERS
from star_core.diffusion.schedule import star_schedule
from star_core.diffusion.shortcuts import Shortcuts
from star_core.diffusion.step_cache import StepCache

SHAPE = (1, 4, 2, 4, 4)
CLEAN = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))


class Drifting:
    """Predicts a clean clip that changes by `drift` of itself in 100 timesteps."""

    def __init__(self, drift):
        self.drift, self.seen = drift, []

    def __call__(self, x, t, y, hint):
        self.seen.append(int(t[0]))
        x_0 = CLEAN[:, :, : x.shape[2]] * (1 + self.drift * (900 - t[0]) / 100)
        return star_schedule().velocity_between(x, x_0, t)


def run(drift, limit, timesteps=range(899, 0, -50), windows=(None,), last=None):
    """The timesteps that are computed, and the predictions, of an otherwise unguided run."""
    network = Drifting(drift)
    embedding = torch.zeros(1, 1, 1)
    denoiser = Denoiser(
        network=network,
        schedule=star_schedule(),
        positive=embedding,
        negative=embedding,
        hint=None,
        guidance_scale=1.0,
        shortcuts=Shortcuts(cache=limit),
        last=None if last is None else star_schedule().edm_sigma(torch.tensor(last)),
    )
    found = []
    for t in timesteps:
        sigma = star_schedule().edm_sigma(torch.tensor(t))
        found += [denoiser(torch.zeros(SHAPE), sigma, window) for window in windows]
    return network.seen, torch.stack(found)


def test_what_does_not_change_is_computed_twice():
    seen, found = run(0.0, 0.01)
    assert seen == [899, 849]
    torch.testing.assert_close(found[-1], CLEAN, atol=1e-3, rtol=1e-3)


def test_the_last_evaluation_is_always_computed():
    assert run(0.0, 0.01, last=49)[0] == [899, 849, 49]


def test_without_a_limit_everything_is_computed():
    assert run(0.0, 0.0)[0] == list(range(899, 0, -50))


@pytest.mark.parametrize("limit", [0.02, 0.05, 0.2])
def test_no_prediction_is_further_off_than_the_limit(limit):
    seen, found = run(0.04, limit)
    _, exact = run(0.04, 0.0)
    errors = (found - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)
    # The rate falls here, because the norm grows.
    assert errors.max() <= limit * 1.001
    assert len(seen) < len(exact)


def test_a_change_beyond_the_limit_is_computed():
    assert run(1.0, 0.05)[0] == list(range(899, 0, -50))


def test_each_window_has_its_own_cache():
    seen, _ = run(0.0, 0.01, windows=(range(0, 2), range(1, 3)))
    assert seen == [899, 899, 849, 849]


def test_what_is_kept_does_not_change_with_what_was_returned():
    cache, x_0 = StepCache(limit=1.0), CLEAN.clone()
    cache.keep(899, x_0)
    cache.keep(800, x_0)
    x_0.zero_()
    recalled = cache.recall(700)
    assert recalled is not None
    recalled.zero_()
    again = cache.recall(700)
    assert again is not None and torch.equal(again, CLEAN)


@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_every_solver_ends_with_the_cache_where_nothing_changes(sampler):
    network, embedding = Drifting(0.0), torch.zeros(1, 1, 1)
    denoiser = Denoiser(
        network=network,
        schedule=star_schedule(),
        positive=embedding,
        negative=embedding,
        hint=None,
        shortcuts=Shortcuts(cache=0.05),
    )
    sigmas = torch.cat([star_schedule().edm_sigma(torch.arange(899, 0, -90)), torch.zeros(1)])
    out = SAMPLERS[sampler](
        denoiser, torch.randn(SHAPE), sigmas, noise=lambda *_: torch.randn(SHAPE)
    )
    torch.testing.assert_close(out, CLEAN, atol=2e-3, rtol=2e-3)
    assert len(set(network.seen)) == 2
