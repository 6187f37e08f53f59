"""The curves by which the network sees HDR."""

import pytest
import torch

from star_core.transfer import curve_of, light_of_pq, pq_of_light

CODES = torch.linspace(0, 1, 4001)


def test_pq_is_that_of_the_standard():
    # ITU-R BT.2408, table 1: 203 cd/m2 lie at 58 %, 1000 at 75 %.
    light = torch.tensor([0.0, 100 / 203, 1.0, 1000 / 203, 10000 / 203])
    codes = pq_of_light(light)
    assert codes.tolist() == pytest.approx([0, 0.5081, 0.5807, 0.7518, 1], abs=1e-4)
    assert (light_of_pq(codes) - light).abs().max() < 1e-3


@pytest.mark.parametrize("transfer", ["smpte2084", "arib-std-b67", "bt709"])
def test_code_values_come_back(transfer):
    curve = curve_of(transfer)
    assert curve.bounded
    assert (curve.to_codes(curve.to_network(CODES)) - CODES).abs().max() < 0.02 / 1023


def test_linear_light_comes_back_up_to_the_peak_of_pq():
    curve, light = curve_of("linear"), 10000 / 203 * CODES**3
    assert not curve.bounded
    assert torch.allclose(curve.to_codes(curve.to_network(light)), light, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("transfer", ["smpte2084", "linear"])
def test_the_network_sees_all_of_it_in_order_and_white_at_three_quarters(transfer):
    curve = curve_of(transfer)
    codes = CODES if curve.bounded else 10000 / 203 * CODES
    values = curve.to_network(codes)
    assert values[0] == 0 and values[-1] == pytest.approx(1, abs=1e-4)
    assert (values.diff() > 0).all()
    white = pq_of_light(torch.ones(1)) if curve.bounded else torch.ones(1)
    assert curve.to_network(white).item() == pytest.approx(0.75, abs=1e-5)
    # neither a step nor a bend where the two parts meet
    below, at, above = curve_of("linear").to_network(torch.tensor([0.98, 1.0, 1.02]))
    assert (at - below).item() == pytest.approx((above - at).item(), rel=0.1)


def test_plain_code_values_are_only_clipped():
    curve = curve_of("bt709")
    assert curve.to_network(torch.tensor([-0.5, 0.3, 2.0])).tolist() == pytest.approx([0, 0.3, 1])
