"""Loaders, prompts, sizes and the comparison, in the host."""

import importlib
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from star_core.backbones import build_network
from star_core.checkpoints.tensors import write_tensors
from star_core.model import BUILT_IN
from star_core.models.unet import UNetConfig
from star_core.sampling_defaults import (
    COGVIDEOX_LATENTS,
    COGVIDEOX_SAMPLING,
    SD_LATENTS,
    SamplingDefaults,
)
from star_core.star_checkpoint import LearnedPrompts, open_model, save_model
from star_core.text.prompts import join_prompt
from star_core.vae.load import load_frame_vae
from star_core.vae.small_decoder import SmallDecoderConfig, save_decoder, use_decoder
from star_core.vae.svd import SVDGeometry

pytestmark = pytest.mark.host


@pytest.fixture(scope="module")
def nodes(pack) -> Any:
    names = (
        "conditioning",
        "host_conditioning",
        "host_files",
        "host_parts",
        "host_restore",
        "host_sampling",
        "loaders",
        "restore",
    )
    modules = {n: importlib.import_module(f".nodes.{n}", pack.__name__) for n in names}
    return SimpleNamespace(**modules)


@pytest.fixture(scope="module")
def model(nodes):
    return load(nodes, nodes.host_files.BUILT_IN_NAME)[0]


@pytest.fixture(scope="module")
def vae(nodes):
    return load(nodes, nodes.host_files.BUILT_IN_NAME)[2]


def load(nodes, name, *, vae_name="auto", text_encoder="auto", decoder="none"):
    """MODEL, CLIP and VAE of STAR Load Model."""
    choices = "auto", vae_name, text_encoder, decoder
    return nodes.loaders.StarLoadModel.execute(name, *choices).args


class Clip:
    """Stands for the host's CLIP: an embedding tells which text it is of."""

    def __init__(self, width: int = 1024):
        self.width, self.texts = width, []

    def tokenize(self, text, *, disable_weights):
        assert disable_weights  # or parentheses would weigh words
        self.texts.append(text)
        return {"h": [["first block"], ["second block"]]}

    def encode_from_tokens_scheduled(self, tokens):
        assert tokens == {"h": [["first block"]]}  # STAR reads 77 tokens
        return [[torch.full((1, 77, self.width), float(len(self.texts))), {}]]


def full_size(**changes):
    star = open_model(BUILT_IN["tiny"][0])
    config = UNetConfig(context_dim=1024)
    return SimpleNamespace(prompts=None, config=config, sampling=star.sampling, **changes)


def images(frames=3, height=20, width=30, channels=3):
    return torch.rand(frames, height, width, channels, generator=torch.Generator().manual_seed(1))


def restore(nodes, model, vae, frames, **changes):
    """IMAGE of STAR Restore."""
    settings = {
        **{"scale": 2.0, "width": 0, "height": 0, "stills": False, "prompt": "", "seed": 1},
        **{"preset": "faithful", "strength": 1.0, "steps": -1, "cfg": -1.0, "noise_level": -1},
        **{"color_fix": "auto", "chunk_frames": -1, "chunk_overlap": 16},
        **{"tile_size": 0, "tile_overlap": 64},
    }
    return nodes.restore.StarRestore.execute(model, vae, frames, **settings | changes).args[0]


def test_what_is_left_open_is_as_the_model_file_says(nodes, model):
    own, sampling_of = model.model.star.sampling, nodes.host_sampling.sampling_of
    star = SimpleNamespace(sampling=SamplingDefaults())
    fast = SimpleNamespace(model=SimpleNamespace(star=star), patches={})
    left_open = {"steps": -1, "noise_level": -1, "cfg": -1.0, "sampler": "auto"}
    assert sampling_of(model, **left_open) == own
    assert sampling_of(fast, **left_open).solver_mode == "fast"
    reported = {"steps": 30, "noise_level": 0, "cfg": 2.0, "sampler": "heun"}
    assert sampling_of(fast, **reported) == SamplingDefaults(solver_mode="normal", **reported)


