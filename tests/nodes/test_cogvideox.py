"""The second backbone in the host: MODEL, VAE, text, sampled by the host's samplers."""

import importlib
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch

from star_core.backbones import build_network
from star_core.cli import main
from star_core.diffusion.denoiser import Denoiser
from star_core.diffusion.levels import levels_of, trained_schedule
from star_core.diffusion.noise import FrameNoise
from star_core.diffusion.samplers import SAMPLERS
from star_core.sampling_defaults import COGVIDEOX_LATENTS
from star_core.star_checkpoint import LearnedPrompts, load_model, save_model
from star_core.text.t5 import load_t5
from star_core.video_io import open_sink, open_video
from tests.cogvideox_files import SAMPLING, WORDS, write_model, write_t5, write_vae

pytestmark = pytest.mark.host


class Host:
    """The pack's modules, the files, and a clip of 6 frames as LATENT and CONDITIONING."""

    def __init__(self, pack, folder) -> None:
        def module(name: str) -> Any:
            return importlib.import_module(name, pack.__name__)

        self.folder = folder
        self.model_file = module(".nodes.host_model")
        self.sampling = module(".nodes.host_sampling")
        self.vae_module = module(".nodes.host_vae")
        self.conditioning = module(".nodes.host_conditioning")
        self.open_model = module(".star_core.star_checkpoint").open_model
        self.path = write_model(folder)
        self.model = self.model_file.load_patcher(self.open_model(self.path))
        load_vae = module(".star_core.vae.load").load_vae
        self.vae = self.vae_module.host_vae(load_vae(write_vae(folder)))
        generator = torch.Generator().manual_seed(1)
        self.images = torch.rand(6, 12, 20, 3, generator=generator)
        self.positive = torch.randn(1, 7, 16, generator=generator)
        self.latent = self.conditioning.low_quality_latent(
            self.model, self.vae, self.images, (60, 36)
        )
        self.prompts = self.conditioning.with_hint(
            self.conditioning.Prompts([[self.positive, {}]], [[0 * self.positive, {}]]),
            self.latent,
        )

    def run(self, sampler, sigmas, *, model=None, cfg=6.0):
        import comfy.sample  # pyright: ignore[reportMissingImports]

        raw = self.latent["samples"]
        return comfy.sample.sample_custom(
            model or self.model,
            FrameNoise(5).initial(tuple(raw.shape)),
            cfg,
            sampler,
            sigmas,
            *self.prompts,
            raw,
            disable_pbar=True,
            seed=5,
        )


@pytest.fixture(scope="module")
def host(pack, tmp_path_factory) -> Host:
    return Host(pack, tmp_path_factory.mktemp("cogvideox"))


def test_a_clip_becomes_latents_of_whole_windows_and_remembers_its_length(host):
    assert host.latent["samples"].shape == (1, 4, 3, 6, 8)  # 6 frames, filled up to 9
    assert host.latent["star_frames"] == 6
    images = host.vae_module.decode_video(
        host.vae, host.latent["samples"], padding=host.latent["star_padding"], frames=6
    )
    assert images.shape == (6, 36, 60, 3)


def test_the_hosts_vae_nodes_encode_and_decode(host):
    latents = host.vae.encode(torch.rand(9, 32, 48, 3))
    assert latents.shape == (1, 4, 3, 4, 6)
    assert host.vae.decode(latents).shape == (1, 9, 32, 48, 3)
    assert host.vae.temporal_compression_decode() == 4


