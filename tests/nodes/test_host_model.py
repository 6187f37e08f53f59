"""STAR as a MODEL of the host: equal to the core's sampling, and open to what the host offers."""

import importlib
from dataclasses import replace
from typing import Any

import pytest
import torch

from star_core.demo import DATA, DEGRADED
from star_core.diffusion.denoiser import Denoiser
from star_core.diffusion.noise import FrameNoise, brownian_noise
from star_core.diffusion.samplers import SAMPLERS
from star_core.diffusion.schedule import sampling_sigmas, star_schedule
from star_core.diffusion.shortcuts import Shortcuts
from star_core.lora import add_lora, merge_lora, write_lora
from star_core.model import BUILT_IN
from star_core.models.slicing import Slicing
from star_core.models.unet import ControlledVideoUNet
from star_core.planning.meta_memory import LiveTensors
from star_core.sampling_defaults import SamplingDefaults
from star_core.star_checkpoint import load_model, open_model
from star_core.vae.load import load_frame_vae
from star_core.video_io import open_video
from star_core.windows.chunking import ChunkConfig, chunked, overlapping_windows
from star_core.windows.geometry import upsample
from star_core.windows.tiling import Tile

pytestmark = pytest.mark.host

SHAPE = (1, 32, 9, 10, 12)
NONE = Shortcuts()


class Host:
    """The pack's modules and a small scene: latents of a clip, the MODEL, its conditioning."""

    def __init__(self, pack) -> None:
        def module(name: str) -> Any:
            return importlib.import_module(f".nodes.{name}", pack.__name__)

        self.model_file, self.sampling = module("host_model"), module("host_sampling")
        self.conditions, self.strength = module("host_conditioning"), 1.0
        checkpoints = importlib.import_module(".star_core.star_checkpoint", pack.__name__)
        self.star = checkpoints.open_model(BUILT_IN["tiny"][0])
        self.model = self.model_file.load_patcher(self.star)
        generator = torch.Generator().manual_seed(4)
        degraded = torch.stack(list(open_video(DATA / DEGRADED, frames=(0, SHAPE[2]))))
        video = upsample(degraded[:, :3, 20:30, 80:92], (48, 40), "bicubic") * 2 - 1
        with torch.inference_mode():
            self.lq = load_frame_vae(BUILT_IN["tiny"][1]).encode(video.transpose(0, 1)[None])
        # the second prompt of the file was hardly trained; noise makes guidance visible
        shift = torch.randn(self.star.prompts.negative.shape, generator=generator)
        self.positive = self.star.prompts.positive.float()
        self.negative = self.positive + shift

    def conditioning(self, prompt):
        """As STAR Conditioning makes it."""
        latent, prompts = {"samples": self.raw}, ([[prompt, {}]], [[prompt, {}]])
        return self.conditions.with_hint(prompts, latent, self.strength)[0]

    @property
    def raw(self):
        """What a VAE of the host gives: not scaled."""
        return self.lq / self.star.latents.scale

    def run(self, model, sampler, sigmas, *, cfg=3.0, noise=None, seed=5, callback=None):
        import comfy.sample  # pyright: ignore[reportMissingImports]

        noise = FrameNoise(seed).initial(SHAPE) if noise is None else noise
        out = comfy.sample.sample_custom(
            model,
            noise,
            cfg,
            sampler,
            sigmas,
            self.conditioning(self.positive),
            self.conditioning(self.negative),
            self.raw,
            callback=callback,
            disable_pbar=True,
            seed=seed,
        )
        return out * self.star.latents.scale

    def ksampler(self, model, name, scheduler="normal", steps=10, cfg=3.0):
        import comfy.sample  # pyright: ignore[reportMissingImports]

        noise = comfy.sample.prepare_noise(self.raw, 3)
        out = comfy.sample.sample(
            model,
            noise,
            steps,
            cfg,
            name,
            scheduler,
            self.conditioning(self.positive),
            self.conditioning(self.negative),
            self.raw,
            disable_pbar=True,
            seed=3,
        )
        return out * self.star.latents.scale


