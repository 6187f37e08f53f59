"""Shortcuts: less work, each switched by itself, nothing mixed up that belongs apart."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from star_core.diffusion.denoiser import Denoiser
from star_core.diffusion.schedule import star_schedule
from star_core.diffusion.shortcuts import BatchedFeatures, DeepFeatures, Shortcuts
from star_core.models.attention import AttentionWindow, windowed_attention
from star_core.models.unet import ControlledVideoUNet
from star_core.windows.tiling import Tile, blend_tiles
from tests.two_levels import CONFIG, two_level_network


@pytest.fixture(scope="module", autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def network():
    return two_level_network()


def randn(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def level_of(t):
    return star_schedule().edm_sigma(torch.tensor([float(t)]))[0]


def denoiser(network, **given: Any):
    prompts: Any = {"positive": randn(1, 1, 3, 8), "negative": randn(2, 1, 3, 8)}
    return Denoiser(
        network=network,
        schedule=star_schedule(),
        hint=randn(3, 1, 4, 4, 10, 16),
        **prompts | given,
    )


# --- attention in windows


def joined_with(tokens, height, window):
    """Which tokens each token's result depends on, (h·w h·w) of bool."""

    def attend(span):
        whom = torch.zeros(1, 1, tokens)
        whom[0, 0, span[0, :, 0].long()] = 1
        return whom.expand(1, span.shape[1], tokens)

    out = windowed_attention(window, attend, torch.arange(float(tokens))[None, :, None], height)
    return out[0] > 0


@given(st.integers(1, 13), st.integers(1, 13), st.integers(1, 14), st.booleans())
def test_windows_part_the_frame_into_groups_of_bounded_size(height, width, size, shifted):
    window = AttentionWindow(size=size, shifted=shifted)
    seen = joined_with(height * width, height, window)
    assert torch.equal(seen, seen.T) and seen.diagonal().all()
    assert torch.equal(seen[seen.int().argmax(1)], seen)  # all of a group see the same
    assert seen.sum(1).max() <= size**2


@given(st.integers(2, 13), st.integers(2, 13), st.integers(2, 6))
def test_no_border_of_windows_lasts_from_layer_to_layer(height, width, size):
    straight, shifted = (
        joined_with(height * width, height, AttentionWindow(size=size, shifted=shift))
        for shift in (False, True)
    )
    index = torch.arange(height * width).reshape(height, width)
    for a, b in ((index[1:], index[:-1]), (index[:, 1:], index[:, :-1])):
        assert (straight | shifted)[a.flatten(), b.flatten()].all()


@pytest.mark.parametrize("window", [None, AttentionWindow(size=6, shifted=True)])
def test_a_window_as_large_as_the_frame_is_none(window):
    x = randn(1, 2, 30, 5)
    assert torch.equal(
        windowed_attention(window, torch.Tensor.cumsum(x, 1).add, x, 5), x.cumsum(1) + x
    )


def test_only_the_finest_attention_is_windowed_and_layers_take_turns(network):
    network.attention_window = 6
    windows = {
        name: layer.window for name, layer in network.named_modules() if hasattr(layer, "window")
    }
    network.attention_window = None
    assert all(layer.window is None for layer in network.modules() if hasattr(layer, "window"))
    given = {name for name, window in windows.items() if window is not None}
    assert given == {
        "input_blocks.1.1",
        "VideoControlNet.input_blocks.1.1",
        "output_blocks.2.1",
        "output_blocks.3.1",
    }
    assert windows["output_blocks.2.1"] != windows["output_blocks.3.1"]


def test_an_attention_window_is_counted_in_latents():
    coarse = ControlledVideoUNet(replace(CONFIG, attn_scales=(0.5,)))
    coarse.attention_window = 6
    assert vars(coarse.get_submodule("input_blocks.3.1"))["window"] == AttentionWindow(size=3)


# --- guidance in an interval


@pytest.mark.parametrize(("t", "prompts"), [(99, 1), (100, 2), (399, 2), (400, 1)])
def test_the_negative_prompt_is_asked_within_the_interval_only(t, prompts):
    asked = []

    def network(x, t, y, hint):
        asked.append(y)
        return x + y.mean()

    shortcuts = Shortcuts(guidance=(100, 400))
    x = randn(1, 1, 4, 4, 10, 16)
    result = denoiser(network, shortcuts=shortcuts)(x, level_of(t))
    assert len(asked) == prompts
    same_as = denoiser(network, guidance_scale=7.5 if prompts == 2 else 1.0)
    assert torch.equal(result, same_as(x, level_of(t)))


# --- deep features


def evaluations_below(network, run):
    """How often `run` computes what lies below the finest level, in the UNet and its control."""
    calls = []
    halves = network, network.VideoControlNet
    handles = [
        half.middle_block[0].register_forward_pre_hook(lambda *_, half=half: calls.append(half))
        for half in halves
    ]
    result = run()
    for handle in handles:
        handle.remove()
    assert calls.count(halves[0]) == calls.count(halves[1])
    return calls.count(network), result


