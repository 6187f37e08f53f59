import io
from dataclasses import astuple, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from star_core.degradation.compression import jpeg
from star_core.degradation.estimate import FRAMES, Degradation, estimate, spread
from star_core.degradation.ops import gaussian_blur, gaussian_noise
from star_core.degradation.recommend import recommend
from star_core.sampling_defaults import SamplingDefaults
from star_core.video_io import open_video
from tests.paths import ROOT

DEMO = ROOT / "star_core" / "demo_data" / "ground_truth.mp4"


@pytest.fixture(scope="module")
def clean() -> torch.Tensor:
    """Two frames of the demo's film, half as large and thus sharp: (2 3 128 160)."""
    frames = torch.stack(list(open_video(DEMO, frames=(0, 2))))
    return F.interpolate(frames, scale_factor=0.5, mode="area")[..., 24:152, 80:240]


def degraded(video, blur=0.0, noise=0.0, quality=None):
    if blur:
        video = gaussian_blur(video, blur)
    if noise:
        generator = torch.Generator().manual_seed(int(10 * noise))
        video = gaussian_noise(video, noise / 255, generator=generator)
    if quality:
        video = jpeg(video, quality)
    return (video * 255).round() / 255


def rank_correlation(a, b) -> float:
    """Spearman's, ties by their mean rank."""
    ranks = []
    for values in (a, b):
        values = torch.tensor(values, dtype=torch.float64)
        below = (values[:, None] > values).sum(1) + 0.5 * (values[:, None] == values).sum(1)
        ranks.append(below)
    return torch.corrcoef(torch.stack(ranks))[0, 1].item()


@pytest.mark.parametrize("nuisance", [{}, {"noise": 8.0}, {"noise": 3.0, "quality": 60}])
def test_resolution_follows_blur_whatever_the_noise(clean, nuisance):
    sigmas = (0.4, 0.8, 1.2, 2.0, 3.0)
    found = [estimate(degraded(clean, s, **nuisance)).resolution for s in sigmas]
    assert found == sorted(found, reverse=True)
    assert found[0] > 0.75 and found[-1] < 0.25


@pytest.mark.parametrize("nuisance", [{}, {"blur": 1.5}])
def test_noise_is_measured_in_levels_in_sharp_and_in_blurred_clips(clean, nuisance):
    for sigma in (2.0, 5.0, 12.0):
        found = estimate(degraded(clean, noise=sigma, **nuisance)).noise
        assert found == pytest.approx(sigma, rel=0.15, abs=0.6)


def test_texture_is_no_noise(clean):
    assert estimate(clean).noise < 1


def test_noise_before_compression_is_ranked(clean):
    cases = [(sigma, quality) for sigma in (1, 4, 8, 14) for quality in (92, 75)]
    found = [estimate(degraded(clean, noise=s, quality=q)).noise for s, q in cases]
    assert rank_correlation([s for s, _ in cases], found) > 0.9


@pytest.mark.parametrize("nuisance", [{}, {"blur": 1.5, "noise": 6.0}])
def test_jpeg_quality_is_recognised(clean, nuisance):
    for quality in (15, 40, 70, 90):
        found = estimate(degraded(clean, quality=quality, **nuisance)).quality
        assert found == pytest.approx(quality, abs=2)


@pytest.mark.parametrize("quality", [20, 50, 92])
def test_real_jpeg_files_are_recognised_too(clean, quality):
    image = pytest.importorskip("PIL.Image")
    file = io.BytesIO()
    pixels = (clean[0] * 255).round().byte().permute(1, 2, 0).numpy()
    image.fromarray(pixels).save(file, "JPEG", quality=quality)
    decoded = torch.tensor(np.array(image.open(file))).permute(2, 0, 1)[None] / 255
    assert estimate(decoded).quality == pytest.approx(quality, abs=2)


def test_jpeg_is_recognised_in_a_clip_that_was_cut(clean):
    assert estimate(degraded(clean, quality=50)[..., 3:, 5:]).quality == pytest.approx(50, abs=2)


