"""STAR Demo Clip in the host."""

import importlib

import pytest
import torch

pytestmark = pytest.mark.host


@pytest.fixture(scope="module")
def clip(pack):
    demo = importlib.import_module(".nodes.demo", pack.__name__)
    return lambda start, frames: demo.StarDemoClip.execute(start, frames).args


def test_the_demo_clip_needs_no_file(clip):
    images, fps = clip(0, 8)
    assert images.shape == (8, 88, 160, 3) and fps > 0
    assert images.std() > 0.05


def test_frames_of_the_demo_clip_end_with_it(clip):
    last, _ = clip(20, 24)
    torch.testing.assert_close(last, clip(0, 24)[0][20:])


def test_frames_beyond_the_demo_clip_are_refused_by_name(clip):
    with pytest.raises(ValueError, match="STAR Demo Clip: frames 24"):
        clip(24, 4)