@settings(max_examples=20)
@given(st.lists(st.integers(0, 999), min_size=1, max_size=4), st.integers(0, 300))
def test_features_are_found_anew_unless_found_a_little_before(network, timesteps, within):
    x, y = randn(1, 1, 4, 2, 6, 8), randn(2, 1, 3, 8)
    deep, last = DeepFeatures(max_age=within), None
    for t in timesteps:
        given = (x, torch.tensor([t]), y, x)
        fresh, result = evaluations_below(network, lambda given=given: network(*given, deep=deep))
        assert fresh == (last is None or not 0 < last - t <= within)
        if fresh:
            last = t
            assert torch.equal(result, network(*given))


def test_reused_features_are_near_those_found_anew(network):
    x, y, deep = randn(1, 1, 4, 2, 6, 8), randn(2, 1, 3, 8), DeepFeatures(max_age=10)
    network(x, torch.tensor([500]), y, x, deep=deep)
    near, far = (network(given, torch.tensor([495]), y, x) for given in (x, randn(9, *x.shape)))
    reused = network(x, torch.tensor([495]), y, x, deep=deep)
    assert 0 < (reused - near).norm() < 0.1 * (far - near).norm()


def test_features_stay_with_their_prompt_and_window(network):
    """Windows evaluated in turn give the same as each by itself."""
    windows, timesteps = (range(0, 2), range(2, 4)), (300, 250)
    x = {(w, t): randn(t + w.start, 1, 4, 2, 10, 16) for w in windows for t in timesteps}

    def run(windows, **given):
        denoise = denoiser(network, shortcuts=Shortcuts(reuse=60), guidance_rescale=None, **given)
        return {(w, t): denoise(x[w, t], level_of(t), w) for t in timesteps for w in windows}

    together = run(windows, guidance_scale=3.0)
    for window in windows:
        without, with_it = (
            run([window], guidance_scale=1.0, positive=randn(seed, 1, 3, 8)) for seed in (2, 1)
        )
        for key in without:
            expected = torch.lerp(without[key], with_it[key], 3.0)
            torch.testing.assert_close(together[key], expected, rtol=1e-4, atol=1e-4)


def test_both_prompts_see_features_of_one_age(network):
    """Where guidance comes back, the positive prompt's are found anew with the negative's."""
    shortcuts = Shortcuts(reuse=1000, guidance=(0, 290))
    denoise = denoiser(network, shortcuts=shortcuts)
    x = randn(1, 1, 4, 4, 10, 16)
    fresh = []
    for t in (300, 295, 280, 270):
        fresh += [evaluations_below(network, lambda t=t: denoise(x, level_of(t)))[0]]
    assert fresh == [1, 0, 2, 0]


def test_prompts_in_one_batch_have_the_features_that_they_have_alone(network):
    x, y = randn(1, 2, 4, 2, 6, 8), randn(2, 2, 3, 8)
    apart = [DeepFeatures(max_age=60) for _ in range(2)]
    together = BatchedFeatures([DeepFeatures(max_age=60) for _ in range(2)])
    for t in (torch.tensor([300, 300]), torch.tensor([250, 250])):
        batch = network(x, t, y, x, deep=together)
        alone = [
            network(x[i : i + 1], t[:1], y[i : i + 1], x[i : i + 1], deep=apart[i]) for i in (0, 1)
        ]
        torch.testing.assert_close(batch, torch.cat(alone), rtol=1e-4, atol=1e-4)


def test_features_stay_with_their_tile(network):
    tile, y = Tile(size=8, overlap=2), randn(2, 1, 3, 8)
    clips = {t: randn(t, 1, 4, 2, 10, 16) for t in (300, 250)}
    deep = DeepFeatures(max_age=60)
    with network.working(slicing=None, tile=tile):
        tiled = [network(x, torch.tensor([t]), y, x, deep=deep) for t, x in clips.items()]

    def alone(rows, columns):
        own = DeepFeatures(max_age=60)
        parts = {t: x[..., rows, columns] for t, x in clips.items()}
        return [network(x, torch.tensor([t]), y, x, deep=own) for t, x in parts.items()][-1]

    expected = blend_tiles(alone, tile.on_grid(10, step=2, rest=2), tile.on_grid(16, step=2))
    torch.testing.assert_close(tiled[-1], expected)


# --- what they save, and what is refused


@pytest.mark.parametrize("shortcut", ["attention_window", "reuse"])
def test_each_shortcut_saves_work_by_itself(shortcut):
    pairs = []

    def attend(q, k, v, heads):
        pairs[-1] += len(q) * q.shape[1] * k.shape[1]
        return q

    network = ControlledVideoUNet(CONFIG, attention=attend)
    x, y = torch.zeros(1, 4, 1, 18, 16), torch.zeros(1, 3, 8)
    for shortcuts in (Shortcuts(), replace(Shortcuts(), **{shortcut: 12})):
        pairs.append(0)
        deep = DeepFeatures(max_age=shortcuts.reuse)
        with network.working(slicing=None, attention_window=shortcuts.attention_window):
            for t in (500, 490):
                network(x, torch.tensor([t]), y, x, deep=deep)
    assert pairs[1] < pairs[0]


@pytest.mark.parametrize(
    "wrong",
    [
        {"guidance": (500, 400)},
        {"guidance": (-1, 400)},
        {"guidance": (0, 1001)},
        {"attention_window": 0},
        {"reuse": -1},
        {"reuse": 1001},
        {"cache": -0.1},
        {"cache": 1.5},
    ],
)
def test_impossible_shortcuts_are_refused(wrong):
    with pytest.raises(ValueError, match="got"):
        Shortcuts(**wrong)
