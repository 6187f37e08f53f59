"""`upscale` refuses wrong input and options with a message of one line."""

import pytest
import torch
from safetensors.torch import save_file

from star_core.model import BUILT_IN
from star_core.star_checkpoint import load_model
from star_core.video_io import open_video
from tests.command_line import refused, upscaled


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--scale", "0.5"], "scale must be a finite number from 1 up"),
        (["--scale", "nan"], "scale must be a finite number from 1 up"),
        (["--scale", "four"], "invalid float value"),
        (["--scale", "1e6"], "at most 32768"),
        (["--out-size", "8x8"], "smaller than the input"),
        (["--out-size", "80"], "WIDTHxHEIGHT"),
        (["--scale", "2", "--out-size", "80x80"], "not allowed with"),
        (["--frames", "2:9"], "has 0:3"),
        (["--frames", "2:2"], "has 0:3"),
        (["--crop", "20x2+0+0"], "displayed as 16x12"),
        (["--crop", "2x2"], "WxH+X+Y"),
        (["--strength", "2"], "strength must be from 0 to 1"),
        (["--seed", "-1"], "seed must be from 0"),
        (["--seed", "18446744073709551616"], "seed must be from 0"),
        (["--steps", "0"], "steps must be at least 1"),
        (["--noise-level", "1001"], "noise level must be in"),
        (["--chunk-frames", "0"], "at least 1"),
        (["--chunk-frames", "4", "--chunk-overlap", "4"], "overlap must be in"),
        (["--tile", "0"], "tile overlap"),
        (["--solver-mode", "fast", "--steps", "20"], "--solver-mode normal"),
        (["--prompt", "a cat"], "learned prompts"),
        (["--text-encoder", "clip.bin"], "learned prompts"),
        (["--vae", "no.safetensors"], "no.safetensors"),
        (["--model", "no.pt"], "no.pt"),
        (["--device", "abacus"], "device abacus"),
        (["--codec", "h265"], "h265 go into .mp4"),
        (["--stills"], "is not a folder"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_computed(
    tmp_path, capsys, clip, monkeypatch, options, message
):
    monkeypatch.setattr("star_core.upscale.restore", None)
    out = tmp_path / "out.mkv"
    assert message in refused(capsys, "upscale", clip, out, *options)
    assert not list(tmp_path.iterdir())


def test_fast_with_steps_is_allowed_in_reference_which_ignores_them(tmp_path, capsys, clip):
    options = ["--solver-mode", "fast", "--steps", "20", "--reference"]
    error = refused(capsys, "upscale", clip, tmp_path / "out.mkv", *options)
    # So it got that far; and the built-in model is made for other frames.
    assert "the reference pads frames to 1280x720" in error


def test_an_existing_file_is_kept_unless_overwriting_is_asked_for(tmp_path, capsys, clip):
    out = tmp_path / "out.mkv"
    out.write_text("precious")
    error = refused(capsys, "upscale", clip, out, "--scale", 1)
    assert "exists already" in error and "add --overwrite" in error
    assert out.read_text() == "precious"
    upscaled(capsys, clip, out, "--scale", 1, "--overwrite")
    assert open_video(out).info.frame_count == 3


def test_a_network_without_prompts_asks_for_the_text_encoder_by_name(
    tmp_path, capsys, clip, monkeypatch
):
    from star_core.star_checkpoint import save_model

    monkeypatch.delenv("COMFYUI_DIR", raising=False)
    model = load_model(BUILT_IN["tiny"][0])
    path = tmp_path / "model.safetensors"
    save_model(path, model.network, sampling=model.sampling)
    vae = ["--vae", BUILT_IN["tiny"][1]]
    error = refused(capsys, "upscale", clip, tmp_path / "out.mkv", "--model", path)
    assert "no VAE found" in error and "--vae" in error
    error = refused(capsys, "upscale", clip, tmp_path / "out.mkv", "--model", path, *vae)
    assert "no text encoder found" in error and "--text-encoder" in error


def test_a_vae_of_other_latents_is_refused(tmp_path, capsys, clip):
    from star_core.vae.svd import svd_vae

    config = {"block_out_channels": [32, 32], "layers_per_block": 1, "latent_channels": 4}
    save_file(svd_vae(config).model.state_dict(), tmp_path / "vae.safetensors")
    vae = ["--vae", tmp_path / "vae.safetensors"]
    assert "4 channels" in refused(capsys, "upscale", clip, tmp_path / "out.mkv", *vae)


def test_not_enough_memory_is_an_error_with_a_remedy(tmp_path, capsys, clip, monkeypatch):
    def exhausted(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7 TiB")

    monkeypatch.setattr("star_core.upscale.restore", exhausted)
    error = refused(capsys, "upscale", clip, tmp_path / "out.mkv")
    assert "--chunk-frames" in error
    assert not list(tmp_path.iterdir())
