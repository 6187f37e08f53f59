import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from star_core.parity import DEFAULT, REFERENCE
from star_core.windows.canvas import Canvas, FrameSpan, cut
from star_core.windows.chunking import ChunkConfig

BEHAVIOURS = st.sampled_from([DEFAULT, REFERENCE])


def absolute(windows, span):
    return [range(w.start + span.needed.start, w.stop + span.needed.start) for w in windows]


def windows_of(span):
    """The denoiser's, by the clip's frames."""
    starts = [group.frames.start for group in span.groups for _ in group.windows]
    windows = [window for group in span.groups for window in group.windows]
    relative = [range(s + w.start, s + w.stop) for s, w in zip(starts, windows, strict=True)]
    return absolute(relative, span)


@given(
    data=st.data(),
    total=st.integers(1, 100),
    before=st.integers(0, 50),
    length=st.integers(1, 20),
    merged=st.sampled_from([0, 30, 100]),
    decode_window=st.integers(2, 5),
    behaviour=BEHAVIOURS,
)
def test_a_part_has_every_window_of_the_whole_shot_that_its_frames_lie_in(
    data, total, before, length, merged, decode_window, behaviour
):
    shot = range(before, before + total)
    options = {
        "chunk": ChunkConfig(length=length, overlap=length // 2, merged=merged),
        "decode_window": decode_window,
        "behaviour": behaviour,
    }
    start = data.draw(st.integers(shot.start, shot.stop - 1))
    wanted = range(start, data.draw(st.integers(start + 1, shot.stop)))
    whole, span = FrameSpan.of(shot, **options), FrameSpan.of(shot, wanted, **options)
    assert whole.requested == whole.needed == shot
    decoded = absolute(span.decode_windows, span)
    assert decoded == [w for w in absolute(whole.decode_windows, whole) if set(w) & set(wanted)]
    seen = set().union(*decoded)
    assert set(wanted) <= seen
    denoised = windows_of(span)
    assert denoised == [w for w in windows_of(whole) if set(w) & seen]
    assert set(span.needed) == set().union(*denoised) >= seen


@given(
    total=st.integers(1, 100),
    length=st.integers(1, 20),
    overlap=st.floats(0, 0.9),
    merged=st.integers(0, 100),
)
def test_the_pieces_of_a_long_shot_take_over_exactly_what_they_share(
    total, length, overlap, merged
):
    chunk = ChunkConfig(length=length, overlap=int(overlap * length), merged=merged)
    span = FrameSpan.of(range(total), chunk=chunk, decode_window=3, behaviour=DEFAULT)
    found = 0
    for group in span.groups:
        assert group.frames.start == found - group.shared
        found = group.frames.stop
        assert {i for w in group.windows for i in w} == set(range(len(group.frames)))
    assert found == total
    assert (len(span.groups) == 1) == (total <= max(merged, length))


def test_reference_merges_the_windows_of_every_clip():
    span = FrameSpan.of(range(500), chunk=ChunkConfig(), decode_window=3, behaviour=REFERENCE)
    assert len(span.groups) == 1


def test_reference_decodes_windows_that_follow_each_other():
    span = FrameSpan.of(range(8), chunk=ChunkConfig(), decode_window=3, behaviour=REFERENCE)
    assert span.decode_windows == [range(0, 3), range(3, 6), range(6, 8)]


@pytest.mark.parametrize("wanted", [range(3, 3), range(5, 9), range(-1, 2)])
def test_frames_that_the_clip_does_not_have_are_refused(wanted):
    with pytest.raises(ValueError, match="not in the clip, which has 0:8"):
        FrameSpan.of(range(8), wanted, chunk=ChunkConfig(), decode_window=3, behaviour=DEFAULT)


@st.composite
def regions(draw):
    height, width = draw(st.integers(1, 900)), draw(st.integers(1, 1500))
    y, x = draw(st.integers(0, height - 1)), draw(st.integers(0, width - 1))
    rows = range(y, draw(st.integers(y + 1, height)))
    columns = range(x, draw(st.integers(x + 1, width)))
    return (width, height), (rows, columns)


@given(
    sized=regions(),
    vae_factor=st.sampled_from([2, 4, 8]),
    levels=st.integers(0, 3),
    margin=st.integers(0, 40),
)
def test_a_crop_is_computed_on_the_grid_of_the_network_with_its_margin(
    sized, vae_factor, levels, margin
):
    size, region = sized
    options = {"vae_factor": vae_factor, "levels": levels, "behaviour": DEFAULT}
    canvas = Canvas.of(size, region, margin=margin, **options)
    assert canvas.padded == Canvas.of(size, **options).padded
    step = vae_factor * 2**levels
    firsts = canvas.padding.top, canvas.padding.left
    lines = zip(canvas.view, canvas.padded, region, firsts, strict=True)
    for view, whole, span, first in lines:
        assert view.start % step == 0 and (len(view) - whole) % step == 0
        assert view and view.stop <= whole
        assert view.start <= max(0, span.start + first - margin * vae_factor)
        assert view.stop >= min(whole, span.stop + first + margin * vae_factor)


@given(sized=regions(), behaviour=BEHAVIOURS)
def test_what_is_computed_comes_out_where_it_belongs(sized, behaviour):
    (width, height), region = sized
    canvas = Canvas.of(
        (width, height), region, vae_factor=8, levels=3, behaviour=behaviour, margin=3
    )
    frame = torch.stack(
        torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    ).float()
    computed = canvas.network_input(frame, behaviour)
    assert torch.equal(canvas.unpadded(computed), canvas.crop(frame))
    assert torch.equal(canvas.result(canvas.unpadded(computed)), cut(frame, region))


def test_the_reference_is_refused_for_a_model_that_its_padding_does_not_fit():
    with pytest.raises(ValueError, match="pads frames to 1280x720, which is not a size that this"):
        Canvas.of((320, 240), vae_factor=4, levels=2, behaviour=REFERENCE)
    Canvas.of((320, 240), vae_factor=4, levels=2, behaviour=DEFAULT)
