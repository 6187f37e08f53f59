"""The transformer of the second backbone: what STAR adds, positions, a host's layers."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from star_core.models.attention import scaled_dot_product
from star_core.models.cogvideox_dit import CogVideoXDiT, rotary_table, sincos_table
from star_core.models.cogvideox_weights import CogVideoXConfig
from star_core.models.slicing import Slicing
from star_core.training.checkpointing import recompute
from star_core.windows.tiling import Tile

SMALL = CogVideoXConfig(
    in_dim=4, context_dim=12, context_length=5, dim=32, num_heads=2, num_layers=2, time_dim=16
)


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def random_network(config=SMALL, **settings):
    torch.manual_seed(0)
    return CogVideoXDiT(config, **settings).eval()


def inputs(f=3, h=8, w=6, config=SMALL):
    generator = torch.Generator().manual_seed(1)
    x, hint = torch.randn(2, 1, config.in_dim, f, h, w, generator=generator)
    y = torch.randn(1, config.context_length, config.context_dim, generator=generator)
    return x, torch.tensor([500]), y, hint


@pytest.mark.parametrize("what", ["x", "t", "y", "hint"])
def test_everything_that_the_network_is_told_matters(what):
    network, reported = random_network(), dict(zip(("x", "t", "y", "hint"), inputs(), strict=True))
    before = network(**reported)
    assert not torch.equal(network(**reported | {what: reported[what] + 1}), before)
    assert before.shape == reported["x"].shape


@pytest.mark.parametrize("gate", ["spa_local", "temp_local"])
def test_liem_gates_image_tokens_before_attention(gate):
    network = random_network()
    before = network(*inputs())
    seen = []
    block = network.transformer_blocks[0]
    block.get_submodule(gate).register_forward_hook(lambda m, taken, given: seen.append(taken[0]))
    getattr(block, gate).conv1.weight.add_(3)
    assert not torch.equal(network(*inputs()), before)
    assert seen[0].numel() == 3 * (8 // 2) * (6 // 2) * SMALL.dim  # image tokens, no text


def test_rotary_positions_are_whole_numbers_on_any_grid_up_to_the_trained_one():
    device = torch.device("cpu")
    whole = rotary_table(SMALL, (3, 30, 45), device)[0].reshape(3, 30, 45, -1)
    part = rotary_table(SMALL, (2, 4, 6), device)[0].reshape(2, 4, 6, -1)
    torch.testing.assert_close(part, whole[:2, :4, :6])
    squeezed = rotary_table(SMALL, (1, 60, 45), device)[0].reshape(1, 60, 45, -1)
    torch.testing.assert_close(squeezed[0, ::2], whole[0])


def test_sincos_positions_tell_every_token_apart():
    table = sincos_table(SMALL, (2, 3, 4), torch.device("cpu"))[0]
    apart = torch.cdist(table, table) + torch.eye(len(table))
    assert apart.min() > 0.01


def test_latents_of_an_odd_size_are_refused():
    with pytest.raises(ValueError, match="multiples of 16"):
        random_network()(*inputs(h=7))


def test_slices_of_inference_give_what_training_computes():
    network, reported = random_network(), inputs()
    with network.working(slicing=Slicing(spatial_pixels=5)):
        sliced = network(*reported)
    with torch.enable_grad():
        whole = network(*reported)
        recompute(network)
        recomputed = network(*reported)
    torch.testing.assert_close(whole.detach(), sliced)
    torch.testing.assert_close(recomputed.detach(), sliced)


def test_latents_beyond_the_trained_grid_are_worked_on_in_tiles_of_it():
    network = random_network(replace(SMALL, grid=(6, 7)))
    grids = []
    network.transformer_blocks[0].register_forward_pre_hook(lambda m, args: grids.append(args[3]))
    x, t, y, hint = inputs(f=1, h=20, w=14)
    whole = network(x, t, y, hint)
    assert set(grids) == {(1, 6, 7)}
    rows = -(-(20 - 8) // (12 - 8))  # tiles of 12 that share at least 8
    assert len(grids) == rows
    torch.testing.assert_close(whole[..., :4, :], network(*(
        (x[..., :12, :], t, y, hint[..., :12, :])
    ))[..., :4, :])  # fmt: skip
    grids.clear()
    with network.working(slicing=None, tile=Tile(size=8, overlap=2)):
        assert network(x, t, y, hint).shape == x.shape
    assert set(grids) == {(1, 4, 4)}


def test_what_the_network_cannot_do_is_refused():
    network, (x, t, y, _) = random_network(), inputs()
    with pytest.raises(ValueError, match="attention window"):
        network.working(slicing=None, attention_window=8).__enter__()
    with pytest.raises(ValueError, match="low-quality"):
        network(x, t, y)


def test_a_hosts_layers_and_attention_take_the_place_of_torchs():
    made, attended = [], []

    class Operations:
        def __getattr__(self, name):
            def make(*args, **kwargs):
                made.append(name)
                return getattr(nn, name)(*args, **kwargs)

            return make

    def attention(q, k, v, heads):
        attended.append(heads)
        return scaled_dot_product(q, k, v, heads)

    plain = random_network()
    hosted = CogVideoXDiT(SMALL, operations=Operations(), attention=attention, device="meta")
    assert {p.device.type for p in hosted.parameters()} == {"meta"}
    linear = sum(isinstance(m, nn.Linear) for m in plain.modules())
    assert made.count("Linear") == linear
    hosted.load_state_dict(plain.state_dict(), assign=True)
    torch.testing.assert_close(hosted(*inputs()), plain(*inputs()))
    assert attended == [2, 2]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"dim": 30}, "30 channels do not divide"),
        ({"dim": 24}, "24 channels do not divide"),
        ({"positions": "learned"}, "got 'learned'"),
    ],
)
def test_sizes_that_cannot_be_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        CogVideoXConfig(**{"dim": 32, "num_heads": 2} | wrong)
