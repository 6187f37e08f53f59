"""Tests of the benchmark's counts and comparisons; speed itself is not tested."""

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from star_core.bench import speed as bench
from star_core.bench.speed import Case, count_flops, plain_layers
from star_core.models.unet import UNetConfig

SMALL = UNetConfig(
    dim=8, context_dim=8, dim_mult=(1,), num_heads=1, head_dim=8, num_res_blocks=1,
    attn_scales=(1.0,), norm_groups=4,
)  # fmt: skip
CASE = Case(name="small", config=SMALL, frames=2, height=6, width=4)


def test_flops_include_attention_which_grows_with_the_square_of_the_pixels():
    """Over the width all else is linear, so the second difference is spatial self-attention.

    It costs 4 n^2 d for n pixels of d features; this network has six of them.
    """
    w = 4
    one, two, three = (count_flops(replace(CASE, width=k * w)) for k in (1, 2, 3))
    pixels, features = CASE.height * w, SMALL.dim
    assert one - 2 * two + three == 2 * 6 * CASE.frames * 4 * pixels**2 * features


def test_inside_plain_layers_every_layer_is_torchs_own_and_the_result_the_same():
    network, inputs = CASE.network("cpu", torch.float32), CASE.inputs("cpu", torch.float32)
    before = [type(layer) for layer in network.modules()]
    ours = network(*inputs)
    with plain_layers(network):
        convs = [layer for layer in network.modules() if isinstance(layer, nn.Conv3d)]
        assert convs and {type(layer) for layer in convs} == {nn.Conv3d}
        plain = network(*inputs)
    assert [type(layer) for layer in network.modules()] == before
    torch.testing.assert_close(ours, plain)


def test_the_report_is_one_json_object(capsys, monkeypatch):
    monkeypatch.setattr(bench, "cases", lambda tiny: [CASE])
    monkeypatch.setattr(bench, "matmul_size", lambda device, dtype: 64)
    monkeypatch.setattr(bench, "memory_of_forward", lambda *arguments: None)
    bench.run(SMALL, rounds=1, as_json=True)
    (case,) = json.loads(capsys.readouterr().out)["cases"]
    assert case["flops"] == count_flops(CASE)
    assert case["share_to_plain"] == pytest.approx(
        case["share_of_peak"] / case["plain_share_of_peak"]
    )
    assert case["sliced_to_whole"] > 0


def test_no_rounds_are_refused():
    with pytest.raises(ValueError, match="at least 1"):
        bench.run(SMALL, rounds=0)