@pytest.mark.parametrize(
    ("sampling", "latents", "asked", "expected"),
    [
        (SamplingDefaults(), SD_LATENTS, (-1, -1), (32, 6)),
        (SamplingDefaults(), SD_LATENTS, (16, -1), (16, 3)),
        (COGVIDEOX_SAMPLING, COGVIDEOX_LATENTS, (-1, -1), (25, 5)),
        (COGVIDEOX_SAMPLING, COGVIDEOX_LATENTS, (32, 6), (29, 5)),
    ],
)
def test_windows_suit_the_latents_of_the_model(nodes, sampling, latents, asked, expected):
    star = SimpleNamespace(sampling=sampling, latents=latents)
    chunk = nodes.host_sampling.chunk_of(star, *asked)
    assert (chunk.length, chunk.overlap) == expected


def test_an_unknown_upsampling_is_refused(nodes, model, vae):
    with pytest.raises(ValueError, match="unknown upsampling 'nearest': use bilinear or bicubic"):
        nodes.host_conditioning.low_quality_latent(
            model, vae, images(), (60, 40), upsampling="nearest"
        )


def test_learned_prompts_stand_in_for_text(nodes, model):
    positive, negative = nodes.conditioning.StarTextEncode.execute(
        model, "x", "y", "z", "faithful"
    ).args
    learned = open_model(BUILT_IN["tiny"][0]).prompts
    assert learned is not None
    assert torch.equal(positive[0][0], learned.positive.float())
    assert torch.equal(negative[0][0], learned.negative.float())


def test_a_preset_is_a_learned_prompt_and_text_models_have_none(nodes):
    prompts_for = nodes.host_conditioning.prompts_for
    learned = LearnedPrompts(*torch.randn(3, 1, 4, 8, generator=torch.Generator().manual_seed(1)))
    given = [
        prompts_for(SimpleNamespace(prompts=learned), None, "", "", "", preset)[0][0][0]
        for preset in ("faithful", "sharp")
    ]
    torch.testing.assert_close(given, [learned.positive, learned.sharp], rtol=0, atol=0)
    plain = SimpleNamespace(prompts=learned._replace(sharp=None))
    with pytest.raises(ValueError, match="no preset 'sharp': choose faithful"):
        prompts_for(plain, None, "", "", "", "sharp")
    with pytest.raises(ValueError, match="no preset 'sharp'"):
        prompts_for(full_size(), Clip(), "", "", "", "sharp")


def test_text_is_joined_as_on_the_command_line_and_read_without_weights(nodes):
    clip = Clip()
    prompts = nodes.host_conditioning.prompts_for(full_size(), clip, "a (cat:1.3)", "sharp", "bad")
    assert clip.texts == [join_prompt("a (cat:1.3)", "sharp", ", "), "bad"]
    assert prompts.positive[0][0].shape == prompts.negative[0][0].shape == (1, 77, 1024)


@pytest.mark.parametrize(
    ("clip", "words"), [(None, "CLIP from STAR Load Model"), (Clip(768), "width 768.*1024")]
)
def test_a_missing_or_wrong_text_encoder_is_named(nodes, clip, words):
    with pytest.raises(ValueError, match=words):
        nodes.host_conditioning.prompts_for(full_size(), clip, "", "", "")


@pytest.mark.parametrize(
    ("given", "size"),
    [((4.0, 0, 0), (120, 80)), ((1.5, 0, 0), (45, 30)), ((4.0, 90, 0), (90, 60))]
    + [((4.0, 0, 90), (135, 90)), ((4.0, 100, 50), (100, 50))],
)
def test_the_size_is_that_of_the_sides_given_or_of_the_scale(nodes, given, size):
    assert nodes.host_conditioning.target_size(images(), *given) == size


def test_a_smaller_size_than_the_inputs_is_refused(nodes):
    with pytest.raises(ValueError, match="at least 30x20"):
        nodes.host_conditioning.target_size(images(), 4.0, 10, 10)


def test_the_vae_of_another_model_is_refused_by_name(nodes, model):
    from comfy.sd import VAE  # pyright: ignore[reportMissingImports]

    other = VAE(sd={"pixel_space_vae": torch.ones(())})
    with pytest.raises(ValueError, match="VAE of STAR Load Model"):
        nodes.host_conditioning.low_quality_latent(model, other, images(), (60, 40))


