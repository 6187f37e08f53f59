"""Loaders, prompts, sizes and the comparison, in the host."""

import importlib
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from star_core.checkpoints import LearnedPrompts, open_model
from star_core.model import BUILT_IN
from star_core.models.unet import UNetConfig
from star_core.text import join_prompt

pytestmark = pytest.mark.host


@pytest.fixture(scope="module")
def nodes(pack) -> Any:
    names = (
        "conditioning",
        "host_conditioning",
        "host_files",
        "host_restore",
        "loaders",
        "restore",
    )
    modules = {n: importlib.import_module(f".nodes.{n}", pack.__name__) for n in names}
    return SimpleNamespace(**modules)


@pytest.fixture(scope="module")
def model(nodes):
    return nodes.loaders.StarLoadModel.execute(nodes.host_files.BUILT_IN_NAME, "default").args[0]


@pytest.fixture(scope="module")
def vae(nodes):
    return nodes.loaders.StarLoadVAE.execute(nodes.host_files.BUILT_IN_NAME).args[0]


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


def test_learned_prompts_stand_in_for_text(nodes, model):
    positive, negative = nodes.conditioning.StarTextEncode.execute(model, "x", "y", "z").args
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
    ("clip", "words"), [(None, "STAR Load Text Encoder"), (Clip(768), "width 768.*1024")]
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
    with pytest.raises(ValueError, match="STAR Load VAE"):
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
    restored = nodes.restore.StarRestore.execute(
        model, vae, given, 2.5, 0, 0, 1, 0, -1.0, -1, 1.0, 32, 16, 0, 64, "model", False, ""
    ).args[0]
    assert restored.shape == (2, 43, 55, 4)  # floor(x * scale + 0.5)
    alpha = torch.nn.functional.interpolate(
        given[..., 3:].movedim(-1, 1), size=(43, 55), mode="bicubic"
    ).clamp(0, 1)
    torch.testing.assert_close(restored[..., 3], alpha[:, 0])
    assert torch.equal(given, before)


def test_stills_are_restored_each_by_itself(nodes, model, vae):
    def restore(frames, stills):
        return nodes.restore.StarRestore.execute(
            model, vae, frames, 2.0, 0, 0, 1, 0, -1.0, -1, 1.0, 32, 16, 0, 64, "model", stills, ""
        ).args[0]

    pictures = images(2)
    together, apart = restore(pictures, False), restore(pictures, True)
    assert torch.equal(apart[1:], restore(pictures[1:], True))
    assert not torch.equal(apart, together)


def test_strength_zero_is_the_bicubic_input(nodes, model, vae):
    restored = nodes.restore.StarRestore.execute(
        model, vae, images(), 2.0, 0, 0, 1, 0, -1.0, -1, 0.0, 32, 16, 0, 64, "model", False, ""
    ).args[0]
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


def test_a_published_file_is_offered_until_it_is_there(nodes, tmp_path, monkeypatch):
    import folder_paths  # pyright: ignore[reportMissingImports]

    files = nodes.host_files
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "star", ([str(tmp_path)], {".pt"}))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    assert "light_deg (download)" in files.choices(("star",), ("light_deg", "heavy_deg"))
    (tmp_path / "light_deg.pt").touch()
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    assert files.choices(("star",), ("light_deg", "heavy_deg")) == [
        "light_deg.pt",
        "heavy_deg (download)",
    ]
    assert files.resolve("light_deg.pt", ("star",)) == tmp_path / "light_deg.pt"


def test_choosing_a_missing_published_file_fetches_it_with_progress(nodes, monkeypatch, tmp_path):
    import folder_paths  # pyright: ignore[reportMissingImports]

    asked = []

    def download(name, models_dir, *, on_progress):
        on_progress(1, 2)
        asked.append((name, models_dir))
        return tmp_path / "light_deg.pt"

    monkeypatch.setattr(nodes.host_files, "download", download)
    found = nodes.host_files.resolve("light_deg (download)", nodes.host_files.MODEL_FOLDERS)
    assert found == tmp_path / "light_deg.pt"
    assert asked == [("light_deg", folder_paths.models_dir)]


def test_a_file_that_is_no_star_network_is_named(nodes, tmp_path, monkeypatch):
    monkeypatch.setattr(nodes.loaders, "resolve", lambda *_, **__: BUILT_IN["tiny"][1])
    with pytest.raises(ValueError, match="STAR Load Model: .*temporal decoder"):
        nodes.loaders.StarLoadModel.execute("x", "default")
    with pytest.raises(ValueError, match="STAR Load Text Encoder: .*temporal decoder"):
        nodes.loaders.StarLoadTextEncoder.execute("x")


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
    schedule = importlib.import_module(".denoise", nodes.conditioning.__package__).StarScheduler
    own, low, by_hand = (
        schedule.execute(model, "normal", 4, level, "heun", degradation).args[0][0]
        for level, degradation in ((-1, None), (-1, gentle), (900, gentle))
    )
    assert low < own == by_hand
