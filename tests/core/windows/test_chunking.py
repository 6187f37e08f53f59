import weakref

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from star_core.windows.chunking import (
    ChunkConfig,
    blend_windows,
    chunked,
    cut_to,
    filled_to,
    overlapping_windows,
    window_weights,
)

modes = st.sampled_from(["balanced", "reference"])


@st.composite
def requests(draw):
    length = draw(st.integers(1, 80))
    return draw(st.integers(1, 1000)), length, draw(st.integers(0, length - 1))


def spans(windows):
    return [(window.start, window.stop) for window in windows]


@given(requests(), modes)
def test_windows_cover_everything_in_order_and_overlap_as_asked(asked, mode):
    total, length, overlap = asked
    windows = overlapping_windows(total, length, overlap, mode=mode)
    assert windows[0].start == 0 and windows[-1].stop == total
    for before, after in zip(windows, windows[1:], strict=False):
        assert before.start < after.start and before.stop < after.stop
        assert before.stop - after.start >= overlap


@given(requests())
def test_balanced_windows_are_equal_and_none_exceeds_the_length(asked):
    total, length, overlap = asked
    windows = overlapping_windows(total, length, overlap)
    assert len({len(window) for window in windows}) == 1 and len(windows[0]) <= length
    # as few as can be: one window less could not cover the total
    assert len(windows) == 1 or (len(windows) - 1) * (length - overlap) + overlap < total


@given(requests())
def test_reference_windows_exceed_the_length_only_at_the_end_by_a_quarter(asked):
    total, length, overlap = asked
    *windows, last = overlapping_windows(total, length, overlap, mode="reference")
    assert all(len(window) == length for window in windows) and len(last) <= 1.25 * length


@pytest.mark.parametrize("frames", [1, 2, 31, 32])
@pytest.mark.parametrize("mode", ["balanced", "reference"])
def test_a_short_clip_is_one_window(frames, mode):
    assert overlapping_windows(frames, 32, 16, mode=mode) == [range(frames)]


@pytest.mark.parametrize(
    ("frames", "balanced", "reference"),
    [
        (33, [(0, 25), (8, 33)], [(0, 33)]),
        (40, [(0, 28), (12, 40)], [(0, 40)]),
        (41, [(0, 29), (12, 41)], [(0, 32), (16, 41)]),
        (72, [(0, 30), (14, 44), (28, 58), (42, 72)], [(0, 32), (16, 48), (32, 72)]),
    ],
)
def test_windows_of_star_for_clips_around_its_default(frames, balanced, reference):
    assert spans(overlapping_windows(frames, 32, 16)) == balanced
    assert spans(overlapping_windows(frames, 32, 16, mode="reference")) == reference


@settings(max_examples=50)
@given(requests(), modes, st.sampled_from(["smooth", "cut"]))
def test_weights_sum_to_one_everywhere(asked, mode, merge):
    windows = overlapping_windows(*asked, mode=mode)
    weights = window_weights(windows, merge)
    sums = torch.zeros(asked[0])
    for window, weight in zip(windows, weights, strict=True):
        sums[window.start : window.stop] += weight
    torch.testing.assert_close(sums, torch.ones(asked[0]))
    if merge == "cut":
        assert {w for weight in weights for w in weight.tolist()} <= {0.0, 1.0}
    else:
        assert all((weight > 0).all() for weight in weights)


@settings(max_examples=30)
@given(requests())
def test_smooth_weights_change_slowly(asked):
    total, length, overlap = asked
    assume(overlap >= 8)
    windows = overlapping_windows(total, length, overlap)
    for weight in window_weights(windows):
        assert weight.diff().abs().max() < 4 / overlap


@pytest.mark.parametrize("merge", ["smooth", "cut"])
@settings(max_examples=30)
@given(asked=requests())
def test_a_denoiser_that_looks_at_single_frames_is_not_changed_by_windows(merge, asked):
    total, length, overlap = asked
    clip = torch.arange(float(total)).reshape(1, 1, -1, 1, 1)

    def denoise_window(x_in, sigma, window):
        assert x_in.shape[2] == len(window) <= length
        return x_in * sigma + window.start - x_in[:, :, :1]

    denoise = chunked(denoise_window, overlapping_windows(total, length, overlap), merge)
    torch.testing.assert_close(denoise(clip, torch.tensor(0.5)), clip * 0.5)


def test_cut_takes_each_frame_from_one_window_changing_amid_the_overlap():
    windows = [range(0, 4), range(2, 6), range(4, 9)]
    x_in = torch.zeros(1, 1, 9, 1, 1)
    denoise = chunked(lambda x_in, sigma, window: x_in + window.start, windows, "cut")
    assert denoise(x_in, torch.tensor(1.0)).flatten().tolist() == [0, 0, 0, 2, 2, 4, 4, 4, 4]


def test_one_window_is_the_plain_prediction_bit_for_bit():
    prediction = torch.randn(1, 4, 7, 2, 2, generator=torch.Generator().manual_seed(0))
    denoise = chunked(lambda *_: prediction, overlapping_windows(7, 32, 16))
    assert denoise(torch.zeros_like(prediction), torch.tensor(1.0)) is prediction


@pytest.mark.parametrize(
    ("length", "overlap", "message"), [(0, 0, "at least 1"), (4, 4, "overlap"), (4, -1, "overlap")]
)
def test_impossible_windows_are_refused(length, overlap, message):
    with pytest.raises(ValueError, match=message):
        ChunkConfig(length=length, overlap=overlap)
    with pytest.raises(ValueError, match=message):
        overlapping_windows(10, length, overlap)


def test_windows_of_nothing_are_refused():
    with pytest.raises(ValueError, match="at least 1"):
        overlapping_windows(0, 32, 16)


@given(total=st.integers(1, 60), length=st.integers(1, 20), data=st.data())
def test_shifted_windows_have_one_length_and_the_last_ends_with_the_clip(total, length, data):
    overlap = data.draw(st.integers(0, length - 1))
    windows = overlapping_windows(total, length, overlap, mode="shifted")
    assert {len(window) for window in windows} == {min(total, length)}
    assert {frame for window in windows for frame in window} == set(range(total))


@given(frames=st.integers(1, 100), latent_frames=st.integers(1, 8))
def test_numbers_of_frames_are_rounded_to_the_nearest_that_fill_latents(frames, latent_frames):
    whole = [latent_frames * k + 1 for k in range(101)]
    assert cut_to(frames, latent_frames) == max(n for n in whole if n <= frames)
    assert filled_to(frames, latent_frames) == min(n for n in whole if n >= frames)


def test_a_decoded_window_is_let_go_of_before_the_next_is_made():
    made = []

    def video(window):
        assert all(before() is None for before in made)
        pixels = torch.ones(1, 3, len(window), 4, 4)
        made.append(weakref.ref(pixels))
        return pixels

    windows = overlapping_windows(9, 3, 1)
    blended = torch.cat(list(blend_windows(map(video, windows), windows)), dim=2)
    torch.testing.assert_close(blended, torch.ones(1, 3, 9, 4, 4))
    assert len(made) == 4
