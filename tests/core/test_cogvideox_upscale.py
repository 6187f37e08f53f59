"""The second backbone from files to file, by the command line."""

import json
from fractions import Fraction

import pytest
import torch

from star_core.cli import main
from star_core.model import find_model
from star_core.vae.cogvideox import CausalVideoVAE
from star_core.vae.load import load_vae
from star_core.video_io import open_sink, open_video
from tests.cogvideox_files import VAE, write_model, write_t5, write_vae


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Model and VAE in a folder, and a folder of T5 in it."""
    folder = tmp_path_factory.mktemp("models")
    write_model(folder)
    write_vae(folder)
    write_t5(folder)
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    path = tmp_path_factory.mktemp("clip") / "clip.mkv"
    frames = torch.rand(11, 3, 12, 20, generator=torch.Generator().manual_seed(0))
    with open_sink(path, width=20, height=12, fps=Fraction(10)) as sink:
        for frame in frames:
            sink.write(frame)
    return path


def restored(clip, out, files, *more) -> torch.Tensor:
    what = ("--scale", 3, "--frames", "0:10", "--color-fix", "none", "--shots", "off")
    assert main([str(a) for a in ("upscale", clip, out, *options(files), *what, *more)]) == 0
    return torch.stack(list(open_video(out)))


@pytest.fixture(scope="module")
def usual(files, clip, tmp_path_factory):
    return restored(clip, tmp_path_factory.mktemp("usual") / "out.mkv", files)


def run(capsys, *arguments) -> tuple[int, str, str]:
    code = main([str(a) for a in ("upscale", *arguments, "--shots", "off", "--json")])
    return code, *capsys.readouterr()


def options(files):
    return "--model", files / "star.safetensors", "--text-encoder", files / "t5"


def test_the_other_files_are_found_by_what_they_are(files):
    found = find_model(str(files / "star.safetensors"), text_encoder=str(files / "t5"))
    assert found.vae.name == "cogvideox_vae.safetensors"
    assert found.text_encoder == files / "t5" / "text_encoder" / "model.safetensors"
    with pytest.raises(ValueError, match="THUDM/CogVideoX-5b"):
        find_model(str(files / "star.safetensors"), vae=str(files / "t5"))


def test_a_clip_is_restored_to_its_length_and_size(files, clip, tmp_path, capsys):
    code, out, err = run(capsys, clip, tmp_path / "out.mkv", *options(files), "--scale", 3.5)
    assert code == 0, err
    report = json.loads(out)
    assert (report["frames"], report["width"], report["height"]) == (11, 70, 42)
    assert report["sampling"]["schedule"] == "scaled_linear"
    restored = torch.stack(list(open_video(tmp_path / "out.mkv")))
    assert restored.shape == (11, 3, 42, 70)
    again = tmp_path / "again.mkv"
    run(capsys, clip, again, *options(files), "--scale", 3.5)
    assert again.read_bytes() == (tmp_path / "out.mkv").read_bytes()


@pytest.mark.parametrize(
    "changed",
    [
        ["--prompt", "a bike"],
        ["--negative", "a bike"],
        ["--cfg-mode", "constant"],
        ["--spacing", "diffusers", "--steps", "3"],
        ["--fade"],
        ["--reference"],
        ["--chunk-frames", "5"],
        ["--latent-tile", "32:16"],
    ],
)
def test_options_change_the_result(files, clip, tmp_path, usual, changed):
    assert not torch.equal(restored(clip, tmp_path / "out.mkv", files, *changed), usual)


@pytest.mark.parametrize(
    ("wrong", "output"),
    [
        (["--chunk-frames", "8"], "4k\\+1"),
        (["--solver-mode", "fast"], "no fast steps"),
        (["--attention-window", "8"], "no attention windows"),
        (["--reuse", "50"], "cannot reuse features"),
    ],
)
def test_what_this_backbone_cannot_do_is_said(files, clip, tmp_path, capsys, wrong, output):
    code, out, err = run(capsys, clip, tmp_path / "x.mkv", *options(files), *wrong)
    assert (code, out) == (2, "")
    import re

    assert re.search(output, err)


def test_diffusers_folder_states_the_scale_of_the_latents(files, tmp_path):
    from safetensors.torch import load_file, save_file

    (tmp_path / "vae").mkdir()
    weights = load_file(files / "cogvideox_vae.safetensors")
    save_file(weights, tmp_path / "vae" / "diffusion_pytorch_model.safetensors")
    config = VAE | {"_class_name": "AutoencoderKLCogVideoX", "scaling_factor": 1.15258426}
    (tmp_path / "vae" / "config.json").write_text(json.dumps(config))
    vae = load_vae(tmp_path, scale=0.7)
    assert isinstance(vae, CausalVideoVAE) and vae.scaling_factor == 1.15258426
    assert load_vae(files / "cogvideox_vae.safetensors", scale=0.5).scaling_factor == 0.7
