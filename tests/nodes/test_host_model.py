"""STAR as a MODEL of the host: equal to the core's sampling, and open to what the host offers."""

from dataclasses import replace

import pytest
import torch

from star_core.diffusion.shortcuts import Shortcuts
from star_core.lora import add_lora, write_lora
from star_core.model import BUILT_IN
from star_core.star_checkpoint import load_model
from star_core.vae.load import load_frame_vae
from star_core.windows.chunking import ChunkConfig
from star_core.windows.tiling import Tile
from tests.nodes.small_host import FAST, NONE, NORMAL, SHAPE, core_result, likeness

pytestmark = pytest.mark.host


@pytest.mark.parametrize(
    ("sampling", "chunk", "merge", "noise"),
    [
        (FAST, None, "cut", "brownian"),
        (replace(FAST, noise_level=1000), ChunkConfig(length=4, overlap=2), "cut", "frame"),
        (NORMAL, ChunkConfig(length=4, overlap=2), "smooth", "frame"),
        (replace(NORMAL, cfg_rescale=0.0), ChunkConfig(length=5, overlap=1), "cut", "brownian"),
        (replace(NORMAL, noise_level=1000, cfg_rescale=0.0), None, "cut", "frame"),
        (replace(NORMAL, sampler="heun", noise_level=600), None, "smooth", "frame"),
        (replace(NORMAL, cfg=1.0, steps=1), ChunkConfig(length=4, overlap=2), "smooth", "frame"),
    ],
)
def test_the_hosts_sampling_equals_the_cores(host, sampling, chunk, merge, noise):
    model = host.sampling.patch_guidance(host.model, sampling.cfg_rescale)
    if chunk is not None:
        model = host.sampling.patch_chunks(model, chunk, merge)
    sampler = host.sampling.star_sampler(sampling.sampler, noise)
    sigmas = host.sampling.finite_sigmas(sampling)
    found = host.run(model, sampler, sigmas, cfg=sampling.cfg)
    wanted = core_result(host, sampling, chunk, merge, noise)
    # float32, and noise levels that the host carries as x / sigma instead of unit variance
    assert (found - wanted).abs().max() < 2e-4 * wanted.abs().max()


TILE = Tile(size=8, overlap=2)  # in latents


@pytest.mark.parametrize(
    ("tile", "shortcuts"),
    [
        (TILE, NONE),
        (None, Shortcuts(guidance=(300, 700))),
        (None, Shortcuts(attention_window=5)),
        (TILE, Shortcuts(guidance=(300, 700), attention_window=5, reuse=250)),
    ],
)
def test_tiles_and_shortcuts_of_the_host_equal_the_cores(host, tile, shortcuts):
    chunk = ChunkConfig(length=5, overlap=1)
    interval = (1 - bound / 1000 for bound in reversed(shortcuts.guidance))
    model = host.sampling.patch_guidance(host.model, NORMAL.cfg_rescale, *interval)
    model = host.sampling.patch_chunks(model, chunk, "smooth")
    if tile:
        pixels = Tile(size=4 * tile.size, overlap=4 * tile.overlap)
        model = host.sampling.patch_tiles(model, pixels, factor=4, offload=True)
    model = host.sampling.patch_work(
        model, attention_window=shortcuts.attention_window, reuse=shortcuts.reuse
    )
    sampler = host.sampling.star_sampler(NORMAL.sampler, "frame")
    found = host.run(model, sampler, host.sampling.finite_sigmas(NORMAL))
    wanted, plain = (
        core_result(host, NORMAL, chunk, "smooth", "frame", *how)
        for how in ((tile, shortcuts), (None, NONE))
    )
    wrong = (found - wanted).abs().max()
    assert wrong < 2e-4 * wanted.abs().max()
    # How much they change depends on the weights.
    assert wrong < 0.1 * (plain - wanted).abs().max()


def test_a_model_without_the_patch_works_as_before_beside_one_with_it(host):
    before = host.ksampler(host.model, "euler", steps=2)
    model = host.sampling.patch_tiles(host.model, Tile(size=32, overlap=8), factor=4)
    model = host.sampling.patch_work(model, attention_window=5, reuse=500)
    assert not torch.equal(host.ksampler(model, "euler", steps=2), before)
    assert torch.equal(host.ksampler(host.model, "euler", steps=2), before)
    network = host.model.model.diffusion_model
    assert (network.tile, network.attention_window, host.model.model.work_options) == (
        None,
        None,
        {},
    )


def test_a_run_starts_with_no_features_of_another(host):
    model = host.sampling.patch_work(host.model, reuse=1000)
    first, second = (host.ksampler(model, "euler", steps=2) for _ in range(2))
    assert torch.equal(first, second)


def test_tiles_too_small_for_the_network_are_refused(host):
    with pytest.raises(ValueError, match="use at least 24 pixels"):
        host.sampling.patch_tiles(host.model, Tile(size=20, overlap=0), factor=4)


def test_patches_do_not_touch_the_model_they_are_given(host):
    before = (dict(host.model.wrappers), dict(host.model.model_options))
    host.sampling.patch_chunks(host.model, ChunkConfig(length=4, overlap=2), "cut")
    host.sampling.patch_guidance(host.model, 0.2, 0.1, 0.5)
    host.sampling.patch_tiles(host.model, Tile(size=32, overlap=8), factor=4)
    host.sampling.patch_work(host.model, attention_window=5)
    assert (dict(host.model.wrappers), dict(host.model.model_options)) == before


