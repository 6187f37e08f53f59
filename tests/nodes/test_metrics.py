"""STAR Metrics and STAR Metrics Plot in the host."""

import importlib

import pytest
import torch

from star_core.metrics import psnr

pytestmark = pytest.mark.host


@pytest.fixture(scope="module")
def nodes(pack):
    return importlib.import_module(".nodes.metrics", pack.__name__)


@pytest.fixture
def measure(nodes):
    return lambda *args, **more: nodes.StarMetrics.execute(*args, **more).args


def frames(seed, count=3):
    return torch.rand(count, 24, 32, 3, generator=torch.Generator().manual_seed(seed))


def test_values_are_those_of_the_core_and_the_report_names_them(measure):
    a, b = frames(0), frames(1)
    values, report = measure(a, "psnr, ssim", 2, b)
    inner = (x[0, 2:-2, 2:-2].movedim(-1, 0) for x in (a, b))
    assert values.per_frame["psnr"][0] == pytest.approx(psnr(*inner), abs=1e-4)
    assert values.per_frame.keys() == {"psnr", "ssim"}
    assert "PSNR, dB" in report and "SSIM" in report


def test_without_a_reference_the_report_says_what_needs_one(measure):
    values, report = measure(frames(0), "psnr", 0)
    assert not values.per_frame and "needs a ground truth" in report


def test_what_cannot_be_measured_is_refused_by_name(measure):
    with pytest.raises(ValueError, match="STAR Metrics: no metric is called pnsr"):
        measure(frames(0), "pnsr", 0)
    with pytest.raises(ValueError, match="STAR Metrics: .*32x24, the reference 24x32"):
        measure(frames(0), "psnr", 0, frames(1).movedim(1, 2))
    with pytest.raises(ValueError, match="reference video has 2 frames"):
        measure(frames(0), "psnr", 0, frames(1, 2))


def test_the_plot_is_a_picture_of_the_size_asked_for_that_differs_by_curve(nodes, measure):
    one, other = (measure(frames(0), "psnr", 0, frames(n))[0] for n in (1, 0))
    execute = nodes.StarMetricsPlot.execute
    alone, both = (
        execute(one, "psnr", 640, 300).args[0],
        execute(one, "psnr", 640, 300, one).args[0],
    )
    assert alone.shape == both.shape == (1, 300, 640, 3)
    assert not torch.equal(alone, both)
    assert other.per_frame["psnr"] == [float("inf")] * 3  # drawn as nothing
    assert execute(other, "psnr", 640, 300).args[0].shape == (1, 300, 640, 3)


def test_a_metric_that_was_not_measured_is_refused_by_name(nodes, measure):
    values, _ = measure(frames(0), "psnr", 0, frames(1))
    with pytest.raises(
        ValueError, match="STAR Metrics Plot: there is no SSIM of each frame: it was"
    ):
        nodes.StarMetricsPlot.execute(values, "ssim", 640, 300)
