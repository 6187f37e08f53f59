from dataclasses import replace

import pytest

from star_core.degradation.estimate import Degradation
from star_core.degradation.plot import plot
from tests.words import places_of

pytest.importorskip("PIL", reason="plots are drawn by Pillow")

FOUND = Degradation(resolution=0.4, noise=12, blockiness=4, ringing=1, quality=30)
ROWS = {
    "blur": "effective resolution 40%",
    "noise": "12.0 levels",
    "blockiness": "4.0 levels",
    "ringing": "1.0 levels",
    "compression": "JPEG quality 30",
}


def test_each_bar_stands_between_its_name_and_its_value_with_a_unit():
    picture = plot(FOUND)
    assert picture.min() >= 0 and picture.max() <= 1
    last = 0
    for name, value in ROWS.items():
        ((left, row),) = places_of(name, picture)
        ((right, beside),) = places_of(value, picture)
        assert left < 20 and 300 < right < 330 and abs(row - beside) < 8 and row > last + 20
        last = row


def test_the_picture_says_what_a_long_bar_means():
    assert places_of("Longer is worse. Levels: of 255.", plot(FOUND))


def length_of(bar, picture):
    """Columns of the bar in that place that are filled."""
    ((_, row),) = places_of(list(ROWS)[bar], picture)
    red, _, blue = picture[:, row + 4]
    return int((red - blue > 0.3).sum())


@pytest.mark.parametrize(
    ("bar", "better", "worse"),
    [
        (0, {"resolution": 0.95}, {"resolution": 0.2}),
        (1, {"noise": 1.0}, {"noise": 18.0}),
        (2, {"blockiness": 0.5}, {"blockiness": 7.0}),
        (3, {"ringing": 0.1}, {"ringing": 1.9}),
        (4, {"quality": 95.0}, {"quality": 10.0}),
    ],
)
def test_a_bar_is_longer_where_its_figure_is_worse_and_the_others_stay(bar, better, worse):
    before, good, bad = plot(FOUND), plot(replace(FOUND, **better)), plot(replace(FOUND, **worse))
    assert 0 < length_of(bar, good) < length_of(bar, before) < length_of(bar, bad) < 200
    changed = (good - bad).abs().amax((0, 2)).nonzero()
    ((_, row),) = places_of(list(ROWS)[bar], before)
    assert row - 12 < changed.min() and changed.max() < row + 24


def test_figures_beyond_the_scale_fill_the_bar():
    full = plot(replace(FOUND, noise=100.0))
    assert length_of(1, full) == length_of(1, plot(replace(FOUND, noise=20.0)))
    assert places_of("100.0 levels", full)
    assert length_of(1, plot(replace(FOUND, noise=0.0))) == 0