def test_the_hosts_sampling_is_the_cores(host):
    sigmas = host.sampling.finite_sigmas(SAMPLING)
    out = host.run(host.sampling.star_sampler("dpmpp_2m_sde_renewed", "frame"), sigmas, cfg=4.0)
    star = load_model(host.path, dtype=torch.float32)
    hint = host.latent["samples"] * star.latents.scale
    denoiser = Denoiser(
        network=star.network, schedule=trained_schedule(SAMPLING), positive=host.positive,
        negative=0 * host.positive, hint=hint, guidance_scale=4.0, guidance_rescale=None,
    )  # fmt: skip
    noise = FrameNoise(5)
    with torch.inference_mode():
        expected = SAMPLERS["dpmpp_2m_sde_renewed"](
            denoiser,
            noise.initial(tuple(hint.shape)),
            levels_of(SAMPLING).sigmas,
            noise=noise.solver(tuple(hint.shape), sigmas),
        )
    torch.testing.assert_close(out * star.latents.scale, expected, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("name", ["euler", "dpmpp_2m_sde", "dpmpp_2m"])
def test_the_hosts_samplers_and_schedulers_run(host, name):
    import comfy.samplers  # pyright: ignore[reportMissingImports]

    sigmas = comfy.samplers.calculate_sigmas(
        host.model.get_model_object("model_sampling"), "normal", 4
    )
    out = host.run(comfy.samplers.ksampler(name), sigmas)
    assert out.isfinite().all() and out.std() > 0


def test_guidance_swings_with_star_guidance(host):
    sigmas = host.sampling.finite_sigmas(SAMPLING)
    sampler = host.sampling.star_sampler("dpmpp_2m_sde", "frame")
    plain = host.run(sampler, sigmas)
    swinging = host.run(sampler, sigmas, model=host.sampling.patch_guidance(host.model, 0.0))
    assert not torch.allclose(plain, swinging)


@pytest.mark.parametrize("weight_type", ["fp8_e4m3fn", "bf16"])
def test_narrow_weights_run_near_the_full_ones(host, weight_type):
    model = host.model_file.load_patcher(host.open_model(host.path), weight_type)
    sigmas = host.sampling.finite_sigmas(SAMPLING)
    sampler = host.sampling.star_sampler("dpmpp_2m_sde", "frame")
    full, narrow = host.run(sampler, sigmas), host.run(sampler, sigmas, model=model)
    assert not torch.equal(full, narrow)
    assert (full - narrow).norm() < 0.3 * full.norm()


def test_memory_grows_with_the_frames_and_little_beyond_a_tile(host):
    def needed(f, h, w):
        config = host.model.model.star.config
        return host.model_file.activations(config, (2, 4, f, h, w), torch.float32)

    assert needed(7, 6, 8) > needed(3, 6, 8)
    assert needed(3, 12, 16) < 3 * needed(3, 6, 8)  # of 4 times the area


class Clip:
    """A CLIP of the host made of its T5, with a small network in the place of the published."""

    def __init__(self, folder) -> None:
        from comfy.sd1_clip import SDClipModel  # pyright: ignore[reportMissingImports]
        from comfy.text_encoders.t5 import T5  # pyright: ignore[reportMissingImports]

        config = {
            "d_ff": 24, "d_kv": 8, "d_model": 16, "num_heads": 2, "num_layers": 2,
            "vocab_size": len(WORDS), "is_gated_act": True, "model_type": "t5",
            "dense_act_fn": "gelu_pytorch_tanh", "relative_attention_num_buckets": 32,
        }  # fmt: skip
        self.encoder = load_t5(write_t5(folder), length=7, dtype=torch.float32)
        t5 = SDClipModel(
            device="cpu", layer="last", textmodel_json_config=config, dtype=torch.float32,
            special_tokens={"end": 1, "pad": 0}, model_class=T5,
        )  # fmt: skip
        found = t5.load_sd(dict(self.encoder.model.state_dict()))
        assert not found.missing_keys
        self.cond_stage_model = torch.nn.Module()
        self.cond_stage_model.t5xxl = t5

    def tokenize(self, text, **options):
        ids = self.encoder.tokenizer.encode(text, add_special_tokens=False).ids
        return {"t5xxl": [[(i, 1.0) for i in [*ids, 1]]]}

    def encode_from_tokens(self, tokens):
        t5: Any = self.cond_stage_model.t5xxl
        return t5.encode_token_weights(tokens["t5xxl"])[0]


@pytest.mark.parametrize("prompt", ["", "a good bike", "a " * 20])
def test_the_hosts_t5_gives_the_embeddings_of_the_core(host, tmp_path, prompt):
    clip = Clip(tmp_path)
    ((embedding, _),) = host.conditioning.t5_conditioning(clip, prompt, 7)
    torch.testing.assert_close(embedding, clip.encoder.encode(prompt), atol=1e-5, rtol=1e-4)


def test_texts_of_the_published_models_mean_this_models_own(host, tmp_path):
    from star_core.text.prompts import STAR_PROMPTS

    clip, star = Clip(tmp_path), host.model.model.star
    usual = host.conditioning.prompts_for(
        star, clip, STAR_PROMPTS.prompt, STAR_PROMPTS.positive, STAR_PROMPTS.negative
    )
    torch.testing.assert_close(usual.positive[0][0], clip.encoder.encode(""), atol=1e-5, rtol=1e-4)
    assert not usual.negative[0][0].any()


def test_a_t5_that_masks_is_refused(host, tmp_path):
    clip = Clip(tmp_path)
    t5: Any = clip.cond_stage_model.t5xxl
    t5.enable_attention_masks = True
    with pytest.raises(ValueError, match="type cogvideox, in older ComfyUI pixart"):
        host.conditioning.t5_conditioning(clip, "a", 7)


def with_prompts(host, folder) -> Path:
    """A file of the same size with prompts of its own."""
    path, config = folder / "x.safetensors", load_model(host.path).config
    prompts = LearnedPrompts(torch.ones(1, 7, 16), torch.zeros(1, 7, 16))
    torch.manual_seed(0)
    save_model(
        path, build_network(config), sampling=SAMPLING, latents=COGVIDEOX_LATENTS, prompts=prompts
    )
    return path


def test_star_plan_says_what_a_run_takes_and_sets_what_fits(host, pack):
    plan = importlib.import_module(".nodes.plan", pack.__name__)
    latent = {"samples": torch.zeros(1, 4, 13, 6, 8)}
    text = plan.StarPlan.execute(host.model, host.vae, latent, 1000.0).args[1]
    assert "49 frames of 64x48" in text and "6 windows of up to 9 frames" in text
    assert "Fits into 1000.00 GiB" in text and "in 24 passes" in text
    model, text = plan.StarPlan.execute(host.model, host.vae, latent, 1e-6).args
    how = model.model_options["transformer_options"][host.model_file.WORK_OPTIONS]
    assert how["slicing"].offload and "windows of up to 1 frames" in text


def test_a_video_is_restored_from_file_to_file_as_by_the_command_line(
    host, pack, tmp_path, monkeypatch
):
    import folder_paths  # pyright: ignore[reportMissingImports]
    from comfy_api.input_impl import VideoFromFile  # pyright: ignore[reportMissingImports]

    for kind in ("output", "temp"):
        monkeypatch.setattr(folder_paths, f"{kind}_directory", str(tmp_path / kind))
    path = with_prompts(host, tmp_path)
    with open_sink(tmp_path / "clip.mkv", width=20, height=12, fps=Fraction(10)) as sink:
        for frame in torch.rand(11, 3, 12, 20, generator=torch.Generator().manual_seed(0)):
            sink.write(frame)
    node = importlib.import_module(".nodes.restore", pack.__name__).StarRestoreVideo
    inputs = {
        "scale": 2.0, "width": 0, "height": 0, "seed": 5, "steps": 2, "cfg": 6.0,
        "noise_level": -1, "strength": 1.0, "chunk_frames": 9, "chunk_overlap": 5, "tile_size": 0,
        "tile_overlap": 64, "color_fix": "auto", "shots": "off", "prompt": "",
        "preset": "faithful",
        "format": "mkv (lossless)", "filename_prefix": "video/STAR", "folder": "output",
    }  # fmt: skip
    model = host.model_file.load_patcher(host.open_model(path))
    with torch.inference_mode():
        video = node.execute(
            model=model, vae=host.vae, video=VideoFromFile(str(tmp_path / "clip.mkv")), **inputs
        ).args[0]
    out = tmp_path / "expected.mkv"
    command = ["upscale", tmp_path / "clip.mkv", out, "--model", path, "--scale", 2, "--seed", 5]
    command += ["--vae", host.folder / "cogvideox_vae.safetensors", "--chunk-frames", 9]
    command += ["--chunk-overlap", 5, "--shots", "off", "--dtype", "float32"]
    assert main([str(word) for word in command]) == 0
    restored, expected = (
        torch.stack(list(open_video(file))) for file in (Path(video.get_stream_source()), out)
    )
    assert restored.shape == expected.shape == (11, 3, 24, 40)
    assert (restored - expected).abs().mean() < 2 / 255


@pytest.mark.parametrize("backbone", ["tiny", "cogvideox"])
def test_the_same_nodes_with_the_same_values_restore_with_either_backbone(
    host, pack, tmp_path, backbone
):
    from star_core.model import BUILT_IN

    def module(name: str) -> Any:
        return importlib.import_module(name, pack.__name__)

    path, vae_path = BUILT_IN["tiny"]
    if backbone == "cogvideox":
        path, vae_path = with_prompts(host, tmp_path), host.folder / "cogvideox_vae.safetensors"
    model = host.model_file.load_patcher(host.open_model(path))
    vae = host.vae_module.host_vae(module(".star_core.vae.load").load_vae(vae_path))
    conditioning, denoise = module(".nodes.conditioning"), module(".nodes.denoise")
    decode = module(".nodes.decode")
    positive, negative = conditioning.StarTextEncode.execute(model, "", "", "", "faithful").args
    positive, negative, latent = conditioning.StarConditioning.execute(
        positive, negative, model, vae, host.images, 2.0, 0, 0, 1.0, "auto", 0, 64
    ).args
    (model,) = denoise.StarGuidance.execute(model, -1.0, 0.0, 1.0).args
    (model,) = denoise.StarTemporalChunks.execute(model, 25, 5, "smooth").args
    settings = ("auto", -1, -1, "frame", True)
    noise, sampler, sigmas = denoise.StarSampling.execute(model, 1, *settings).args
    import comfy.sample  # pyright: ignore[reportMissingImports]

    raw = latent["samples"]
    out = comfy.sample.sample_custom(
        model, noise.generate_noise(latent), 3.0, sampler, sigmas, positive, negative,
        raw, disable_pbar=True, seed=1,
    )  # fmt: skip
    (images,) = decode.StarVAEDecode.execute({**latent, "samples": out}, vae, 0, 64, -1, 1).args
    assert images.shape == (6, 24, 40, 3) and images.isfinite().all()
