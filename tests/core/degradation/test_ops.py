import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from star_core.degradation import ops


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("kind", ["gaussian", "generalized", "plateau"])
def test_kernel_is_normalised_and_symmetric_about_its_centre(kind):
    kernel = ops.blur_kernel(15, (2.1, 0.7), 0.6, kind=kind, beta=1.7)
    assert kernel.sum() == pytest.approx(1)
    torch.testing.assert_close(kernel, kernel.flip(0, 1))


def test_anisotropic_kernel_is_widest_along_theta():
    kernel = ops.blur_kernel(21, (3.0, 0.8), math.pi / 2)  # x axis turned onto y
    assert kernel[0, 10] > 10 * kernel[10, 0]


def test_sinc_kernel_passes_below_its_cutoff_and_stops_above():
    x = torch.arange(64.0).expand(1, 1, 64, 64)
    kernel = ops.sinc_kernel(21, math.pi / 2)
    contrast = [
        ops.blur(torch.cos(w * math.pi * x), kernel)[..., 12:-12, 12:-12].abs().max()
        for w in (0.125, 0.875)
    ]
    assert contrast[0] > 0.9 and contrast[1] < 0.1


def test_separable_gaussian_equals_the_general_kernel():
    video = torch.rand(2, 3, 20, 17, generator=generator())
    expected = ops.blur(video, ops.blur_kernel(13, 1.5))
    torch.testing.assert_close(ops.gaussian_blur(video, 1.5), expected, atol=2e-6, rtol=0)


def test_parameters_per_frame_act_on_their_own_frame():
    video = torch.rand(2, 3, 24, 24, generator=generator())
    both = ops.gaussian_blur(video, torch.tensor([0.5, 2.0]))
    torch.testing.assert_close(both[1:], ops.gaussian_blur(video[1:], 2.0))
    assert (both[0] - video[0]).abs().mean() < (both[1] - video[1]).abs().mean()


@given(h=st.integers(1, 12), w=st.integers(1, 12), radius=st.integers(0, 25))
def test_blur_keeps_a_flat_frame_of_any_size(h, w, radius):
    video = torch.full((1, 3, h, w), 0.3)
    kernel = ops.blur_kernel(2 * radius + 1, 3.0)
    torch.testing.assert_close(ops.blur(video, kernel), video)


def test_mirrored_edges_are_those_of_torch_where_it_has_them():
    video = torch.rand(1, 3, 9, 11, generator=generator())
    expected = torch.nn.functional.pad(video, (8, 8, 8, 8), mode="reflect")
    assert torch.equal(ops.reflect_pad(video, 8), expected)


def test_unsharp_mask_steepens_edges_and_leaves_flat_parts():
    video = torch.full((1, 3, 64, 64), 0.25)
    video[..., 32:] = 0.75
    sharp = ops.usm_sharpen(video)
    assert sharp[0, 0, 32, 32] > 0.8 and sharp[0, 0, 32, 31] < 0.2
    flat = torch.full((1, 3, 64, 64), 0.4)
    torch.testing.assert_close(ops.usm_sharpen(flat), flat)


def test_area_resize_averages():
    video = torch.rand(2, 3, 8, 12, generator=generator())
    expected = torch.nn.functional.avg_pool2d(video, 4)
    torch.testing.assert_close(ops.resize(video, (2, 3), "area"), expected)


def test_gaussian_noise_has_its_sigma_and_is_repeatable():
    video = torch.full((4, 3, 64, 64), 0.5)
    noisy = ops.gaussian_noise(video, 12 / 255, generator=generator(1))
    assert (noisy - video).std().item() == pytest.approx(12 / 255, rel=0.03)
    assert torch.equal(noisy, ops.gaussian_noise(video, 12 / 255, generator=generator(1)))


@pytest.mark.parametrize("noise", [ops.gaussian_noise, ops.poisson_noise])
def test_grey_noise_is_shared_by_the_channels(noise):
    video = torch.full((1, 3, 8, 8), 0.5)
    grey = noise(video, 0.1, generator=generator(), grey=True)
    colour = noise(video, 0.1, generator=generator(), grey=False)
    assert torch.equal(grey[:, 0], grey[:, 2]) and not torch.equal(colour[:, 0], colour[:, 2])


def test_photon_noise_grows_with_brightness():
    ramp = torch.linspace(0.1, 0.6, 256).expand(1, 3, 64, 256)
    noise = ops.poisson_noise(ramp, 0.5, generator=generator()) - ramp
    assert noise[..., -64:].std() > 1.5 * noise[..., :64].std()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.blur_kernel(4, 1.0), "must be odd"),
        (lambda: ops.blur_kernel(5, 0.0), "sigma must be above 0"),
        (lambda: ops.sinc_kernel(5, 4.0), "cutoff must be in"),
        (lambda: ops.gaussian_blur(torch.rand(1, 3, 8, 8), 0.0), "sigma must be above 0"),
        (lambda: ops.resize(torch.rand(1, 3, 3, 8), (0, 2), "area"), "cannot resize to 2x0"),
    ],
)
def test_impossible_parameters_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