def test_shrinking_first_keeps_the_size_and_loses_fine_detail(nodes, model, vae):
    plain, shrunk = (
        nodes.host_conditioning.low_quality_latent(model, vae, images(), (60, 40), shrink=factor)
        for factor in (1.0, 2.0)
    )
    assert plain["samples"].shape == shrunk["samples"].shape
    assert plain["star_size"] == shrunk["star_size"] == (60, 40)
    assert shrunk["samples"].std() < 0.9 * plain["samples"].std()


def test_restoring_keeps_alpha_size_and_number_of_frames(nodes, model, vae):
    given = images(2, 17, 22, 4)
    before = given.clone()
    restored = restore(nodes, model, vae, given, scale=2.5)
    assert restored.shape == (2, 43, 55, 4)  # floor(x * scale + 0.5)
    alpha = torch.nn.functional.interpolate(
        given[..., 3:].movedim(-1, 1), size=(43, 55), mode="bicubic"
    ).clamp(0, 1)
    torch.testing.assert_close(restored[..., 3], alpha[:, 0])
    assert torch.equal(given, before)


def test_stills_are_restored_each_by_itself(nodes, model, vae):
    pictures = images(2)
    together, apart = (restore(nodes, model, vae, pictures, stills=on) for on in (False, True))
    assert torch.equal(apart[1:], restore(nodes, model, vae, pictures[1:], stills=True))
    assert not torch.equal(apart, together)


def test_strength_zero_is_the_bicubic_input(nodes, model, vae):
    restored = restore(nodes, model, vae, images(), strength=0.0)
    bicubic = torch.nn.functional.interpolate(
        images().movedim(-1, 1), scale_factor=2, mode="bicubic"
    ).clamp(0, 1)
    torch.testing.assert_close(restored.movedim(-1, 1), bicubic)


