import pytest
import torch
from torch import nn

from star_core.diffusion.schedule import star_schedule
from star_core.models.attention import MAX_ROWS, scaled_dot_product
from star_core.models.slicing import Slicing
from star_core.models.temporal_conv import temporal_conv
from star_core.models.unet import ControlledVideoUNet, UNetConfig, hint_prior_velocity
from star_core.models.unet_blocks import SpatialTransformer
from tests.two_levels import two_level_network

SMALL = UNetConfig(
    dim=32,
    context_dim=8,
    dim_mult=(1, 1),
    num_heads=1,
    head_dim=16,
    num_res_blocks=1,
    attn_scales=(0.5,),
)


@pytest.fixture(scope="module")
def network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ControlledVideoUNet(SMALL).eval()


def inputs(frames=3, height=4, width=6):
    generator = torch.Generator().manual_seed(1)
    x, hint = torch.randn(2, 1, 4, frames, height, width, generator=generator)
    return x, torch.tensor([500]), torch.randn(1, 3, 8, generator=generator), hint


def test_full_size_has_the_published_parameters():
    parameters = ControlledVideoUNet(UNetConfig(), device="meta").state_dict()
    assert len(parameters) == 2247
    assert sum(p.numel() for p in parameters.values()) == 2_041_121_910
    gates = [p.numel() for key, p in parameters.items() if ".local" in key]
    assert (len(gates), sum(gates)) == (73, 2354)


@torch.inference_mode()
def test_velocity_depends_on_text_hint_and_timestep(network):
    x, t, y, hint = inputs()
    v = network(x, t, y, hint)
    assert v.shape == x.shape
    for other in [(x, t, y + 1, hint), (x, t, y, -hint), (x, t, y, None), (x, t - 200, y, hint)]:
        assert not torch.allclose(network(*other), v)


@torch.inference_mode()
def test_samples_of_a_batch_do_not_see_each_other(network):
    x, t, y, hint = inputs()
    pair = network(torch.cat([x, -x]), t.repeat(2), torch.cat([y, 2 * y]), torch.cat([hint, x]))
    torch.testing.assert_close(pair[:1], network(x, t, y, hint))
    torch.testing.assert_close(pair[1:], network(-x, t, 2 * y, x))


@pytest.mark.parametrize(("height", "width"), [(5, 6), (4, 5), (1, 2)])
def test_latents_that_skips_cannot_meet_are_refused(network, height, width):
    with pytest.raises(ValueError, match="pad the video"):
        network(*inputs(height=height, width=width))


def test_layers_and_attention_come_from_the_host():
    made, attended = set(), []

    class Operations:
        def __getattr__(self, name):
            made.add(name)
            return getattr(nn, name)

    def attention(q, k, v, heads):
        attended.append(heads)
        return scaled_dot_product(q, k, v, heads)

    network = ControlledVideoUNet(SMALL, operations=Operations(), attention=attention)
    network(*inputs())
    assert made == {"Linear", "Conv1d", "Conv2d", "Conv3d", "GroupNorm", "LayerNorm"}
    transformers = sum(key.endswith("attn1.to_q.weight") for key in network.state_dict())
    assert len(attended) == 2 * transformers


def test_attention_over_many_rows_equals_attention_over_few():
    q, k, v = torch.randn(3, MAX_ROWS // 2 + 3, 2, 4)
    whole = scaled_dot_product(q, k, v, 2)
    torch.testing.assert_close(whole[-3:], scaled_dot_product(q[-3:], k[-3:], v[-3:], 2))


def test_temporal_convolution_over_planes_equals_the_3d_one():
    conv = temporal_conv(nn.Conv3d)(4, 6, (3, 1, 1), padding=(1, 0, 0))
    plain = nn.Conv3d(4, 6, (3, 1, 1), padding=(1, 0, 0))
    plain.load_state_dict(conv.state_dict())
    x = torch.randn(2, 4, 5, 3, 7)
    torch.testing.assert_close(conv(x), plain(x))


@pytest.mark.parametrize("t", [50, 500, 899])
def test_hint_prior_is_the_posterior_mean_of_a_gaussian_around_the_hint(t):
    spread, schedule, steps = 0.5, star_schedule(), torch.tensor([t])
    alpha, sigma = schedule.alpha(steps).item(), schedule.sigma(steps).item()
    generator = torch.Generator().manual_seed(0)
    draw = lambda: torch.randn(1, 1, 1, 400, 400, generator=generator, dtype=torch.float64)  # noqa: E731
    hint, error, noise = draw(), spread * draw(), draw()
    x_0 = hint + error
    x_t = alpha * x_0 + sigma * noise
    velocity, uncertainty = hint_prior_velocity(x_t, steps, hint, spread)
    true = alpha * noise - sigma * x_0
    assert (true - velocity).std().item() == pytest.approx(uncertainty.item(), rel=0.02)
    assert abs(((true - velocity) * x_t).mean().item()) < 0.02  # nothing left to gain from x_t


def test_with_guess_input_the_encoders_see_the_hint_in_noise_and_x_t_without():
    config = UNetConfig(
        dim=32,
        context_dim=8,
        dim_mult=(1,),
        num_heads=1,
        head_dim=32,
        num_res_blocks=1,
        attn_scales=(),
        hint_prior=0.5,
        guess_input=True,
    )
    network = ControlledVideoUNet(config).eval()
    seen = []
    first = network.get_submodule("input_blocks.0.0")
    first.register_forward_hook(lambda _, given, __: seen.append(given[0]))
    x, hint = torch.randn(1, 4, 2, 4, 4), torch.randn(1, 4, 2, 4, 4)
    with torch.no_grad():
        for t in (999, 0):
            network(x, torch.tensor([t]), torch.randn(1, 3, 8), hint)
    frames = [tensor[0].movedim(1, 0) for tensor in (hint, x)]
    torch.testing.assert_close(seen[0], frames[0])
    torch.testing.assert_close(seen[1], frames[1], rtol=1e-3, atol=1e-3)


def test_guess_input_needs_a_prior():
    with pytest.raises(ValueError, match="hint_prior"):
        UNetConfig(guess_input=True)


@pytest.mark.parametrize("prompts", [1, 2])
@pytest.mark.parametrize("slicing", [None, Slicing(spatial_pixels=1)])
def test_keys_and_values_of_the_text_are_computed_once_for_all_frames(prompts, slicing):
    network, computed = two_level_network(), []
    for module in network.modules():
        if isinstance(module, SpatialTransformer):
            module.get_submodule("transformer_blocks.0.attn2.to_k").register_forward_hook(
                lambda layer, inputs, out: computed.append(out)
            )
    x, y = torch.randn(prompts, 4, 3, 6, 4), torch.randn(prompts, 5, 8)
    t = torch.tensor([500] * prompts)
    with torch.inference_mode(), network.working(slicing=slicing):
        together = network(x, t, y, x)
        count = len(computed)
        alone = [network(x[[i]], t[[i]], y[[i]], x[[i]]) for i in range(prompts)]
    layers = sum(isinstance(module, SpatialTransformer) for module in network.modules())
    assert count == layers and all(out.shape[:2] == (prompts, 5) for out in computed[:count])
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)
