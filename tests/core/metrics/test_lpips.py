import json
import os
from pathlib import Path

import pytest
import torch

from star_core.metrics.lpips import LPIPS, load_lpips
from star_core.metrics.weights import WEIGHTS
from tests.metric_inputs import fill, pictures
from tests.paths import GOLDEN

EXPECTED = json.loads((GOLDEN / "metrics/golden.json").read_text())


def by_formula(backbone):
    """LPIPS with the weights of the golden values."""
    metric = LPIPS(backbone)
    convs = [p for conv in metric.network.convs for p in conv.parameters()]
    fill([*convs, *(head[None, :, None, None] for head in metric.heads)])
    return metric.eval()


@pytest.mark.parametrize("backbone", ["alex", "vgg"])
def test_lpips_is_that_of_its_authors(backbone):
    restored, truth = pictures(64, 96)
    value = by_formula(backbone)(restored[None], truth[None]).item()
    assert value == pytest.approx(EXPECTED[f"lpips_{backbone}"], rel=1e-4)  # float32, other order


def test_lpips_of_equal_pictures_is_0_and_alpha_is_not_compared():
    metric = by_formula("alex")
    restored, truth = pictures(40, 48)
    assert metric(truth[None], truth[None]).item() == 0
    transparent = torch.cat((restored, torch.zeros(1, 40, 48)))
    assert torch.equal(metric(transparent[None], truth[None]), metric(restored[None], truth[None]))


def test_gradient_of_lpips_pulls_a_picture_to_its_truth_and_is_finite_where_it_is_there():
    metric = by_formula("alex").requires_grad_(False)
    restored, truth = pictures(64, 64)
    picture = restored[None].clone().requires_grad_()
    before = metric(picture, truth[None])
    (gradient,) = torch.autograd.grad(before.sum(), picture)
    step = 0.001 * before.item() / gradient.square().sum()
    assert metric(picture - step * gradient, truth[None]) < before
    there = truth[None].clone().requires_grad_()
    metric(there, truth[None]).sum().backward()
    assert there.grad is not None and there.grad.isfinite().all()


def test_lpips_of_too_small_frames_is_refused():
    with pytest.raises(ValueError, match="at least 32x32, got a side of 31"):
        by_formula("alex")(torch.zeros(1, 3, 31, 64), torch.zeros(1, 3, 31, 64))


def test_missing_weights_are_told_in_one_line_with_the_command(tmp_path):
    with pytest.raises(ValueError) as reported:
        load_lpips("vgg", folder=tmp_path)
    assert "python -m star_core metric-weights lpips_vgg" in str(reported.value)
    assert "\n" not in str(reported.value)


@pytest.mark.skipif(
    not (Path(os.environ.get("STAR_METRIC_WEIGHTS", "-")) / WEIGHTS["lpips_alex"].file).is_file(),
    reason="set STAR_METRIC_WEIGHTS to the folder that metric-weights filled",
)
def test_published_weights_put_blur_and_noise_in_order():
    metric = load_lpips("alex")
    restored, truth = pictures(64, 64)
    slightly = truth + (restored - truth) * 0.2
    assert 0 < metric(slightly[None], truth[None]) < metric(restored[None], truth[None]) < 1.5