def test_an_attention_override_is_asked_in_every_attention(host, monkeypatch):
    seen = []

    def override(attention, *args, **kwargs):
        seen.append(args[3])
        return attention(*args, **kwargs)

    model = host.model.clone()
    model.model_options["transformer_options"]["optimized_attention_override"] = override
    monkeypatch.setattr(host.model.model.diffusion_model, "slicing", None)
    plain = host.ksampler(host.model, "euler", steps=1, cfg=1.0)
    assert torch.equal(host.ksampler(model, "euler", steps=1, cfg=1.0), plain)
    transformers = sum(
        type(module).__name__ == "BasicTransformerBlock"
        for module in host.model.model.diffusion_model.modules()
    )
    assert len(seen) == 2 * transformers


@pytest.mark.parametrize("weight_type", ["fp16", "bf16", "fp8_e4m3fn"])
def test_low_precision_weights_are_cast_as_they_are_used(host, weight_type):
    model = host.model_file.load_patcher(host.star, weight_type)
    dtype = host.model_file.WEIGHT_TYPES[weight_type]
    assert {p.dtype for p in model.model.diffusion_model.parameters()} == {dtype}
    exact, found = (host.ksampler(m, "euler", steps=1, cfg=1.0) for m in (host.model, model))
    assert likeness(found, exact) > 0.98


def test_sampling_without_the_low_quality_video_says_what_to_connect(host):
    import comfy.sample  # pyright: ignore[reportMissingImports]

    bare = [[host.positive, {}]]
    noise = torch.zeros(SHAPE)
    with pytest.raises(ValueError, match="STAR Conditioning"):
        comfy.sample.sample(host.model, noise, 1, 1.0, "euler", "normal", bare, bare, noise)


def test_latents_of_another_shape_are_refused(host):
    import comfy.sample  # pyright: ignore[reportMissingImports]

    conditioning = host.conditioning(host.positive)
    pictures = host.raw[0].transpose(0, 1)  # (f c h w), as an image VAE gives them
    with pytest.raises(ValueError, match="same STAR Conditioning"):
        comfy.sample.sample(
            host.model, pictures, 1, 1.0, "euler", "normal", conditioning, conditioning, pictures
        )


def test_latent_previews_show_the_picture_in_colour(host):
    from latent_preview import Latent2RGBPreviewer  # pyright: ignore[reportMissingImports]

    format = host.model.model.latent_format
    vae = load_frame_vae(BUILT_IN["tiny"][1])
    picture = torch.zeros(1, 3, 32, 48)
    picture[:, 0, :, :24], picture[:, 2, :, 24:] = 0.6, 0.6  # reddish left, bluish right
    with torch.inference_mode():
        latents = vae.encode_frame(picture)[:, :, None]
    previewer = Latent2RGBPreviewer(format.latent_rgb_factors)
    shown = torch.tensor(list(previewer.decode_latent_to_preview(latents).getdata())).float()
    left, right = (part.mean((0, 1)) for part in shown.reshape(8, 12, 3).split(6, dim=1))
    assert left[0] > left[2] + 20 and right[2] > right[0] + 20


def test_the_settings_of_a_lora_reach_the_nodes_through_the_hosts_own_loader(host, tmp_path):
    import comfy.sd  # pyright: ignore[reportMissingImports]
    import comfy.utils  # pyright: ignore[reportMissingImports]

    sampling = host.sampling
    network = load_model(BUILT_IN["tiny"][0], dtype=torch.float32).network
    add_lora(network, 2)
    own = sampling.sampling_of(host.model)

    def loaded(model, strength, **settings):
        path = tmp_path / "lora.safetensors"
        write_lora(path, network, sampling=settings, overwrite=True)
        lora = comfy.utils.load_torch_file(str(path))
        return comfy.sd.load_lora_for_models(model, None, lora, strength, 0.0)[0]

    few = loaded(host.model, 0.8, steps=2, sampler="lcm", cfg=1.0)
    assert sampling.sampling_of(few) == replace(own, steps=2, sampler="lcm", cfg=1.0)
    assert sampling.sampling_of(few, steps=3).steps == 3
    four = loaded(few, 1.0, steps=4)
    assert sampling.sampling_of(four) == replace(own, steps=4, sampler="lcm", cfg=1.0)
    assert sampling.sampling_of(loaded(host.model, 0.0, steps=2)) == own
    assert sampling.sampling_of(loaded(host.model, 1.0)) == own
    assert sampling.sampling_of(host.model) == own


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("sampler", ["euler", "lcm"])
def test_few_steps_begin_at_the_same_levels_with_the_hosts_scheduler_and_sampler(
    host, sampler, steps
):
    import comfy.samplers  # pyright: ignore[reportMissingImports]

    few = host.sampling.sampling_of(host.model, steps=steps, sampler=sampler)
    levels = host.sampling.finite_sigmas(few)
    simple = comfy.samplers.calculate_sigmas(
        host.model.get_model_object("model_sampling"), "simple", steps
    )
    torch.testing.assert_close(simple, levels, rtol=1e-3, atol=0)
    ours = host.run(host.model, host.sampling.star_sampler(sampler, "frame"), levels, cfg=1.0)
    theirs = host.ksampler(host.model, sampler, "simple", steps=steps, cfg=1.0)
    assert likeness(theirs, ours) > 0.98