def test_blocks_of_another_codec_lower_the_quality(clean):
    other = F.interpolate(degraded(clean, quality=15), scale_factor=(1, 1 + 1e-6), mode="nearest")
    blocky = (other * 0.93 * 255).round() / 255  # the steps are no longer JPEG's
    assert estimate(blocky).blockiness > estimate(clean).blockiness + 2
    assert estimate(blocky).quality < 50 < estimate(clean).quality


def test_a_border_changes_nothing_but_the_size(clean):
    video = degraded(clean, blur=2.0, noise=5.0)
    boxed = F.pad(video, (16, 16, 24, 24))
    assert estimate(boxed).resolution == pytest.approx(estimate(video).resolution, abs=0.05)
    assert estimate(boxed).noise == pytest.approx(5, abs=1)


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_a_flat_clip_has_no_fault(value):
    found = estimate(torch.full((2, 3, 64, 64), value))
    assert astuple(found) == pytest.approx((1, 0, 0, 0, 100), abs=1e-3)


def test_a_grey_clip_is_measured_like_a_coloured_one(clean):
    grey = clean.mean(1, keepdim=True).expand(-1, 3, -1, -1)
    noise = gaussian_noise(grey, 6 / 255, generator=torch.Generator().manual_seed(0), grey=True)
    assert estimate(noise).noise == pytest.approx(6, rel=0.15)
    assert estimate(grey).resolution == pytest.approx(estimate(clean).resolution, abs=0.05)


def test_enlarging_divides_the_resolution(clean):
    sizes = [F.interpolate(clean, scale_factor=k, mode="bicubic").clamp(0, 1) for k in (2, 4)]
    twice, four_times = (estimate(video).resolution for video in sizes)
    assert twice < 0.8
    assert four_times == pytest.approx(twice / 2, rel=0.2)


@pytest.mark.parametrize("frames", [1, 7, 100])
def test_frames_are_spread_over_the_clip(frames):
    chosen = spread(frames)
    assert len(chosen) == min(frames, FRAMES) == len(set(chosen))
    assert chosen[0] == 0 and (frames == 1 or chosen[-1] == frames - 1)


@pytest.mark.parametrize("shape", [(0, 3, 64, 64), (2, 4, 64, 64), (1, 3, 64, 63)])
def test_what_cannot_be_measured_is_refused(shape):
    with pytest.raises(ValueError, match="RGB frames|at least 64"):
        estimate(torch.zeros(shape))


GOOD = Degradation(resolution=0.95, noise=0.5, blockiness=0.1, ringing=0.1, quality=97)
BAD = Degradation(resolution=0.4, noise=12, blockiness=4, ringing=1, quality=30)


def test_text_says_what_is_wrong():
    assert "sharp" in str(GOOD) and "blurred" in str(BAD)
    assert "very noisy" in str(BAD) and "badly compressed" in str(BAD)


def test_severe_degradation_calls_for_the_heavy_checkpoint_and_more_noise():
    light, heavy = (recommend(d, SamplingDefaults()) for d in (GOOD, BAD))
    assert (light.checkpoint, heavy.checkpoint) == ("light_deg", "heavy_deg")
    assert light.noise_level < heavy.noise_level <= 900
    assert light.cfg < heavy.cfg <= 7.5
    assert light.negative == "" and "noise" in heavy.negative


def test_only_an_input_that_is_blurred_and_noisy_is_shrunk_first():
    blurred = replace(BAD, resolution=0.2)
    assert recommend(blurred, SamplingDefaults()).shrink == 2
    assert recommend(GOOD, SamplingDefaults()).shrink == 1
    assert recommend(replace(GOOD, resolution=0.2), SamplingDefaults()).shrink == 1


def test_a_model_of_one_evaluation_changes_little_where_little_is_wrong():
    tiny = SamplingDefaults(steps=1, solver_mode="normal", cfg=1.0, same_size_strength=0.4)
    advice = [
        recommend(GOOD, tiny, scale=1),
        recommend(GOOD, tiny, scale=1.5),
        recommend(GOOD, tiny, scale=4),
        recommend(BAD, tiny, scale=1),
    ]
    assert [each.strength for each in advice] == [0.4, 0.7, 1, 1]
    assert {(each.noise_level, each.cfg) for each in advice} == {(900, 1.0)}


def test_settings_say_what_they_do():
    assert "shrunk by 2" in str(recommend(replace(BAD, resolution=0.2), SamplingDefaults()))
