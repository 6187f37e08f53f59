"""Finding the VAE and the text encoder that a model needs."""

import pytest
import torch
from safetensors.torch import save_file

from star_core.checkpoints import find as model_files
from star_core.checkpoints.find import comfyui_folder, find_text_encoder, find_vae

VAE = {"decoder.time_conv_out.weight": torch.ones(1)}
SVD = {
    "model.diffusion_model.out.2.bias": torch.ones(1),
    "first_stage_model.decoder.conv_out.time_mix_conv.weight": torch.ones(1),
}
IMAGE_VAE = {"decoder.mid_block.resnets.0.conv1.weight": torch.ones(1)}


def clip(width):
    return {
        "transformer.resblocks.0.attn.in_proj_weight": torch.ones(1),
        "token_embedding.weight": torch.ones(2, width),
    }


@pytest.fixture(autouse=True)
def no_comfyui(monkeypatch):
    monkeypatch.delenv("COMFYUI_DIR", raising=False)


def put(path, tensors):
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path)
    return path


def test_a_given_file_is_taken_as_it_is(tmp_path):
    path = put(tmp_path / "any.safetensors", VAE)
    put(tmp_path / "model" / "vae.safetensors", VAE)
    assert find_vae(path, model=tmp_path / "model" / "light_deg.pt") == path


def test_a_given_folder_is_searched_and_nothing_else(tmp_path):
    put(tmp_path / "else" / "vae.safetensors", VAE)
    folder = tmp_path / "svd"
    with pytest.raises(ValueError, match="svd does not exist: correct --vae"):
        find_vae(folder, models_dir=tmp_path / "else")
    folder.mkdir()
    with pytest.raises(ValueError, match="no VAE found"):
        find_vae(folder, models_dir=tmp_path / "else")
    path = put(folder / "vae" / "diffusion_pytorch_model.fp16.safetensors", VAE)
    assert find_vae(folder) == path


@pytest.mark.parametrize(
    "place", ["x.safetensors", "vae/x.safetensors", "vae/sub/x.safetensors", "checkpoints/x.pt"]
)
def test_the_vae_is_found_beside_the_model_and_in_the_models_folder(tmp_path, place):
    path = tmp_path / place
    if path.suffix == ".pt":
        path.parent.mkdir()
        torch.save(SVD, path)
    else:
        put(path, VAE)
    assert find_vae(model=tmp_path / "light_deg.pt") == path
    assert find_vae(models_dir=tmp_path) == path


def test_beside_the_model_comes_before_the_models_folder_before_comfyui(tmp_path):
    paths = [put(tmp_path / name / "vae" / "x.safetensors", VAE) for name in ("a", "b", "c/models")]
    places = {
        "model": tmp_path / "a" / "model.pt",
        "models_dir": tmp_path / "b",
        "comfyui": tmp_path / "c",
    }
    for name, path in zip(list(places), paths, strict=True):
        assert find_vae(**places) == path
        del places[name]


def test_files_are_judged_by_their_tensors_not_by_their_names(tmp_path):
    put(tmp_path / "svd_vae.safetensors", IMAGE_VAE)
    (tmp_path / "svd.safetensors").write_bytes(b"broken")
    path = put(tmp_path / "zzz.safetensors", VAE)
    assert find_vae(models_dir=tmp_path) == path
    likely = put(tmp_path / "zzz_svd.safetensors", VAE)
    assert find_vae(models_dir=tmp_path) == likely


def test_the_text_encoder_must_have_the_networks_width(tmp_path):
    put(tmp_path / "text_encoders" / "clip_l.safetensors", clip(768))
    path = put(tmp_path / "text_encoders" / "open_clip_h.safetensors", clip(1024))
    assert find_text_encoder(models_dir=tmp_path, width=1024) == path
    with pytest.raises(ValueError, match="no text encoder found"):
        find_text_encoder(models_dir=tmp_path, width=512)


def test_comfyui_is_found_by_its_variable_or_around_the_pack(tmp_path, monkeypatch):
    path = put(tmp_path / "models" / "clip" / "x.safetensors", clip(8))
    assert comfyui_folder() is None
    monkeypatch.setenv("COMFYUI_DIR", str(tmp_path))
    assert find_text_encoder() == path
    monkeypatch.setenv("COMFYUI_DIR", str(tmp_path / "gone"))
    with pytest.raises(ValueError, match="gone is not a folder"):
        comfyui_folder()
    monkeypatch.delenv("COMFYUI_DIR")
    module = tmp_path / "custom_nodes" / "ComfyUI-STAR" / "star_core" / "checkpoints" / "find.py"
    monkeypatch.setattr(model_files, "__file__", str(module))
    assert comfyui_folder() == tmp_path


def test_comfyuis_extra_model_paths_are_searched(tmp_path):
    (tmp_path / "comfy").mkdir()
    (tmp_path / "comfy" / "extra_model_paths.yaml").write_text(
        "other:\n  base_path: ../disk/\n  vae: |\n    old/\n    new/\n  loras: loras\n"
    )
    path = put(tmp_path / "disk" / "new" / "x.safetensors", VAE)
    assert find_vae(comfyui=tmp_path / "comfy").resolve() == path
    (tmp_path / "comfy" / "extra_model_paths.yaml").write_text("a: [b")
    with pytest.raises(ValueError, match="extra_model_paths.yaml is unreadable"):
        find_vae(comfyui=tmp_path / "comfy")


@pytest.mark.parametrize(
    "find, expected",
    [
        (
            find_vae,
            "download svd_vae .*diffusion_pytorch_model.fp16.safetensors .* into .*vae.*--vae",
        ),
        (
            find_text_encoder,
            "download clip_vit_h .*open_clip_model.* into .*text_encoders.*--text-encoder",
        ),
    ],
)
def test_what_is_not_found_is_named_with_its_place_and_source(tmp_path, find, expected):
    (tmp_path / "bad.pt").write_bytes(b"")
    with pytest.raises(ValueError, match=expected) as error:
        find(model=tmp_path / "model.pt")
    assert "Hugging Face" in str(error.value) and "bad.pt is empty" in str(error.value)
    with pytest.raises(ValueError, match="into ComfyUI's models"):
        find()


def test_a_models_folder_that_is_missing_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="correct --models-dir"):
        find_vae(models_dir=tmp_path / "gone")
