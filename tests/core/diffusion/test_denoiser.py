from dataclasses import replace

import pytest
import torch

from star_core.diffusion.denoiser import Denoiser, guided_velocity, threshold
from star_core.diffusion.schedule import star_schedule
from star_core.diffusion.shortcuts import Shortcuts

SHAPE = (2, 4, 3, 4, 5)


def randn(seed, shape=SHAPE):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Network:
    """A velocity from everything that the network is told, and a record of the calls."""

    def __init__(self):
        self.calls = []

    def __call__(self, x, t, y, hint):
        self.calls.append((x, t, y, hint))
        return x * (1 + t[:, None, None, None, None] / 1000) + y.mean() + hint.cos()


def denoiser(network, **settings):
    return Denoiser(
        network=network,
        schedule=star_schedule(),
        positive=torch.full((1, 5, 6), 0.5),
        negative=torch.full((1, 5, 6), -0.25),
        hint=randn(1),
        **settings,
    )


def test_full_rescale_gives_each_sample_the_spread_of_its_conditional_prediction():
    v_c, v_u = randn(0), randn(1)
    v = guided_velocity(v_c, v_u, 7.5, 1.0)
    torch.testing.assert_close(v.flatten(1).std(1), v_c.flatten(1).std(1))
    assert v.std() < guided_velocity(v_c, v_u, 7.5, None).std() / 2


@pytest.mark.parametrize("rescale", [0, 0.0, None])
def test_no_rescale_is_plain_guidance(rescale):
    v_c, v_u = randn(0), randn(1)
    assert torch.equal(guided_velocity(v_c, v_u, 3.0, rescale), v_u + 3.0 * (v_c - v_u))


def test_scale_1_leaves_out_the_negative_prompt():
    network = Network()
    denoiser(network, guidance_scale=1.0)(randn(2), torch.tensor(5.0))
    assert [call[2].mean() for call in network.calls] == [0.5]


def test_guidance_asks_for_both_prompts_with_the_same_hint():
    network = Network()
    denoiser(network)(randn(2), torch.tensor(5.0))
    assert [call[2].mean() for call in network.calls] == [0.5, -0.25]
    assert all(torch.equal(call[3], randn(1)) for call in network.calls)


def test_alpha_and_sigma_are_those_of_the_rounded_timestep():
    network, schedule = Network(), star_schedule()
    x_in, exact = randn(2), schedule.edm_sigma(torch.tensor(454.4))
    x_0 = denoiser(network, guidance_scale=1.0)(x_in, exact)
    x, t, y, hint = network.calls[0]
    assert t.tolist() == [454, 454] and t.dtype == torch.int64
    assert torch.equal(x_0, schedule.x_0(x_in, network(x, t, y, hint), t))
    assert torch.equal(x_0, denoiser(network, guidance_scale=1.0)(x_in, exact[None]))


def test_a_window_gets_its_frames_of_the_hint():
    network = Network()
    denoiser(network)(randn(2)[:, :, 1:3], torch.tensor(5.0), range(1, 3))
    assert torch.equal(network.calls[0][3], randn(1)[:, :, 1:3])


def test_the_network_computes_in_its_own_dtype_and_x_0_in_that_of_the_state():
    network = Network()
    x_0 = denoiser(network, dtype=torch.bfloat16)(randn(2), torch.tensor(5.0))
    x, _, y, hint = network.calls[0]
    assert {x.dtype, y.dtype, hint.dtype} == {torch.bfloat16} and x_0.dtype == torch.float32


def test_threshold_bounds_each_sample_by_its_own_quantile():
    x_0 = randn(0) * torch.tensor([0.1, 10.0]).reshape(2, 1, 1, 1, 1)
    bounded = threshold(x_0, 0.9, None)
    assert torch.equal(bounded[0], x_0[0])  # below 1 there is nothing to bound
    assert bounded[1].abs().max() == 1 and (bounded[1].abs() == 1).float().mean() > 0.05
    assert torch.equal(threshold(x_0, None, 0.5), x_0.clamp(-0.5, 0.5))
    assert threshold(x_0, None, None) is x_0


def test_denoiser_applies_its_threshold():
    unbounded = denoiser(Network())
    x_0 = unbounded(randn(2), torch.tensor(5.0))
    bounded = replace(unbounded, clamp=0.3)(randn(2), torch.tensor(5.0))
    assert torch.equal(bounded, x_0.clamp(-0.3, 0.3)) and x_0.abs().max() > 0.3


@pytest.mark.parametrize(("low", "high", "prompts"), [(0, 500, 1), (0, 501, 2), (500, 501, 2)])
def test_guidance_in_an_interval_includes_its_start_and_not_its_end(low, high, prompts):
    network, schedule = Network(), star_schedule()
    (sigma,) = schedule.edm_sigma(torch.tensor([500]))
    assert schedule.model_timestep(sigma).item() == 500
    denoiser(network, shortcuts=Shortcuts(guidance=(low, high)))(randn(2), sigma)
    assert len(network.calls) == prompts
