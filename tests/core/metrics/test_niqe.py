import json
import math

import pytest
import torch

from star_core.metrics.gaussian import gaussian_window
from star_core.metrics.niqe import NIQE, asymmetric_gaussian, load_niqe, normalized
from tests.metric_inputs import pictures, waves
from tests.paths import GOLDEN

EXPECTED = json.loads((GOLDEN / "metrics/golden.json").read_text())


@pytest.fixture
def by_formula():
    """NIQE with the model of the golden values."""
    a = waves((36, 36), 0.4).double()
    return NIQE(waves((36,), 0.3), a @ a.T / 36 + torch.eye(36), gaussian_window(7, 7 / 6))


def test_niqe_is_that_of_basicsr(by_formula):
    restored, truth = pictures(192, 208)
    # basicsr halves the picture in float32.
    assert by_formula(restored) == pytest.approx(EXPECTED["niqe"], rel=1e-3)
    assert by_formula(truth) == pytest.approx(EXPECTED["niqe_truth"], rel=1e-3)


@pytest.mark.parametrize(("shape", "power"), [(2.0, 1), (1.0, 2)])
def test_shape_of_gaussian_values_is_2_and_that_of_two_sided_exponential_ones_1(shape, power):
    generator = torch.Generator().manual_seed(0)
    uniform = torch.rand(1, 400, 400, dtype=torch.float64, generator=generator)
    if power == 1:
        values = torch.erfinv(2 * uniform - 1) * math.sqrt(2)
    else:
        values = -torch.log1p(-(2 * uniform - 1).abs()) * (uniform - 0.5).sign()
    found, left, right = asymmetric_gaussian(values)
    assert found.item() == pytest.approx(shape, rel=0.02)
    assert left.item() == pytest.approx(right.item(), rel=0.02)
    wider = torch.where(values > 0, 2 * values, values)
    found, left, right = asymmetric_gaussian(wider)
    assert right.item() == pytest.approx(2 * left.item(), rel=0.02)


def test_a_flat_picture_is_0_after_normalization_and_has_no_niqe(by_formula):
    flat = torch.full((3, 96, 192), 0.5)
    assert normalized(flat.double()[:1] * 255, gaussian_window(7, 7 / 6)).abs().max() < 1e-6
    assert math.isnan(by_formula(flat))


def test_frames_of_less_than_two_blocks_and_missing_models_are_told(by_formula, tmp_path):
    with pytest.raises(ValueError, match="two blocks of 96x96, got 191x100"):
        by_formula(torch.zeros(3, 100, 191))
    with pytest.raises(ValueError, match="metric-weights niqe"):
        load_niqe(folder=tmp_path)