def likeness(found, wanted) -> float:
    """Correlation of the previews of latents; nan, which no comparison accepts, if not finite."""
    rgb = torch.tensor(open_model(BUILT_IN["tiny"][0]).latents.rgb)
    pictures = [(latents.movedim(1, -1) @ rgb).flatten() for latents in (found, wanted)]
    return torch.corrcoef(torch.stack(pictures))[0, 1].item()


@pytest.fixture(scope="module")
def host(pack) -> Host:
    return Host(pack)


def core_result(
    host: Host,
    sampling: SamplingDefaults,
    chunk: ChunkConfig | None,
    merge,
    noise,
    tile: Tile | None = None,
    shortcuts: Shortcuts = NONE,
    strength: float = 1.0,
):
    """What `pipeline` computes, from the core's parts."""
    model = load_model(BUILT_IN["tiny"][0], dtype=torch.float32)
    schedule = star_schedule()
    sigmas = sampling_sigmas(
        schedule,
        solver_mode=sampling.solver_mode,
        steps=sampling.steps,
        noise_level=sampling.noise_level,
        sampler=sampling.sampler,
    )
    denoiser = Denoiser(
        network=model.network,
        schedule=schedule,
        positive=host.positive,
        negative=host.negative,
        hint=host.lq,
        guidance_scale=sampling.cfg,
        guidance_rescale=sampling.cfg_rescale,
        shortcuts=shortcuts,
    )

    def denoise(x_in, sigma, window):
        hint = host.lq[:, :, window.start : window.stop]
        return torch.lerp(hint, denoiser(x_in, sigma, window), strength)

    frames = SHAPE[2]
    windows = overlapping_windows(
        frames, chunk.length if chunk else frames, chunk.overlap if chunk else 0
    )
    draws = {
        "frame": lambda: FrameNoise(5).solver(SHAPE, sigmas),
        "brownian": lambda: brownian_noise(SHAPE, sigmas, 5),
    }[noise]()
    t = torch.tensor([sampling.noise_level - 1])
    start = schedule.add_noise(host.lq, FrameNoise(5).initial(SHAPE), t)
    how = model.network.working(
        slicing=Slicing(), tile=tile, attention_window=shortcuts.attention_window
    )
    with torch.inference_mode(), how:
        return SAMPLERS[sampling.sampler](
            chunked(denoise, windows, merge), start, sigmas, noise=draws
        )


FAST = SamplingDefaults(cfg=3.0)
NORMAL = replace(FAST, solver_mode="normal", steps=4)


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


def test_memory_is_asked_for_by_tile_and_by_where_skips_wait(host):
    asked = []
    base = type(host.model.model)
    required = base.memory_required

    def recorded(self, shape, cond_shapes=None):
        asked[-1].append(required(self, shape, cond_shapes))
        return asked[-1][-1]

    tile = Tile(size=24, overlap=0)
    tiles = [
        host.sampling.patch_tiles(host.model, tile, factor=4, offload=o) for o in (False, True)
    ]
    base.memory_required = recorded
    try:
        for model in (host.model, *tiles):
            asked.append([])
            host.ksampler(model, "euler", steps=1)
    finally:
        base.memory_required = required
    whole, tiled, offloaded = map(max, asked)
    assert offloaded <= tiled < whole
    slicings = (Slicing(), Slicing(offload=True))
    shape, config = (1, 4, 8, 90, 160), host.model_file.UNetConfig()
    held, moved = (
        host.model_file.activations(config, shape, torch.float16, slicing=slicing)
        for slicing in slicings
    )
    assert moved < held


def test_tiles_too_small_for_the_network_are_refused(host):
    with pytest.raises(ValueError, match="use at least 24 pixels"):
        host.sampling.patch_tiles(host.model, Tile(size=20, overlap=0), factor=4)


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


def test_patches_do_not_touch_the_model_they_are_given(host):
    before = (dict(host.model.wrappers), dict(host.model.model_options))
    host.sampling.patch_chunks(host.model, ChunkConfig(length=4, overlap=2), "cut")
    host.sampling.patch_guidance(host.model, 0.2, 0.1, 0.5)
    host.sampling.patch_tiles(host.model, Tile(size=32, overlap=8), factor=4)
    host.sampling.patch_work(host.model, attention_window=5)
    assert (dict(host.model.wrappers), dict(host.model.model_options)) == before


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