def test_the_comparison_shows_before_on_the_left(nodes):
    before, after = torch.zeros(3, 10, 16, 3), torch.full((3, 20, 32, 3), 0.5)
    picture, frames = nodes.host_restore.compared(before, after)
    assert picture.shape == (1, 20, 32, 3) and frames.shape == (3, 20, 64, 3)
    assert not picture[0, :, :14].any() and (picture[0, :, 18:] == 0.5).all()
    assert not frames[..., :32, :].any() and (frames[..., 32:, :] == 0.5).all()
    with pytest.raises(ValueError, match="3 frames before and 2 after"):
        nodes.host_restore.compared(before, after[:2])


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Model folders of the host that are empty; `put` lays a file there."""
    import folder_paths  # pyright: ignore[reportMissingImports]

    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path))
    kinds = ("star", "diffusion_models", "checkpoints", "vae", "vae_approx", "text_encoders")
    for name in kinds:
        (tmp_path / name).mkdir()
        known = ([str(tmp_path / name)], {".pt", ".safetensors"})
        monkeypatch.setitem(folder_paths.folder_names_and_paths, name, known)

    def put(place, source=None):
        target = tmp_path / place
        target.parent.mkdir(exist_ok=True)
        target.touch() if source is None else shutil.copy(source, target)
        folder_paths.filename_list_cache.clear()
        return target

    folder_paths.filename_list_cache.clear()
    yield put
    folder_paths.filename_list_cache.clear()


def test_a_published_file_is_offered_whether_it_is_there_or_not(nodes, folders):
    """Hosts since 0.8 refuse a saved workflow whose choice has gone from the list."""
    files, published = nodes.host_files, ["light_deg (download)", "heavy_deg (download)"]
    assert files.choices(files.MODEL_FOLDERS)[:2] == published
    path = folders("star/light_deg.pt")
    assert files.choices(files.MODEL_FOLDERS, "auto")[:4] == ["auto", "light_deg.pt", *published]
    assert files.model_file("light_deg.pt") == path


def test_a_small_decoder_takes_the_place_of_the_vae_s_own(nodes, folders):
    files, name = nodes.host_files, nodes.host_files.BUILT_IN_NAME
    for file, factor in (("small.safetensors", 4), ("other.safetensors", 8)):
        config = SmallDecoderConfig(latent_channels=32, factor=factor, width=8, blocks=1)
        save_decoder(folders(f"vae_approx/{file}"), config.build(), overwrite=True)
    path = folders("vae_approx/taesd_encoder.pt").with_name("small.safetensors")
    offered = ["none", "other.safetensors", "small.safetensors", "taesd_encoder.pt"]
    assert files.choices(files.DECODER_FOLDERS, "none") == offered
    own, small = (load(nodes, name, decoder=each)[2] for each in ("none", "small.safetensors"))
    expected = load_frame_vae(BUILT_IN["tiny"][1])
    use_decoder(expected, path)
    latents = torch.randn(1, 32, 4, 8, 8)
    with torch.inference_mode():
        first_stage = small.first_stage_model
        window, overlap = first_stage.window, first_stage.overlap
        video = expected.decode(latents * expected.scaling_factor, window=window, overlap=overlap)
        assert torch.equal(first_stage.decode(latents), video)
        assert not torch.allclose(own.decode(latents), small.decode(latents))
    # So STAR Plan and the host count the decoder that works.
    assert small.first_stage_model.video_vae.geometry.decoder.width == 8
    size = torch.Size((1, 32, 4, 64, 64))
    assert small.memory_used_decode(size, torch.float32) < own.memory_used_decode(
        size, torch.float32
    )
    with pytest.raises(ValueError, match="STAR Load Model: .*other.safetensors decodes latents"):
        load(nodes, name, decoder="other.safetensors")
    with pytest.raises(ValueError, match="gone.pt was not found: put it into .*models/vae_approx"):
        load(nodes, name, decoder="gone.pt")


@pytest.fixture
def downloads(nodes, monkeypatch):
    """The names of the files that were fetched; fetching them fails."""
    asked = []

    def download(name, models_dir, *, on_progress):
        on_progress(1, 2)
        asked.append(name)
        raise ValueError(f"{name} is out of reach")

    monkeypatch.setattr(nodes.host_files, "download", download)
    return asked


def test_a_copy_under_the_published_name_is_taken_before_anything_is_fetched(
    nodes, folders, downloads
):
    """Unless it is another kind of file; one where downloads go is checked by the download."""
    name, tiny = "light_deg (download)", BUILT_IN["tiny"]
    folders("checkpoints/light_deg.safetensors", tiny[1])
    with pytest.raises(ValueError, match="light_deg is out of reach"):
        nodes.host_files.model_file(name)
    copy = folders("star/light_deg.safetensors", tiny[0])
    assert nodes.host_files.model_file(name) == copy
    assert downloads == ["light_deg"]
    folders("diffusion_models/STAR/light_deg.pt")
    with pytest.raises(ValueError, match="light_deg is out of reach"):
        nodes.host_files.model_file(name)


def test_the_built_in_model_brings_its_vae_and_takes_no_text(nodes, model, vae):
    model, clip, vae = load(nodes, nodes.host_files.BUILT_IN_NAME)
    assert clip is None
    assert vae.first_stage_model.window == model.model.star.sampling.decode_window == 8


def test_a_copy_of_the_built_in_model_gets_the_built_in_vae(nodes, folders):
    folders("star/mine.safetensors", BUILT_IN["tiny"][0])
    model, clip, vae = load(nodes, "mine.safetensors")
    assert (clip, vae.latent_channels) == (None, 32)


def network_on_svd(folders):
    """A small network for the latents of Stable Video Diffusion that takes text."""
    config = replace(open_model(BUILT_IN["tiny"][0]).config, in_dim=4, out_dim=4)
    torch.manual_seed(0)
    path = folders("star/mine.safetensors")
    path.unlink()
    save_model(path, build_network(config), sampling=SamplingDefaults())


def vae_for_svd(folders):
    """A small VAE with the latents of Stable Video Diffusion's."""
    vae = SVDGeometry(block_out_channels=(32, 32), latent_channels=4).build()
    write_tensors(folders("vae/x.safetensors"), vae.model.state_dict(), overwrite=True)


