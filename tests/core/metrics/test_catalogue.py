import itertools
import json
import math
import sys

import pytest
import torch

from star_core.metrics import (
    DEFAULT_METRICS,
    Setup,
    compare,
    flicker,
    luma,
    ms_ssim,
    optical_flow,
    own_warping_error,
    psnr,
    psnr_y,
    ssim,
    tof,
    visibility,
    warp,
    warping_error,
)
from tests.metric_inputs import pictures
from tests.paths import GOLDEN

EXPECTED = json.loads((GOLDEN / "metrics/golden.json").read_text())


def noise(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def texture(h, w):
    """Smooth (3 h w) in [0, 1], with something to follow at every place."""
    y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    wave = torch.sin(0.31 * x + 0.17 * y) + torch.sin(0.13 * x - 0.37 * y) + torch.sin(0.07 * x * y)
    return (0.5 + 0.15 * wave).expand(3, h, w)


def grey(value, size=(16, 16)):
    return torch.full((3, *size), float(value))


@pytest.fixture
def cv2():
    return pytest.importorskip("cv2", reason="optical flow comes from opencv-python-headless")


def test_psnr_of_an_error_of_a_tenth_is_20_db():
    assert psnr(grey(0.3), grey(0.4)) == pytest.approx(20, abs=1e-4)
    one_channel = grey(0.3) + torch.tensor([0.1, 0, 0])[:, None, None]
    assert psnr(one_channel, grey(0.3)) == pytest.approx(20 + 10 * math.log10(3), abs=1e-4)
    assert psnr(grey(0.3), grey(0.3)) == math.inf


def test_luma_of_black_white_and_red_is_bt601():
    colours = torch.tensor([[0.0, 1, 1], [0, 1, 0], [0, 1, 0]])[:, None]  # (c h w)
    expected = torch.tensor([[[16, 235, 81.481]]]) / 255
    torch.testing.assert_close(luma(colours), expected)


def test_psnr_of_luma_counts_only_luma():
    assert psnr_y(grey(0.3), grey(0.4)) == pytest.approx(20 + 20 * math.log10(255 / 219), abs=1e-3)
    hue = torch.tensor([128.553, -65.481, 0])[:, None, None] / 1000  # no change of luma
    assert psnr_y(grey(0.5) + hue, grey(0.5)) > 100 > 22 > psnr(grey(0.5) + hue, grey(0.5))


def test_ssim_of_flat_frames_is_the_luminance_term():
    # Without variance: (2ab + C1) / (a^2 + b^2 + C1).
    expected = (2 * 0.2 * 0.6 + 1e-4) / (0.2**2 + 0.6**2 + 1e-4)
    assert ssim(grey(0.2), grey(0.6)) == pytest.approx(expected, abs=1e-5)
    assert ssim(grey(0.2, (11, 11)), grey(0.2, (11, 11))) == pytest.approx(1)


@pytest.mark.parametrize("size", [(11, 11), (12, 31), (40, 33)])
def test_ssim_is_that_of_scikit_image(size):
    metrics = pytest.importorskip("skimage.metrics", reason="the reference is in scikit-image")
    reference = texture(*size)
    for restored in (reference + 0.1 * noise(3, *size), 1 - reference, noise(3, *size) * 0.01):
        expected = metrics.structural_similarity(
            restored.double().numpy(),
            reference.double().numpy(),
            channel_axis=0,
            data_range=1.0,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
        assert ssim(restored, reference) == pytest.approx(expected, abs=1e-5)  # float32


def test_ms_ssim_is_that_of_piq():
    assert ms_ssim(*pictures(192, 208)) == pytest.approx(EXPECTED["ms_ssim"], abs=1e-5)  # float32


def test_ms_ssim_of_flat_frames_is_the_luminance_term_of_the_coarsest_scale():
    luminance = (2 * 0.2 * 0.6 + 1e-4) / (0.2**2 + 0.6**2 + 1e-4)
    value = ms_ssim(grey(0.2, (176, 180)), grey(0.6, (176, 180)))
    assert value == pytest.approx(luminance**0.1333, abs=1e-5)
    with pytest.raises(ValueError, match="at least 176x176, got 180x175"):
        ms_ssim(grey(0.2, (175, 180)), grey(0.6, (175, 180)))


def test_flicker_is_the_change_that_the_reference_lacks_in_8_bit_levels():
    restored = torch.stack((grey(0.5), grey(0.6)))
    reference = torch.stack((grey(0.2), grey(0.22)))
    assert flicker(restored, reference) == pytest.approx(0.08 * 255, abs=1e-3)
    assert flicker(reference + 0.3, reference) == pytest.approx(0, abs=1e-4)


def test_warp_fetches_from_where_the_flow_points():
    frame = torch.arange(12.0).reshape(1, 3, 4)
    flow = torch.zeros(2, 3, 4)
    flow[0] = 1
    assert torch.allclose(warp(frame, flow), frame[..., [1, 2, 3, 3]])
    flow[0], flow[1] = 0.5, 1
    down = frame[:, [1, 2, 2]]
    assert torch.allclose(warp(frame, flow), (down + down[..., [1, 2, 3, 3]]) / 2, atol=1e-5)


def test_visible_is_what_leads_back_home_inside_the_frame():
    forward, backward = torch.zeros(2, 2, 4, 8)
    forward[0], backward[0] = 3, -3
    visible = torch.arange(8) + 3 <= 7  # the last three columns leave the frame
    assert torch.equal(visibility(forward, backward), visible.expand(4, 8))
    backward[0, 1] = 0  # 9 > 0.01 * 9 + 0.5
    expected = visible.expand(4, 8).clone()
    expected[1] = False
    assert torch.equal(visibility(forward, backward), expected)
    backward[0] = -3.7  # 0.49 < 0.5
    assert torch.equal(visibility(forward, backward), visible.expand(4, 8))


@pytest.mark.parametrize("shift", [(0, 3), (2, 0), (-1, -2)])
def test_flow_of_a_shifted_texture_is_the_shift(cv2, shift):
    whole = texture(80, 90)
    frame = whole[:, 8:72, 8:80]
    target = whole[:, 8 - shift[0] : 72 - shift[0], 8 - shift[1] : 80 - shift[1]]
    inner = optical_flow(frame, target)[:, 8:-8, 8:-8]
    assert inner[0].median().item() == pytest.approx(shift[1], abs=0.1)
    assert inner[1].median().item() == pytest.approx(shift[0], abs=0.1)


@pytest.mark.parametrize("size", [(1, 1), (5, 400), (15, 200), (200, 13)])
def test_flow_takes_small_and_narrow_frames(cv2, size):
    flow = optical_flow(texture(*size), texture(*size))
    assert flow.shape == (2, *size) and flow.isfinite().all()


def test_warping_error_of_a_change_of_a_tenth_without_motion_is_10(cv2):
    still = torch.stack((texture(48, 48), texture(48, 48)))
    restored = still.clone()
    restored[1] += 0.1
    assert warping_error(restored, still) == pytest.approx(10, abs=0.01)
    assert warping_error(still, still) == pytest.approx(0, abs=1e-6)


def test_warping_error_follows_the_motion(cv2):
    whole = texture(64, 80)
    moving = torch.stack((whole[..., :64], whole[..., 3:67]))
    unmoved = moving[:1].expand(2, -1, -1, -1)
    error = warping_error(moving, moving)
    assert error < 0.1 * 1000 * (moving[1] - moving[0]).square().mean()
    # A picture that stands still where the truth moves is wrong by the reference's flow only.
    assert warping_error(unmoved, moving) > 10 * error
    assert own_warping_error(unmoved, moving) == pytest.approx(0, abs=1e-6)


def test_tof_is_the_length_of_the_wrong_motion_in_pixels():
    def by_mean(frame, target):  # a flow that says how much brighter the target is
        return (target - frame)[:1].mean().expand(2, *frame.shape[-2:])

    restored = torch.stack((grey(0.1), grey(0.5)))
    reference = torch.stack((grey(0.1), grey(0.2)))
    assert tof(restored, reference, by_mean) == pytest.approx(0.3 * math.sqrt(2), abs=1e-6)
    assert tof(reference, reference, by_mean) == 0


def test_tof_of_a_video_that_stands_still_is_the_motion_of_the_reference(cv2):
    whole = texture(64, 100)
    reference = torch.stack((whole[..., 10:74], whole[..., 13:77]))
    restored = reference[:1].expand(2, -1, -1, -1)
    assert tof(restored, reference) == pytest.approx(3, abs=0.4)


def test_comparison_has_every_value_of_every_frame_and_their_means(cv2):
    reference = [texture(32, 32) * k for k in (1.0, 0.9, 0.7)]
    restored = [reference[0] + 0.1, reference[1] - 0.01, reference[2]]
    result = compare(iter(restored), iter(reference))
    assert tuple(result.per_frame) == DEFAULT_METRICS
    assert result.per_frame["psnr"] == pytest.approx([20, 40, math.inf], abs=1e-3)
    assert result.means["psnr"] == math.inf
    assert result.per_frame["ssim"][2] == pytest.approx(1)
    assert math.isnan(result.per_frame["flicker"][0])
    assert result.per_frame["flicker"][1:] == pytest.approx([0.11 * 255, 0.01 * 255], abs=1e-3)
    assert result.means["flicker"] == pytest.approx(0.06 * 255, abs=1e-3)
    assert math.isnan(result.per_frame["warping_error"][0])
    assert result.means["warping_error"] > 0


def test_metrics_share_the_flows_of_a_pair(monkeypatch):
    asked = []

    def flow(frame, target):
        asked.append((frame.mean().item(), target.mean().item()))
        return torch.zeros(2, *frame.shape[-2:])

    monkeypatch.setattr("star_core.metrics.catalogue.require_opencv", lambda: None)
    monkeypatch.setattr("star_core.metrics.catalogue.optical_flow", flow)
    restored, reference = ([grey(k + n / 64) for n in range(3)] for k in (0.25, 0.5))
    names = ["warping_error", "own_warping_error", "tof"]
    compare(restored, reference, metrics=names)
    pairs = [(k + n / 64, k + (n + 1) / 64) for k in (0.25, 0.5) for n in range(2)]
    assert sorted(asked) == sorted(pairs + [(b, a) for a, b in pairs])


def test_one_frame_has_no_flicker():
    result = compare([grey(0.1)], [grey(0.2)], metrics=["psnr", "flicker", "warping_error"])
    assert result.means["psnr"] == pytest.approx(20, abs=1e-4)
    assert math.isnan(result.means["flicker"]) and math.isnan(result.means["warping_error"])


def test_alpha_is_not_compared(cv2):
    restored, reference = noise(3, 4, 32, 32), noise(3, 3, 32, 32, seed=1)
    with_alpha, without = compare(restored, reference), compare(restored[:, :3], reference)
    assert with_alpha.means == without.means


def test_frames_are_taken_one_by_one_and_as_many_of_both():
    endless = itertools.repeat(grey(0.5))
    with pytest.raises(ValueError, match="restored video has 2 frames, the reference one more"):
        compare([grey(0.5)] * 2, endless, metrics=["psnr"])
    with pytest.raises(ValueError, match="reference video has 0 frames"):
        compare(endless, [], metrics=["psnr"])
    with pytest.raises(ValueError, match="no frames"):
        compare([], [])


def test_what_cannot_be_compared_is_told():
    with pytest.raises(ValueError, match="frame 0 is 16x12 restored and 16x16"):
        compare([grey(0, (12, 16))], [grey(0, (16, 16))])
    with pytest.raises(ValueError, match="at least 11x11, got 16x10"):
        compare([grey(0, (10, 16))], [grey(0, (10, 16))])
    with pytest.raises(ValueError, match="no metric is called vmaff: choose from psnr"):
        compare([], [], metrics=["psnr", "vmaff"])


def test_without_opencv_the_other_metrics_can_be_had(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    frames = [grey(0.5), grey(0.6)]
    with pytest.raises(ValueError, match="pip install opencv-python-headless"):
        compare(frames, frames)
    names = [name for name in DEFAULT_METRICS if name != "warping_error"]
    assert compare(frames, frames, metrics=names).means["flicker"] == 0


def test_what_a_metric_lacks_is_told_and_the_others_are_measured(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "cv2", None)
    frames = [grey(0.5, (64, 64)), grey(0.6, (64, 64))]
    names = ["psnr", "ms_ssim", "lpips", "niqe", "warping_error", "flicker"]
    setup = Setup(weights=tmp_path)
    with pytest.raises(ValueError, match="metric-weights lpips_alex"):
        compare(frames, frames, metrics=names[2:3], setup=setup)
    result = compare(frames, frames, metrics=names, setup=setup, skip_missing=True)
    assert result.per_frame.keys() == {"psnr", "flicker"}
    assert len(result.per_frame["psnr"]) == 2
    reported = {
        "ms_ssim": "at least 176x176",
        "lpips": "metric-weights lpips_alex",
        "niqe": "metric-weights niqe",
        "warping_error": "pip install opencv-python-headless",
    }
    assert result.missing.keys() == reported.keys()
    for name, words in reported.items():
        assert words in result.missing[name] and "\n" not in result.missing[name]


def test_without_a_ground_truth_only_what_needs_none_is_measured(cv2):
    frames = [texture(48, 48), texture(48, 48) * 0.9]
    names = ["psnr", "own_warping_error"]
    with pytest.raises(ValueError, match="PSNR, dB needs a ground truth"):
        compare(frames, None, metrics=names)
    result = compare(frames, None, metrics=names, skip_missing=True)
    assert result.missing.keys() == {"psnr"}
    assert (
        result.means["own_warping_error"]
        == compare(frames, frames, metrics=["own_warping_error"]).means["own_warping_error"]
    )


def test_measuring_tells_how_far_it_is_and_can_be_interrupted():
    done = []
    compare([grey(0.5)] * 3, [grey(0.5)] * 3, metrics=["psnr"], on_frame=done.append)
    assert done == [1, 2, 3]

    def stop(count):
        raise KeyboardInterrupt

    endless = itertools.repeat(grey(0.5))
    with pytest.raises(KeyboardInterrupt):
        compare(endless, endless, metrics=["psnr"], on_frame=stop)
