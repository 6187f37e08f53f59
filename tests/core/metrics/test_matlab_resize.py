import torch
from hypothesis import given
from hypothesis import strategies as st

from star_core.metrics.matlab_resize import imresize


def test_a_ramp_stays_a_ramp_between_the_borders():
    ramp = torch.arange(32, dtype=torch.float64).expand(1, 8, 32)
    half = imresize(ramp, (4, 16))
    torch.testing.assert_close(half[0, 0, 2:-2], torch.arange(4.5, 28, 2, dtype=torch.float64))
    larger = imresize(ramp, (8, 64))
    torch.testing.assert_close(
        larger[0, 3, 6:-6], torch.arange(64, dtype=torch.float64)[6:-6] / 2 - 0.25
    )


def test_an_enlarged_step_is_that_of_the_cubic_kernel():
    step = torch.tensor([0.0, 0, 0, 0, 1, 1, 1, 1], dtype=torch.float64).expand(1, 1, 8)
    row = imresize(step, (1, 16))[0, 0]
    # Keys' kernel with a = -1/2 at quarters of a pixel.
    expected = [0, 0, 0, -0.0234375, -0.0703125, 0.203125 - 0.0703125 + 0.0703125]
    torch.testing.assert_close(row[2:6], torch.tensor([0, 0, 0, -0.0234375], dtype=torch.float64))
    torch.testing.assert_close(row + row.flip(0), torch.ones(16, dtype=torch.float64))
    assert expected[3] == row[5]


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 40), st.integers(1, 40))
def test_a_flat_picture_stays_flat_at_any_size(h, w, to_h, to_w):
    flat = torch.full((3, h, w), 7.0, dtype=torch.float64)
    resized = imresize(flat, (to_h, to_w))
    torch.testing.assert_close(resized, torch.full((3, to_h, to_w), 7.0, dtype=torch.float64))


def test_the_same_size_changes_nothing():
    picture = torch.rand(3, 9, 7, dtype=torch.float64)
    torch.testing.assert_close(imresize(picture, (9, 7)), picture)