@pytest.mark.parametrize(
    ("chosen", "words"),
    [
        ({"text_encoder": "none"}, '"svd_vae .download." for vae_name, or put .* into models/vae'),
        ({"vae_name": "tiny (built in)"}, "VAE makes latents of 32 channels.*takes 4"),
    ],
)
def test_what_is_missing_is_named_with_the_choice_that_fetches_it(
    nodes, folders, downloads, chosen, words
):
    network_on_svd(folders)
    with pytest.raises(ValueError, match=f"STAR Load Model: .*{words}"):
        load(nodes, "mine.safetensors", **chosen)
    assert not downloads  # nothing that ends in (download) was chosen


def test_the_vae_and_the_text_encoder_are_found_by_their_tensors(
    nodes, folders, downloads, monkeypatch
):
    network_on_svd(folders)
    vae_for_svd(folders)
    folders("vae/svd_broken.safetensors")  # likely by its name, and passed over
    folders("star/svd_of_another.safetensors", BUILT_IN["tiny"][1])
    with pytest.raises(ValueError, match='"clip_vit_h .download." for text_encoder'):
        load(nodes, "mine.safetensors")
    width = open_model(BUILT_IN["tiny"][0]).config.context_dim
    for name, wide in (("clip_vit_h", width + 1), ("zzz", width)):
        tensors = {"transformer.resblocks.0.attn.in_proj_weight": torch.ones(1)}
        tensors["token_embedding.weight"] = torch.ones(2, wide)
        write_tensors(folders(f"text_encoders/{name}.safetensors"), tensors, overwrite=True)
    loaded = []
    monkeypatch.setattr(nodes.host_parts.comfy.sd, "load_clip", lambda **how: loaded.append(how))
    found = load(nodes, "mine.safetensors")[2]
    assert found.first_stage_model.window == SamplingDefaults().decode_window
    assert [Path(how["ckpt_paths"][0]).stem for how in loaded] == ["zzz"]
    assert not downloads


def test_a_download_brings_the_parts_that_are_missing(nodes, folders, downloads, monkeypatch):
    network_on_svd(folders)
    path = folders("star/mine.safetensors", Path(str(nodes.host_files.BUILT_IN["tiny"][0])))
    monkeypatch.setattr(nodes.loaders, "model_file", lambda name: path)
    network_on_svd(folders)
    with pytest.raises(ValueError, match="svd_vae is out of reach"):
        load(nodes, "light_deg (download)")
    assert downloads == ["svd_vae"]


def test_a_file_of_another_kind_is_named(nodes, folders):
    folders("star/vae.safetensors", BUILT_IN["tiny"][1])
    with pytest.raises(ValueError, match="STAR Load Model: .*VAE of this .*built-in model"):
        load(nodes, "vae.safetensors")
    network_on_svd(folders)
    vae_for_svd(folders)
    with pytest.raises(
        ValueError, match="vae.safetensors seems to be a VAE of this.*OpenCLIP ViT-H-14"
    ):
        load(nodes, "mine.safetensors", text_encoder="vae.safetensors")
    with pytest.raises(ValueError, match="mine.safetensors seems to be a STAR.*VAE of Stable"):
        load(nodes, "mine.safetensors", vae_name="mine.safetensors")


def test_recommended_settings_reach_the_nodes(nodes, model, vae, monkeypatch, tmp_path):
    import folder_paths  # pyright: ignore[reportMissingImports]

    monkeypatch.setattr(folder_paths, "temp_directory", str(tmp_path))
    given = images(4, 96, 96)
    found = nodes.conditioning.StarAnalyzeDegradation.execute(given, model, 4.0)
    settings, cfg, checkpoint, text, bars = found.args
    assert found.ui["text"] == (text,) and len(found.ui["images"]) == 1
    assert cfg == settings.cfg and checkpoint == settings.checkpoint
    assert "noise" in text and bars.shape[0] == 1 and bars.shape[-1] == 3
    gentle = replace(settings, noise_level=300)
    sampling = importlib.import_module(".denoise", nodes.conditioning.__package__).StarSampling
    own, low, by_hand = (
        sampling.execute(model, 1, "heun", 4, level, "frame", True, degradation).args[2][0]
        for level, degradation in ((-1, None), (-1, gentle), (900, gentle))
    )
    assert low < own == by_hand
