import pytest
import torch
import torch.nn.functional as F

from star_core.metrics.gaussian import gaussian_window, local_mean


@pytest.mark.parametrize("shape", [(7, 7), (1, 11), (3, 1), (6, 4)])
def test_a_local_mean_is_a_convolution_with_the_window(shape):
    generator = torch.Generator().manual_seed(0)
    window = torch.rand(shape, generator=generator, dtype=torch.float64)
    maps = torch.rand(2, 3, 17, 23, generator=generator, dtype=torch.float64)
    expected = F.conv2d(maps.flatten(0, 1)[:, None], window[None, None])[:, 0]
    torch.testing.assert_close(local_mean(maps, window).flatten(0, 1), expected)


def test_a_gaussian_window_sums_to_1_and_falls_by_its_sigma():
    window = gaussian_window(7, 1.5)
    assert window.sum().item() == pytest.approx(1)
    assert (window[3, 3] / window[3, 6]).log().item() == pytest.approx(3**2 / (2 * 1.5**2))