def test_a_lora_for_the_network_changes_the_result_and_can_be_taken_off(host):
    import comfy.sd  # pyright: ignore[reportMissingImports]

    key = "diffusion_model.output_blocks.5.0.emb_layers.1"
    weight = host.model.model.diffusion_model.state_dict()[key[16:] + ".weight"]
    generator = torch.Generator().manual_seed(1)
    lora = {
        f"{key}.lora_A.weight": torch.randn(4, weight.shape[1], generator=generator),
        f"{key}.lora_B.weight": 10 * torch.randn(weight.shape[0], 4, generator=generator),
    }
    plain = host.ksampler(host.model, "euler", steps=2, cfg=1.0)
    patched, _ = comfy.sd.load_lora_for_models(host.model, None, lora, 1.0, 1.0)
    assert (host.ksampler(patched, "euler", steps=2, cfg=1.0) - plain).abs().max() > 0.01
    assert torch.equal(host.ksampler(host.model, "euler", steps=2, cfg=1.0), plain)


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


def test_memory_is_asked_for_one_window_not_for_the_clip(host):
    asked = []
    model = host.sampling.patch_chunks(host.model, ChunkConfig(length=4, overlap=2), "smooth")
    base = type(host.model.model)
    required = base.memory_required

    def recorded(self, shape, cond_shapes=None):
        asked.append(shape[2])
        return required(self, shape, cond_shapes)

    base.memory_required = recorded
    try:
        host.ksampler(model, "euler", steps=1)
    finally:
        base.memory_required = required
    assert asked and max(asked) == 4


@pytest.mark.parametrize(("frames", "height", "width"), [(8, 90, 160), (16, 42, 48)])
def test_memory_asked_for_covers_the_full_size_network_and_not_much_more(
    host, frames, height, width
):
    from torch._subclasses.fake_tensor import FakeTensorMode

    config = host.model_file.UNetConfig()
    with FakeTensorMode(), torch.inference_mode():
        network = ControlledVideoUNet(config, dtype=torch.float16).eval()
        network.slicing = Slicing()
        x = torch.empty(1, 4, frames, height, width, dtype=torch.float16)
        t, y = torch.zeros(1), torch.empty(1, 77, 1024, dtype=torch.float16)
        with LiveTensors() as used:
            network(x, t, y, x)
    asked = host.model_file.activations(config, x.shape, torch.float16)
    assert used.peak < asked < 1.25 * used.peak


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


@pytest.mark.parametrize("layers", ["attention", "all"])
def test_a_trained_lora_is_loaded_by_the_host_and_does_what_the_core_does(host, tmp_path, layers):
    import comfy.sd  # pyright: ignore[reportMissingImports]
    import comfy.utils  # pyright: ignore[reportMissingImports]

    network = load_model(BUILT_IN["tiny"][0], dtype=torch.float32).network
    add_lora(network, 2, layers=layers, alpha=4.0)
    for key, parameter in network.named_parameters():
        if "lora_up" in key:
            torch.nn.init.normal_(parameter, std=0.3)
    write_lora(tmp_path / "lora.safetensors", network, dtype=torch.float32)
    lora = comfy.utils.load_torch_file(str(tmp_path / "lora.safetensors"))
    patched, _ = comfy.sd.load_lora_for_models(host.model, None, lora, 1.0, 1.0)
    assert len(patched.patches) == len(lora) // 3
    merge_lora(network)
    merged = network.state_dict()
    convolutions = [key for key in patched.patches if "conv" in key or "in_layers" in key]
    assert bool(convolutions) == (layers == "all")
    for key in [*list(patched.patches)[:5], *convolutions[:5]]:
        patched.patch_weight_to_device(key)
        weight = patched.model.state_dict()[key]
        torch.testing.assert_close(
            weight.float(), merged[key.removeprefix("diffusion_model.")], rtol=2e-3, atol=2e-3
        )
    patched.unpatch_model()


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
