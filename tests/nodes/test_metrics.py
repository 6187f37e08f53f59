"""STAR Metrics in the host."""

import importlib

import pytest
import torch

from star_core.metrics import psnr

pytestmark = pytest.mark.host


@pytest.fixture(scope="module")
def nodes(pack):
    return importlib.import_module(".nodes.metrics", pack.__name__)


@pytest.fixture
def measure(nodes, monkeypatch, tmp_path):
    import folder_paths  # pyright: ignore[reportMissingImports]

    monkeypatch.setattr(folder_paths, "temp_directory", str(tmp_path))

    def measure(images, metrics, border=0, reference=None, curves="all", **more):
        """Report and plot."""
        given = (images, metrics, curves, border, reference)
        return nodes.StarMetrics.execute(*given, **more).args

    return measure


def frames(seed, count=3):
    return torch.rand(count, 24, 32, 3, generator=torch.Generator().manual_seed(seed))


def test_values_are_those_of_the_core_and_the_report_names_them(measure):
    a, b = frames(0), frames(1)
    report, _ = measure(a, "psnr, ssim", 2, b)
    inner = [x[:, 2:-2, 2:-2].movedim(-1, 1) for x in (a, b)]
    mean = sum(psnr(*pair) for pair in zip(*inner, strict=True)) / 3
    assert f"PSNR, dB {mean:>10.4f}" in report and "SSIM" in report


def test_three_results_stand_in_one_table_in_which_the_best_is_best(measure):
    truth, bad = frames(0), frames(1)
    near = truth.lerp(bad, 0.1)
    report, _ = measure(bad, "psnr", reference=truth, images_b=near, images_c=truth)
    rows = dict(line.split() for line in report.splitlines() if line.startswith("images"))
    assert float(rows["images"]) < float(rows["images_b"]) < float(rows["images_c"])


def test_without_a_reference_the_report_says_what_needs_one(measure):
    report, plot = measure(frames(0), "psnr")
    assert "needs a ground truth" in report
    assert plot.shape == (1, 360, 960, 3)


def test_what_cannot_be_measured_is_refused_by_name(measure):
    with pytest.raises(ValueError, match="STAR Metrics: no metric is called pnsr"):
        measure(frames(0), "pnsr")
    with pytest.raises(ValueError, match="STAR Metrics: images_b is 24x32, the reference 32x24"):
        measure(frames(0), "psnr", reference=frames(1), images_b=frames(1).movedim(1, 2))
    with pytest.raises(ValueError, match="reference video has 2 frames"):
        measure(frames(0), "psnr", reference=frames(1, 2))


def test_the_plot_has_a_picture_for_each_metric_and_a_curve_for_each_result(measure):
    one, other, truth = frames(0), frames(2), frames(1)
    both = measure(one, "psnr ssim", reference=truth)[1]
    alone = measure(one, "psnr ssim", reference=truth, curves="psnr")[1]
    assert both.shape == (1, 720, 960, 3)
    assert torch.equal(alone, both[:, :360])
    assert not torch.equal(alone, measure(one, "psnr", reference=truth, images_b=other)[1])
    equal = measure(one, "psnr", reference=one)[1]  # infinite, drawn as nothing
    assert equal.shape == alone.shape and not torch.equal(equal, alone)


def test_a_curve_of_what_was_not_measured_is_refused_by_name(measure):
    with pytest.raises(ValueError, match="STAR Metrics: there is no SSIM of each frame: it was"):
        measure(frames(0), "psnr", reference=frames(1), curves="ssim")
