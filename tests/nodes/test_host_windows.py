"""Windows of frames in the host's sampling: ours, and its own context windows."""

from dataclasses import replace

import pytest
import torch

from star_core.models.unet import ControlledVideoUNet
from star_core.windows.chunking import ChunkConfig
from tests.nodes.small_host import SHAPE, likeness

pytestmark = pytest.mark.host


@pytest.mark.parametrize("name", ["euler", "heun", "dpmpp_2m", "dpmpp_2m_sde", "uni_pc"])
def test_the_hosts_ksampler_restores_in_chunks(host, name):
    chunk = ChunkConfig(length=5, overlap=2)
    model = host.sampling.patch_chunks(
        host.sampling.patch_guidance(host.model, 0.2), chunk, "smooth"
    )
    found = host.ksampler(model, name, cfg=1.0)
    assert found.shape == SHAPE
    assert likeness(found, host.lq) > 0.7


def test_chunks_leave_a_short_clip_as_it_is(host):
    chunked_model = host.sampling.patch_chunks(host.model, ChunkConfig(length=16, overlap=8), "cut")
    plain, windows = (host.ksampler(m, "euler", steps=2) for m in (host.model, chunked_model))
    assert torch.equal(plain, windows)


def test_chunks_applied_twice_count_once(host):
    once = host.sampling.patch_chunks(host.model, ChunkConfig(length=4, overlap=2), "cut")
    other = host.sampling.patch_chunks(host.model, ChunkConfig(length=6, overlap=0), "smooth")
    twice = host.sampling.patch_chunks(other, ChunkConfig(length=4, overlap=2), "cut")
    assert torch.equal(
        host.ksampler(once, "euler", steps=2), host.ksampler(twice, "euler", steps=2)
    )


@pytest.fixture
def context_windows():
    """Gives a MODEL the host's own windows of 5 frames, 2 of them shared."""
    from comfy.context_windows import (  # pyright: ignore[reportMissingImports]
        ContextFuseMethods,
        ContextSchedules,
        IndexListContextHandler,
        get_matching_context_schedule,
        get_matching_fuse_method,
    )

    def windowed(model):
        model = model.clone()
        model.model_options["context_handler"] = IndexListContextHandler(
            context_schedule=get_matching_context_schedule(ContextSchedules.STATIC_STANDARD),
            fuse_method=get_matching_fuse_method(ContextFuseMethods.PYRAMID),
            context_length=5,
            context_overlap=2,
            context_stride=1,
            closed_loop=False,
            dim=2,
        )
        return model

    return windowed


def test_the_hosts_own_context_windows_see_their_part_of_the_hint(host, context_windows):
    found = host.ksampler(context_windows(host.model), "euler", cfg=1.0)
    assert likeness(found, host.lq) > 0.7


def test_the_hosts_context_windows_work_inside_our_windows(host, context_windows):
    chunk = ChunkConfig(length=7, overlap=3)
    model = host.sampling.patch_chunks(context_windows(host.model), chunk, "smooth")
    assert likeness(host.ksampler(model, "euler", cfg=1.0), host.lq) > 0.7


def small_file(host, **changes):
    """The file of a network that is much smaller than tiny, with random weights."""
    config = host.model_file.UNetConfig(
        in_dim=32,
        out_dim=32,
        dim=16,
        dim_mult=(1, 1),
        num_heads=2,
        head_dim=8,
        num_res_blocks=1,
        attn_scales=(0.5,),
        norm_groups=4,
        **changes,
    )
    return replace(host.star, config=config, tensors=ControlledVideoUNet(config).state_dict())


def test_context_windows_do_not_take_text_for_frames(host, context_windows, monkeypatch):
    frames = SHAPE[2]
    text = torch.randn(1, 7, frames, generator=torch.Generator().manual_seed(1))
    for name in ("positive", "negative"):
        monkeypatch.setattr(host, name, text)
    model = host.model_file.load_patcher(small_file(host, context_dim=frames))
    found = host.ksampler(context_windows(model), "euler", steps=1, cfg=1.0)
    assert found.isfinite().all()


def test_easycache_skips_steps_of_each_window_by_itself(host):
    from comfy_extras.nodes_easycache import EasyCacheNode  # pyright: ignore[reportMissingImports]

    chunk = ChunkConfig(length=4, overlap=2)
    model = host.sampling.patch_chunks(host.model, chunk, "smooth")
    cached = EasyCacheNode.execute(model, 1.0, 0.1, 0.95, False)[0]
    calls = 0
    network = type(host.model.model.diffusion_model)
    velocity = network.velocity

    def counted(self, *args):
        nonlocal calls
        calls += 1
        return velocity(self, *args)

    network.velocity = counted
    try:
        plain = host.ksampler(model, "euler", steps=8, cfg=1.0)
        whole, calls = calls, 0
        found = host.ksampler(cached, "euler", steps=8, cfg=1.0)
    finally:
        network.velocity = velocity
    assert whole == 8 * 4
    assert calls < whole
    assert likeness(found, plain) > 0.95


def test_torch_compile_works_on_chunks(host):
    from comfy_api.torch_helpers import (  # pyright: ignore[reportMissingImports]
        set_torch_compile_wrapper,
    )

    small = small_file(host, context_dim=32)
    model = host.model_file.load_patcher(small)
    model = host.sampling.patch_chunks(model, ChunkConfig(length=5, overlap=1), "smooth")
    compiled = model.clone()
    set_torch_compile_wrapper(compiled, backend="eager", dynamic=False)
    plain, found = (host.ksampler(m, "euler", steps=2, cfg=1.0) for m in (model, compiled))
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-4)
