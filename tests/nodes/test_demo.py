"""STAR Demo Clip in the host."""

import importlib

import pytest
import torch

pytestmark = pytest.mark.host


@pytest.fixture(scope="module")
def clip(pack):
    demo = importlib.import_module(".nodes.demo", pack.__name__)
    return lambda *values: demo.StarDemoClip.execute(*values).args


def test_the_demo_clip_needs_no_file(clip):
    images, fps = clip("degraded", 0, 8)
    assert images.shape == (8, 88, 160, 3) and fps > 0
    assert images.std() > 0.05


def test_frames_of_the_demo_clip_end_with_it(clip):
    last, _ = clip("degraded", 20, 24)
    torch.testing.assert_close(last, clip("degraded", 0, 24)[0][20:])


def test_frames_beyond_the_demo_clip_are_refused_by_name(clip):
    with pytest.raises(ValueError, match="STAR Demo Clip: frames 24"):
        clip("degraded", 24, 4)


def test_the_clean_clip_is_what_the_degraded_one_was_made_from(clip):
    (clean, fps), (degraded, its_fps) = clip("clean", 3, 2), clip("degraded", 3, 2)
    assert clean.shape == (2, 352, 640, 3) and fps == its_fps
    small = torch.nn.functional.interpolate(clean.movedim(-1, 1), (88, 160), mode="area")
    assert (small - degraded.movedim(-1, 1)).abs().mean() < 0.05
    assert (small.flip(0) - degraded.movedim(-1, 1)).abs().mean() > (
        small - degraded.movedim(-1, 1)
    ).abs().mean()


def test_a_clip_that_there_is_not_is_named(clip):
    with pytest.raises(ValueError, match="STAR Demo Clip: there is no clip 'blurred'"):
        clip("blurred", 0, 4)
