"""The types in which the parts of a model compute, and values that do not fit into them."""

import logging
from dataclasses import replace

import pytest
import torch

from star_core import backbones
from star_core.backbones import COGVIDEOX, I2VGENXL
from star_core.model import find_model, load
from star_core.parity import DEFAULT
from tests import cogvideox_files
from tests.core.test_standin import restored
from tests.standin import StandIn

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32


@pytest.mark.parametrize(
    ("backbone", "device", "dtype", "expected"),
    [
        (I2VGENXL, "cuda", None, (F16, F32, F32)),
        (I2VGENXL, "cuda", BF16, (BF16, BF16, F32)),
        (I2VGENXL, "cuda", F16, (F16, F32, F32)),
        (I2VGENXL, "cpu", None, (F32, F32, F32)),
        (COGVIDEOX, "cuda", None, (BF16, BF16, BF16)),
        (COGVIDEOX, "cuda", F16, (F16, BF16, BF16)),
        (COGVIDEOX, "cpu", None, (F32, F32, BF16)),
    ],
)
def test_each_part_has_its_type(backbone, device, dtype, expected, monkeypatch):
    monkeypatch.setattr(backbones, "supports", lambda device, dtype: True)
    assert backbone.precision(device, dtype) == expected


def test_without_bfloat16_the_network_has_float16_and_the_vae_float32(monkeypatch):
    monkeypatch.setattr(backbones, "supports", lambda device, dtype: dtype != BF16)
    assert COGVIDEOX.precision("cuda") == (F16, F32, BF16)
    assert I2VGENXL.precision("cuda", BF16) == (BF16, F32, F32)


@pytest.mark.parametrize(("device", "network"), [("cuda", F16), ("cpu", F32)])
def test_a_model_is_loaded_in_the_types_for_its_device(device, network):
    with StandIn():
        model = load(find_model("tiny"), behaviour=DEFAULT, device=device)
    assert {each.dtype for each in model.star.network.parameters()} == {network}
    assert {each.dtype for each in model.vae.model.parameters()} == {F32}


@pytest.fixture
def tiny():
    model = load(find_model("tiny"), behaviour=DEFAULT, device="cpu")
    unchanged = replace(model.star.sampling, noise_level=0)  # no evaluations
    return model.star, replace(model.star, sampling=unchanged), model.vae


def overflowing(vae):
    """Two terms that fit into float16, but whose sum does not."""
    for layer in (vae.model.encoder.linear, vae.model.encoder.conv_out):
        layer.bias.fill_(6e4)
    return vae


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_vae_that_overflows_goes_on_in_a_wider_type(tiny, device, caplog):
    _, model, vae = tiny
    overflowing(vae)
    wide = restored(model, vae, "cpu")
    vae.model.half()
    with StandIn(), caplog.at_level(logging.WARNING):
        narrow = restored(model, vae, device)
    assert sum("overflows in float16" in line for line in caplog.messages) == 1
    assert {each.dtype for each in vae.model.parameters()} == {F32}
    # Weights were rounded to float16 in between.
    torch.testing.assert_close(narrow, wide, rtol=0.02, atol=0.02)


def test_a_vae_without_finite_values_is_refused(tiny):
    _, model, vae = tiny
    vae.model.encoder.linear.bias.fill_(float("inf"))
    with pytest.raises(ValueError, match="--dtype float32"):
        restored(model, vae, "cpu")


def test_a_network_without_finite_values_is_refused_after_the_first_evaluation(tiny):
    model, _, vae = tiny
    calls = []
    model.network.out[-1].bias.fill_(float("nan"))
    model.network.register_forward_hook(lambda *_: calls.append(1))
    with pytest.raises(ValueError, match="--dtype, such as bfloat16"):
        restored(model, vae, "cpu", steps=8)
    assert len(calls) == 2  # one for each window


def test_positions_are_made_on_the_cpu_where_a_device_lacks_float64(monkeypatch):
    from star_core.models import cogvideox_dit

    config = replace(cogvideox_files.CONFIG, positions="sincos")
    expected = cogvideox_dit.sincos_table(config, (2, 3, 4), torch.device("cpu"))
    monkeypatch.setattr(cogvideox_dit, "supports", lambda device, dtype: dtype != torch.float64)
    with StandIn() as card:
        found = cogvideox_dit.sincos_table(config, (2, 3, 4), torch.device("cuda"))
        assert found.is_cuda and card.counts["to_card"] == 1
        assert torch.equal(found.cpu(), expected)
