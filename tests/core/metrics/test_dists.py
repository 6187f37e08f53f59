import json
from copy import deepcopy

import pytest
import torch

from star_core.metrics.dists import DISTS, l2_pool, load_dists
from tests.metric_inputs import fill, pictures
from tests.paths import GOLDEN

EXPECTED = json.loads((GOLDEN / "metrics/golden.json").read_text())


@pytest.fixture
def by_formula():
    """DISTS with the weights of the golden value."""
    metric = DISTS().requires_grad_(False)
    convs = [p for conv in metric.network.convs for p in conv.parameters()]
    fill([*convs, *(w[None, :, None, None] for w in (metric.alpha, metric.beta))])
    return metric


def test_dists_is_that_of_its_authors(by_formula):
    restored, truth = pictures(64, 96)
    value = by_formula(restored[None], truth[None]).item()
    assert value == pytest.approx(EXPECTED["dists"], abs=2e-6)  # float32, near 1 - 1


def test_dists_of_equal_pictures_is_0_and_alpha_is_not_compared(by_formula):
    restored, truth = pictures(32, 48)
    # 1 - 1, whose rounding in float32 is 3e-6 on some machines
    exact, same = deepcopy(by_formula).double(), truth[None].double()
    assert exact(same, same).item() == pytest.approx(0, abs=1e-6)
    transparent = torch.cat((restored, torch.zeros(1, 32, 48)))
    values = by_formula(transparent[None], truth[None]), by_formula(restored[None], truth[None])
    assert torch.equal(*values)


def test_l2_pooling_halves_and_keeps_the_size_of_what_is_flat():
    pooled = l2_pool(torch.full((1, 2, 8, 12), 3.0))
    assert pooled.shape == (1, 2, 4, 6)
    torch.testing.assert_close(pooled[..., 1:, 1:], torch.full((1, 2, 3, 5), 3.0))


def test_missing_weights_are_told(tmp_path):
    with pytest.raises(ValueError, match="metric-weights dists --metric-folder"):
        load_dists(folder=tmp_path)
