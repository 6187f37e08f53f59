"""Guidance and strength in the host's sampling."""

import pytest
import torch

from star_core.windows.chunking import ChunkConfig
from tests.nodes.small_host import NORMAL, core_result

pytestmark = pytest.mark.host


def test_guidance_outside_its_interval_is_off(host):
    guided, off = (
        host.ksampler(host.sampling.patch_guidance(host.model, 0.2, *interval), "euler")
        for interval in ((0.0, 1.0), (1.0, 1.0))
    )
    assert torch.equal(off, host.ksampler(host.model, "euler", cfg=1.0))
    partly = host.ksampler(host.sampling.patch_guidance(host.model, 0.2, 0.0, 0.4), "euler")
    assert not torch.equal(partly, off) and not torch.equal(partly, guided)


@pytest.fixture
def at_strength(host, monkeypatch):
    return lambda strength: monkeypatch.setattr(host, "strength", strength)


def test_strength_of_the_conditioning_holds_predictions_back_as_in_the_core(host, at_strength):
    """After guidance: held back before it, its rescaling would see other contrasts."""
    chunk = ChunkConfig(length=5, overlap=1)
    model = host.sampling.patch_guidance(host.model, NORMAL.cfg_rescale)
    model = host.sampling.patch_chunks(model, chunk, "smooth")
    sampler = host.sampling.star_sampler(NORMAL.sampler, "frame")
    at_strength(0.6)
    found = host.run(model, sampler, host.sampling.finite_sigmas(NORMAL))
    wanted, full = (
        core_result(host, NORMAL, chunk, "smooth", "frame", strength=strength)
        for strength in (0.6, 1.0)
    )
    wrong = (found - wanted).abs().max()
    assert wrong < 2e-4 * wanted.abs().max()
    assert wrong < 0.01 * (full - wanted).abs().max()


def test_strength_zero_gives_the_hint_and_more_of_it_changes_more(host, at_strength):
    model = host.sampling.patch_chunks(host.model, ChunkConfig(length=4, overlap=2), "smooth")
    changes = []
    for strength in (0.0, 0.25, 0.5, 1.0):
        at_strength(strength)
        found = host.ksampler(model, "euler", cfg=1.0)
        changes.append((found - host.lq).abs().mean())
    assert changes[0] < 1e-4
    assert changes == sorted(changes) and changes[1] > 0.01
