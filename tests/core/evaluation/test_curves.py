import math
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from star_core.drawing import COLOURS, ticks
from star_core.evaluation.curves import curves
from tests.words import places_of

pytest.importorskip("PIL", reason="plots are drawn by Pillow")
BLUE = torch.tensor([int(COLOURS[0][i : i + 2], 16) / 255 for i in (1, 3, 5)])


def rows_with(picture, colour, column):
    """Rows of a column that have the colour."""
    return (picture[:, :, column] - colour[:, None]).abs().amax(0).lt(0.02).nonzero().flatten()


def drawn(values):
    picture = curves({"a": values}, title="values", width=400, height=300)
    return picture[:, 44:, :]  # below the names


def test_a_higher_value_is_drawn_higher():
    picture = drawn([0.0, 10.0])
    left, right = rows_with(picture, BLUE, 85), rows_with(picture, BLUE, 370)
    assert right.float().mean() < left.float().mean() - 150


def test_title_names_and_the_axis_of_frames_stand_where_they_belong():
    picture = curves({"one": [1.0, 2.0], "other": [2.0, 1.0]}, title="PSNR, dB")
    ((column, row),) = places_of("PSNR, dB", picture)
    assert column < 100 and row < 40
    ((column, row),) = places_of("frame", picture)
    assert 400 < column < 600 and row > 330
    ((one, row),) = places_of("one", picture, COLOURS[0])
    ((other, beside),) = places_of("other", picture, COLOURS[1])
    assert 600 < one < other and abs(row - beside) < 6 and row < 40


@pytest.mark.parametrize("gap", [math.nan, math.inf])
def test_a_frame_without_a_value_leaves_a_gap(gap):
    picture = drawn([1.0, 2.0, gap, gap, 2.0, 1.0])
    assert not len(rows_with(picture, BLUE, 230))
    assert len(rows_with(picture, BLUE, 100)) and len(rows_with(picture, BLUE, 360))


@pytest.mark.parametrize("values", [[], [3.0], [2.0, 2.0], [math.nan], [-1e-9, 1e12]])
def test_any_values_can_be_drawn(values):
    picture = curves({"a": values}, title="values")
    assert picture.shape == (3, 360, 960)
    assert picture.min() >= 0 and picture.max() <= 1


@given(st.floats(-1e9, 1e9), st.floats(0, 1e9))
def test_ticks_are_few_and_enclose_the_values(low, span):
    first, last, marks = ticks(low, low + span)
    slack = 1e-9 * max(abs(low), span)
    assert first <= low + slack and last >= low + span - slack
    assert 2 <= len(marks) <= 9


def test_what_cannot_be_drawn_is_told(monkeypatch):
    with pytest.raises(ValueError, match="one to 6 curves can be drawn, got 7"):
        curves({str(n): [1.0] for n in range(7)}, title="")
    with pytest.raises(ValueError, match="at least 200x200 pixels, got 960x100"):
        curves({"a": [1.0]}, title="", height=100)
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ValueError, match="pip install pillow"):
        curves({"a": [1.0]}, title="")
