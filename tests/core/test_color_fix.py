from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from star_core.color_fix import COLOR_FIXES, adain_color_fix, wavelet_color_fix

GOLDEN = Path(__file__).parents[1] / "golden" / "i2vgenxl"


@pytest.mark.parametrize("case", ["adain_0", "adain_1", "wavelet_0"])
def test_color_fix_equals_the_reference(case):
    golden = load_file(GOLDEN / f"{case}.safetensors")
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
