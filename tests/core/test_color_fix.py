import pytest
import torch
from safetensors.torch import load_file

from star_core.color_fix import (
    COLOR_FIXES,
    adain_color_fix,
    fix_colors,
    pixel_statistics,
    steady_statistics,
    wavelet_color_fix,
)
from star_core.windows.geometry import upsample
from tests.paths import GOLDEN

I2VGENXL = GOLDEN / "i2vgenxl"


@pytest.mark.parametrize("case", ["adain_0", "adain_1", "wavelet_0"])
def test_color_fix_equals_the_reference(case):
    golden = load_file(I2VGENXL / f"{case}.safetensors")
    video = golden["target"].movedim(-1, 1) / 255
    fixed = COLOR_FIXES[case.split("_")[0]](video, golden["source"] * 0.5 + 0.5)
    # Tolerance of the vectors, in 8-bit levels.
    torch.testing.assert_close(fixed.movedim(1, -1) * 255, golden["out"], rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", COLOR_FIXES)
def test_one_frame_at_a_time_gives_the_same_result(name):
    video, reference = torch.rand(2, 4, 3, 9, 8)
    whole = COLOR_FIXES[name](video, reference)
    single = [COLOR_FIXES[name](v, r) for v, r in zip(video, reference, strict=True)]
    assert torch.equal(whole, torch.stack(single))


@pytest.mark.parametrize("name", COLOR_FIXES)
def test_both_layouts_give_the_same_result(name):
    video, reference = torch.rand(2, 1, 3, 4, 9, 8)
    whole = COLOR_FIXES[name](video, reference)
    frames = COLOR_FIXES[name](video[0].movedim(1, 0), reference[0].movedim(1, 0))
    assert torch.equal(whole[0].movedim(1, 0), frames)


@pytest.mark.parametrize("name", COLOR_FIXES)
def test_result_is_in_range_and_finite_down_to_one_pixel(name):
    for size in [(1, 1), (1, 5), (3, 2)]:
        video, reference = torch.randn(2, 1, 3, *size) * 3
        fixed = COLOR_FIXES[name](video, reference)
        assert fixed.isfinite().all() and fixed.min() >= 0 and fixed.max() <= 1


def test_adain_takes_mean_and_contrast_of_a_reference_of_another_size():
    video, reference = 0.4 + 0.1 * torch.rand(2, 3, 16, 16), 0.2 + 0.5 * torch.rand(2, 3, 5, 7)
    fixed = adain_color_fix(video, reference)
    # Nothing is clamped here; 1e-5 is what the method adds to both variances.
    torch.testing.assert_close(fixed.mean((-2, -1)), reference.mean((-2, -1)))
    torch.testing.assert_close(fixed.var((-2, -1)), reference.var((-2, -1)), rtol=0.02, atol=1e-4)


def test_wavelet_takes_the_colour_and_keeps_the_detail():
    detail = 0.1 * (-1.0) ** torch.arange(64).add(torch.arange(64)[:, None])
    reference = torch.tensor([0.3, 0.5, 0.6])[:, None, None].expand(3, 64, 64)
    fixed = wavelet_color_fix(0.5 + detail.expand(3, 64, 64), reference)
    # Away from the edges, which the filter repeats, a checkerboard has no low band at all.
    inside = fixed[:, 31:-31, 31:-31]
    torch.testing.assert_close(inside, (reference + detail)[:, 31:-31, 31:-31])


def test_wavelet_refuses_frames_of_different_sizes():
    with pytest.raises(ValueError, match="upsample the reference"):
        wavelet_color_fix(torch.rand(1, 3, 8, 8), torch.rand(1, 3, 4, 4))


# --- Clips ---


@pytest.mark.parametrize("method", COLOR_FIXES)
def test_a_clip_without_smoothing_is_its_frames_bit_for_bit(method):
    video, reference = torch.rand(2, 4, 3, 9, 8)
    fixed = torch.stack(list(fix_colors(video, reference, method=method)))
    assert torch.equal(fixed, COLOR_FIXES[method](video, reference))


def changes(frames: torch.Tensor) -> float:
    """Mean change of mean and deviation from frame to frame, in 8-bit levels."""
    return 255 * torch.cat(pixel_statistics(frames), 1).diff(dim=0).abs().mean().item()


def flickering_clip(frames: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    """A static scene, and the same with a brightness and a strength of noise that flicker."""
    y, x = torch.meshgrid(torch.linspace(0, 3, 40), torch.linspace(0, 3, 40), indexing="ij")
    scene = 0.5 + 0.2 * torch.stack([torch.sin(x + y), torch.cos(x), torch.sin(2 * y)])
    scene = scene.expand(frames, 3, 40, 40)
    sigma, shift = 0.08 * torch.rand(frames, 1, 1, 1), 0.01 * torch.randn(frames, 1, 1, 1)
    return scene, scene + shift + sigma * torch.randn(scene.shape)


@pytest.mark.parametrize("method", ["adain", "wavelet"])
def test_flickering_noise_makes_a_static_scene_pump_less_with_smoothing(method):
    scene, reference = flickering_clip()
    alone = torch.stack(list(fix_colors(scene, reference, method=method)))
    smooth = torch.stack(list(fix_colors(scene, reference, method=method, smoothing=3.0)))
    assert changes(alone) > 1
    assert changes(smooth) < changes(alone) / 3


def test_smoothing_takes_out_what_pumps_in_the_video_itself():
    scene, reference = flickering_clip()
    pumping = scene + 0.1 * torch.randn(len(scene), 1, 1, 1)
    fixed = torch.stack(list(fix_colors(pumping.clamp(0, 1), reference, smoothing=3.0)))
    assert changes(fixed) < 0.1 * changes(pumping)


def test_steady_statistics_keep_cuts_flashes_and_fades():
    def gray(levels: torch.Tensor) -> torch.Tensor:
        return levels[:, None, None, None].expand(-1, 3, 8, 8)

    cut = torch.tensor([0.2] * 6 + [0.6] * 6)
    flash = torch.tensor([0.3] * 6 + [0.9] + [0.3] * 6)
    fade = torch.linspace(0.2, 0.5, 30)
    for levels, inside in ((cut, slice(None)), (flash, slice(None)), (fade, slice(9, -9))):
        steady = steady_statistics(pixel_statistics(gray(levels)), 3.0)
        kept = steady.mean[:, 0, 0, 0]
        torch.testing.assert_close(kept[inside], levels[inside], rtol=0, atol=1e-3)


def test_strength_goes_from_the_video_to_the_whole_fix():
    video, reference = torch.rand(2, 2, 3, 8, 8)
    none, half, full = (
        torch.stack(list(fix_colors(video, reference, strength=strength)))
        for strength in (0.0, 0.5, 1.0)
    )
    assert torch.equal(none, video) and torch.equal(full, adain_color_fix(video, reference))
    torch.testing.assert_close(half, (video + full) / 2)


@pytest.mark.parametrize("smoothing", [0.0, 2.0])
@pytest.mark.parametrize("method", COLOR_FIXES)
def test_a_clips_reference_may_have_another_size(method, smoothing):
    video, reference = torch.rand(3, 3, 16, 12), torch.rand(3, 3, 5, 7)
    fixed = torch.stack(list(fix_colors(video, reference, method=method, smoothing=smoothing)))
    assert fixed.shape == video.shape and fixed.isfinite().all()
    if not smoothing:
        large = upsample(reference, (12, 16), "bilinear").clamp(0, 1)
        torch.testing.assert_close(fixed, COLOR_FIXES[method](video, large))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "lab"}, "color fix must be one of adain, wavelet, none, got 'lab'"),
        ({"strength": 1.5}, "strength must be from 0 to 1"),
        ({"smoothing": -1.0}, "smoothing must be a number of frames from 0 up"),
        ({"reference": torch.rand(3, 3, 8, 8)}, "2 frames and the reference 3"),
    ],
)
def test_what_cannot_be_is_refused(change, message):
    clip = {"video": torch.rand(2, 3, 8, 8), "reference": torch.rand(2, 3, 8, 8)}
    with pytest.raises(ValueError, match=message):
        next(fix_colors(**(clip | change)))
