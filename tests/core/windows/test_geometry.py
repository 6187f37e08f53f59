import json

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from star_core.windows.geometry import (
    Padding,
    crop,
    minimal_padding,
    output_size,
    pad,
    reference_padding,
    upsample,
)
from tests.paths import GOLDEN

I2VGENXL = GOLDEN / "i2vgenxl"
sizes = st.integers(1, 400)


def network_takes(height: int, width: int, vae_factor: int, levels: int) -> bool:
    """Whether down- and up-sampling as in specification 2.6 come back to the same latent size."""
    latent_height, latent_width = height // vae_factor, width // vae_factor
    h, w, skips = latent_height, latent_width, []
    for _ in range(levels):
        skips.append((h, w))
        h, w = (h + 1) // 2 + 1, (w + 1) // 2
    for skip in reversed(skips):
        h, w = 2 * h - 2, 2 * w
        if (h, w) != skip:
            return False
    return height % vae_factor == width % vae_factor == 0 and min(latent_height, latent_width) > 0


@given(width=sizes, height=sizes, scale=st.floats(1, 4.5))
def test_scaled_size_is_within_half_a_pixel_of_the_exact_one(width, height, scale):
    out = output_size(width, height, scale)
    assert all(abs(o - x * scale) <= 0.5 for o, x in zip(out, (width, height), strict=True))
    assert out[0] >= width and out[1] >= height


def test_half_a_pixel_rounds_up():
    assert output_size(5, 3, 1.5) == (8, 5)


def test_output_size_asked_for_is_kept():
    assert output_size(160, 90, out_size=(641, 361)) == (641, 361)


@pytest.mark.parametrize(
    ("scale", "out_size", "message"),
    [
        (0.5, None, "from 1 up"),
        (float("nan"), None, "finite"),
        (float("inf"), None, "finite"),
        (None, (159, 400), "at least 160x90"),
        (None, None, "either"),
        (2.0, (400, 400), "either"),
    ],
)
def test_sizes_that_cannot_be_made_are_refused_with_a_cure(scale, out_size, message):
    with pytest.raises(ValueError, match=message):
        output_size(160, 90, scale, out_size)


@given(
    height=st.integers(1, 1800),
    width=st.integers(1, 1800),
    vae_factor=st.sampled_from([4, 8]),
    levels=st.integers(0, 3),
)
def test_minimal_padding_is_the_least_that_the_network_takes(height, width, vae_factor, levels):
    left, right, top, bottom = minimal_padding(height, width, vae_factor=vae_factor, levels=levels)
    assert min(left, right, top, bottom) >= 0
    assert right - left in (0, 1) and bottom - top in (0, 1)
    step = vae_factor * 2**levels
    assert left + right < step and top + bottom < step
    assert network_takes(top + height + bottom, left + width + right, vae_factor, levels)


@given(height=st.integers(1, 1800), width=st.integers(1, 1800))
def test_reference_padding_gives_sizes_that_the_full_network_takes(height, width):
    left, right, top, bottom = reference_padding(height, width)
    padded = top + height + bottom, left + width + right
    assert padded[0] >= 720 and padded[1] >= 1280
    assert network_takes(*padded, vae_factor=8, levels=3)


def test_reference_padding_equals_the_reference():
    rows = json.loads((I2VGENXL / "padding.json").read_text())["data"]
    for height, width, padding, padded in rows:
        found = reference_padding(height, width)
        assert found == tuple(padding)
        assert [found.top + height + found.bottom, found.left + width + found.right] == padded


@given(
    height=st.integers(1, 12),
    width=st.integers(1, 12),
    padding=st.builds(Padding, *[st.integers(0, 40)] * 4),
    mode=st.sampled_from(["white", "replicate"]),
)
def test_crop_undoes_padding(height, width, padding, mode):
    video = torch.rand(1, 3, 2, height, width)
    padded = pad(video, padding, mode)
    assert padded.shape[-1] == width + padding.left + padding.right
    assert padded.shape[-2] == height + padding.top + padding.bottom
    assert torch.equal(crop(padded, padding), video)


def test_replicated_padding_repeats_the_nearest_pixel_and_white_is_one():
    video, padding = torch.rand(2, 3, 4, 5), Padding(9, 0, 2, 7)
    assert torch.equal(pad(video, padding, "replicate"), F.pad(video, padding, mode="replicate"))
    assert (pad(video, padding, "white")[..., :9] == 1).all()


def test_upsampling_and_white_padding_equal_the_reference():
    golden = load_file(I2VGENXL / "preprocess_0.safetensors")
    up = upsample(golden["video"], output_size(8, 6, 4))
    # Tolerance of the vector; both are the same two torch calls.
    torch.testing.assert_close(up, golden["up4"], rtol=0, atol=1e-5)
    padded = pad(up, Padding(3, 2, 1, 4), "white")
    torch.testing.assert_close(padded, golden["padded_3_2_1_4"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_upsampling_treats_every_frame_alone(mode):
    video = torch.rand(2, 3, 4, 5, 7)
    up = upsample(video, (11, 9), mode)
    assert up.shape == (2, 3, 4, 9, 11)
    assert torch.equal(up[:, :, 2], upsample(video[:, :, 2], (11, 9), mode))
