"""The command line, run as a function; whole processes only where signals or imports matter."""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import wave
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from star_core.cli import main
from star_core.cli.upscale import add_upscale, run_spec
from star_core.diffusion.shortcuts import FAST, Shortcuts
from star_core.lora import add_lora, lora_layers, write_lora
from star_core.model import BUILT_IN
from star_core.pipeline import Settings
from star_core.resume import work_folder
from star_core.star_checkpoint import load_model
from star_core.upscale import ShotSettings
from star_core.video_io import open_sink, open_video
from star_core.windows.geometry import upsample
from star_core.windows.tiling import Tile
from tests.cli_page import PAGE, page
from tests.paths import ROOT


def frames_of(path) -> Tensor:
    return torch.stack(list(open_video(path)))


def run(capsys, *arguments) -> tuple[int, str, str]:
    """Exit code, stdout, stderr. Cuts are searched for only where a test says so."""
    if arguments[0] == "upscale" and "--shots" not in arguments:
        arguments = (*arguments, "--shots", "off")
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as exit:  # argparse
        assert isinstance(exit.code, int)
        code = exit.code
    return code, *capsys.readouterr()


def upscaled(capsys, *arguments) -> dict:
    code, out, err = run(capsys, "upscale", *arguments, "--json")
    assert code == 0, err
    assert out.count("\n") == 1
    return json.loads(out)


def shot_of(*arguments) -> ShotSettings:
    """How `upscale` would restore the whole input."""
    parser = argparse.ArgumentParser()
    add_upscale(parser)
    return run_spec(parser.parse_args([str(argument) for argument in arguments]))[0].whole


def settings_of(*arguments) -> Settings:
    return shot_of(*arguments).settings


def refused(capsys, *arguments) -> str:
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1
    return err


def write_clip(path: Path, frames: int, height: int, width: int, channels: int = 3) -> Path:
    generator = torch.Generator().manual_seed(frames)
    coarse = torch.rand(frames, channels, 4, 5, generator=generator)
    clip = upsample(coarse, (width, height), "bicubic").clamp(0, 1)
    with open_sink(path, width=width, height=height, fps=Fraction(10), alpha=channels == 4) as sink:
        for frame in clip:
            sink.write(frame)
    return path


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clips") / "clip.mkv", 3, 12, 16)


# size and count

AWKWARD = [
    ((16, 16), 1, ["--scale", "1"]),
    ((17, 19), 2, ["--scale", "2.3"]),
    ((1, 1), 1, ["--scale", "4"]),
    ((33, 5), 2, ["--scale", "3.999"]),
    ((7, 31), 3, []),
    ((64, 2), 1, ["--scale", "1.5"]),
    ((21, 13), 4, ["--out-size", "43x29"]),
    ((18, 18), 2, ["--out-size", "18x37"]),
    ((20, 12), 9, ["--scale", "1.01", "--chunk-frames", "4"]),
    ((12, 20), 5, ["--scale", "2", "--chunk-frames", "2", "--chunk-overlap", "0"]),
    ((15, 15), 2, ["--scale", "3.3", "--tile", "32:8"]),
    ((11, 9), 3, ["--scale", "2.5", "--noise-level", "0"]),
]


@pytest.mark.parametrize(("size", "frames", "options"), AWKWARD)
def test_awkward_sizes_come_out_exactly(tmp_path, capsys, size, frames, options):
    width, height = size
    source = write_clip(tmp_path / "in.mkv", frames, height, width)
    report = upscaled(capsys, source, tmp_path / "out.mkv", *options)
    if "--out-size" in options:
        expected = tuple(map(int, options[1].split("x")))
    else:
        scale = float(options[1]) if options else 4
        expected = int(width * scale + 0.5), int(height * scale + 0.5)
    info = open_video(tmp_path / "out.mkv").info
    assert (info.width, info.height, info.frame_count) == (*expected, frames)
    assert (report["width"], report["height"], report["frames"]) == (*expected, frames)
    assert info.timestamps == pytest.approx(open_video(source).info.timestamps, abs=1e-3)


# what comes out


def test_progress_goes_to_stderr_with_time_left_and_nothing_to_stdout(tmp_path, capsys, clip):
    code, out, err = run(capsys, "upscale", clip, tmp_path / "out.mkv", "--scale", 1)
    assert (code, out) == (0, "")
    assert "encode 3/3" in err and "denoise 1/1" in err and "0:00 left" in err


def test_strength_0_is_the_bicubic_input_to_one_level(tmp_path, capsys, clip):
    upscaled(capsys, clip, tmp_path / "out.mkv", "--strength", 0, "--scale", 2)
    bicubic = upsample(frames_of(clip), (32, 24), "bicubic").clamp(0, 1)
    assert (frames_of(tmp_path / "out.mkv") - bicubic).abs().max() <= 1 / 255


def test_what_is_not_enlarged_is_changed_as_little_as_the_model_file_says(tmp_path, capsys, clip):
    from star_core.star_checkpoint import load_model

    def strength(scale, *options):
        out = tmp_path / f"{scale}{len(options)}.mkv"
        return upscaled(capsys, clip, out, "--scale", scale, *options)["strength"]

    own = load_model(BUILT_IN["tiny"][0]).sampling.same_size_strength
    assert own < 1
    assert strength(1) == pytest.approx(own)
    assert strength(1.5) == pytest.approx((1 + own) / 2)
    assert strength(2) == strength(1, "--strength", 1) == 1


@pytest.fixture(scope="module")
def blurred(tmp_path_factory) -> Path:
    """Coarse and noisy: what is shrunk first."""
    folder = tmp_path_factory.mktemp("clips")
    frames = frames_of(write_clip(folder / "coarse.mkv", 2, 64, 80))
    noise = torch.randn(frames.shape, generator=torch.Generator().manual_seed(0))
    with open_sink(folder / "blurred.mkv", width=80, height=64, fps=Fraction(10)) as sink:
        for frame in (0.1 + 0.8 * frames + 0.03 * noise).clamp(0, 1):
            sink.write(frame)
    return folder / "blurred.mkv"


def test_auto_measures_prints_and_applies_what_is_not_given(tmp_path, capsys, blurred):
    options = ("--scale", 1, "--auto", "--frames", "0:1", "--noise-level", 700)
    code, out, err = run(capsys, "upscale", blurred, tmp_path / "a.mkv", *options, "--json")
    assert code == 0, err
    report = json.loads(out)
    advice = report["recommended"]
    assert "effective resolution" in err and "input shrunk by" in err
    assert report["degradation"]["resolution"] < 0.4 and advice["shrink"] > 1
    assert (report["shrink"], report["strength"]) == (advice["shrink"], advice["strength"])
    assert report["sampling"]["noise_level"] == 700
    assert (report["width"], report["height"]) == (80, 64)


def test_auto_measures_each_shot_and_what_a_shot_says_goes_first(tmp_path, capsys, blurred):
    shots = tmp_path / "shots.json"
    shots.write_text('[{"start": 0}, {"start": 1, "strength": 0}]')
    command = (blurred, tmp_path / "a.mkv", "--scale", 1, "--auto", "--shots", shots)
    first, second = upscaled(capsys, *command)["shots"]
    assert first["degradation"] != second["degradation"]
    assert first["strength"] == first["recommended"]["strength"] > 0
    assert second["strength"] == 0 and second["shrink"] == second["recommended"]["shrink"]


def test_what_auto_recommends_can_be_overridden_and_gives_the_same_by_hand(
    tmp_path, capsys, blurred
):
    base = (blurred, "--scale", 1, "--frames", "0:1")
    paths = [tmp_path / f"{name}.mkv" for name in ("auto", "hand", "plain")]
    by_hand = ("--strength", 0.9, "--shrink", 2)
    upscaled(capsys, base[0], paths[0], *base[1:], "--auto", *by_hand)
    upscaled(capsys, base[0], paths[1], *base[1:], *by_hand)
    upscaled(capsys, base[0], paths[2], *base[1:], "--strength", 0.9)
    auto, hand, plain = map(frames_of, paths)
    assert torch.equal(auto, hand)
    assert not torch.equal(hand, plain)


def test_auto_refuses_stills_and_frames_too_small_to_measure(tmp_path, capsys, clip):
    assert "64 pixels" in refused(capsys, "upscale", clip, tmp_path / "a.mkv", "--auto")
    error = refused(capsys, "upscale", clip, tmp_path / "a", "--auto", "--stills")
    assert "leave out --auto" in error


def test_previews_show_what_the_whole_run_shows(tmp_path, capsys):
    """Exact: one evaluation of the network, and a margin that covers the frame."""
    source = write_clip(tmp_path / "in.mkv", 7, 12, 16)
    common = ["--scale", "1.5", "--chunk-frames", "3"]
    upscaled(capsys, source, tmp_path / "whole.mkv", *common)
    preview = ["--frames", "3:5", "--crop", "7x5+4+2"]
    report = upscaled(capsys, source, tmp_path / "part.mkv", *common, *preview)
    whole, span = frames_of(tmp_path / "whole.mkv"), frames_of(tmp_path / "part.mkv")
    assert span.shape == (report["frames"], 3, report["height"], report["width"])
    assert (span - whole[3:5, :, 3:11, 6:17]).abs().max() <= 1 / 255


def test_sound_of_a_preview_is_cut_with_its_frames(tmp_path, capsys):
    import imageio_ffmpeg

    video = write_clip(tmp_path / "silent.mkv", 10, 8, 8)
    with wave.open(str(tmp_path / "tone.wav"), "wb") as tone:
        tone.setparams((1, 2, 8000, 0, "NONE", ""))
        tone.writeframes(bytes(16000))
    ffmpeg = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error"]
    both = ["-i", str(video), "-i", str(tmp_path / "tone.wav")]
    source = tmp_path / "loud.mkv"
    subprocess.run([*ffmpeg, *both, "-c", "copy", str(source)], check=True)
    out = tmp_path / "part.mkv"
    span = ["--frames", "4:6", "--chunk-frames", "4"]
    upscaled(capsys, source, out, "--scale", 1, *span)
    sound = subprocess.run(
        [*ffmpeg, "-i", str(out), "-map", "0:a", "-f", "s16le", "-"],
        capture_output=True,
        check=True,
    ).stdout
    assert 0.15 < len(sound) / 16000 < 0.3


def test_alpha_is_carried_where_the_output_can(tmp_path, capsys):
    source = write_clip(tmp_path / "in.mkv", 2, 8, 10, channels=4)
    upscaled(capsys, source, tmp_path / "out.mkv", "--scale", 2)
    alpha = upsample(frames_of(source)[:, 3:], (20, 16), "bicubic").clamp(0, 1)
    assert (frames_of(tmp_path / "out.mkv")[:, 3:] - alpha).abs().max() <= 1 / 255
    assert ".mkv" in refused(capsys, "upscale", source, tmp_path / "out.mp4")


def test_stills_are_restored_each_on_its_own(tmp_path, capsys):
    stills, out = tmp_path / "stills", tmp_path / "out"
    stills.mkdir()
    for name, height, width in (("a", 9, 12), ("b", 7, 8)):
        write_clip(tmp_path / name, 1, height, width).joinpath("00001.png").rename(
            stills / f"{name}.png"
        )
    report = upscaled(capsys, stills, out, "--stills", "--scale", 2)
    assert report["frames"] == 2
    assert sorted(path.name for path in out.iterdir()) == ["a.png", "b.png"]
    assert frames_of(out / "b.png").shape == (1, 3, 14, 16)
    alone = tmp_path / "alone.png"
    upscaled(capsys, stills / "b.png", alone, "--scale", 2)
    assert torch.equal(frames_of(out / "b.png"), frames_of(alone))
    assert "exists already" in refused(capsys, "upscale", stills, out, "--stills")
    upscaled(capsys, stills, out, "--stills", "--scale", 1, "--overwrite")
    assert frames_of(out / "a.png").shape == (1, 3, 9, 12)
    assert not list(tmp_path.glob(".star-*"))


def test_reference_takes_previews_for_clips_of_their_own(tmp_path, capsys, monkeypatch):
    seen = {}

    def restore(frames, model, vae, shots, canvas, **options):
        (shot,) = shots
        seen.update(canvas=canvas, span=shot.span, behaviour=shot.settings.behaviour.name)
        height, width = canvas.size[::-1]
        for frame in frames:
            assert frame.shape == (3, 5, 7)
            yield torch.zeros(3, height, width)

    monkeypatch.setattr("star_core.upscale.restore", restore)
    source = write_clip(tmp_path / "in.mkv", 7, 12, 16)
    preview = ["--frames", "3:5", "--crop", "7x5+4+2", "--scale", "2", "--reference"]
    report = upscaled(capsys, source, tmp_path / "out.mkv", *preview)
    assert seen["behaviour"] == "reference"
    assert seen["canvas"].size == (14, 10) and seen["span"].needed == range(2)
    assert (report["width"], report["height"], report["frames"]) == (14, 10, 2)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], Shortcuts()),
        (["--fast"], FAST),
        (["--fast", "--reuse", "0"], replace(FAST, reuse=0)),
        (["--guidance", "100:"], Shortcuts(guidance=(100, 1000))),
        (["--guidance", ":700"], Shortcuts(guidance=(0, 700))),
        (["--attention-window", "32"], Shortcuts(attention_window=32)),
        (["--reuse", "60"], Shortcuts(reuse=60)),
    ],
)
def test_each_shortcut_is_switched_by_itself_or_all_by_fast(clip, tmp_path, options, expected):
    assert settings_of(clip, tmp_path / "out.mkv", *options).shortcuts == expected


def test_tiles_of_the_network_and_offloading_are_asked_for_by_themselves(clip, tmp_path):
    out = tmp_path / "out.mkv"
    shot = shot_of(clip, out, "--latent-tile", "512:100", "--offload")
    assert shot.settings.latent_tile == Tile(size=512, overlap=100)
    assert shot.execution.slicing.offload
    shot = shot_of(clip, out, "--latent-tile", "512")
    assert shot.settings.latent_tile == Tile(size=512, overlap=128)
    assert not shot.execution.slicing.offload
    assert shot.settings.tile is None


# what is refused


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


def test_fast_with_steps_is_allowed_in_reference_which_ignores_them(
    tmp_path, capsys, clip, monkeypatch
):
    monkeypatch.setattr("star_core.upscale.restore", lambda frames, *_, **__: iter(()))
    options = ["--solver-mode", "fast", "--steps", "20"]
    with pytest.raises(AssertionError, match="0 of 3 frames written"):  # so it got that far
        main(["upscale", str(clip), str(tmp_path / "out.mkv"), *options, "--reference"])


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
    from star_core.star_checkpoint import load_model, save_model

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


# interruption


@pytest.mark.skipif(os.name == "nt", reason="Ctrl-C cannot be sent to a process there")
def test_ctrl_c_exits_with_130_and_leaves_nothing(tmp_path):
    source = write_clip(tmp_path / "in.mkv", 40, 24, 32)
    command = ["upscale", str(source), str(tmp_path / "out.mkv"), "--scale", "3", "--shots", "off"]
    process = subprocess.Popen(
        [sys.executable, "-m", "star_core", *command],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        # A test run in the background of a shell ignores Ctrl-C, and so would its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stderr is not None
    assert "encode 0/40" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate()
    assert process.returncode == 130
    assert rest.splitlines()[-1] == "interrupted"
    assert list(tmp_path.iterdir()) == [source]


# other commands


def test_manifest_prints_the_published_networks_keys_and_shapes(capsys):
    code, out, err = run(capsys, "manifest", "i2vgenxl")
    manifest = json.loads(out)
    assert (code, err, len(manifest)) == (0, "", 2247)
    assert manifest["input_blocks.0.0.weight"] == [320, 4, 3, 3]


def test_info_tells_what_the_built_in_model_is(capsys):
    code, out, _ = run(capsys, "info", "tiny", "--json")
    assert code == 0
    assert json.loads(out)["kind"] == "star-i2vgenxl"
    assert "sampling: steps" in run(capsys, "info", "tiny")[1]


def test_convert_writes_safetensors_of_the_type_asked_for(tmp_path, capsys):
    torch.save({"state_dict": {"a": torch.ones(2)}}, tmp_path / "a.pt")
    out = tmp_path / "a.safetensors"
    assert run(capsys, "convert", tmp_path / "a.pt", out, "--dtype", "bfloat16")[0] == 0
    assert "1 bfloat16" in run(capsys, "info", out)[1]
    assert "add --overwrite" in refused(capsys, "convert", tmp_path / "a.pt", out)


def test_verify_reports_failure_by_its_exit_code(tmp_path, capsys):
    (tmp_path / "unheard_of_0.json").write_text('{"what": "nothing"}')
    code, out, _ = run(capsys, "verify", tmp_path)
    assert code == 1 and out.startswith("FAIL unheard_of_0")
    assert "no test vectors" in refused(capsys, "verify", tmp_path / "empty")


@pytest.fixture(scope="module")
def lora(tmp_path_factory) -> Path:
    """A LoRA of tiny that asks for two evaluations."""
    network = load_model(BUILT_IN["tiny"][0], dtype=torch.float32).network
    add_lora(network, 2)
    for layer in lora_layers(network).values():
        torch.nn.init.normal_(layer.lora_up.weight, std=0.3)
    path = tmp_path_factory.mktemp("lora") / "few.safetensors"
    few = {"steps": 2, "solver_mode": "normal", "sampler": "euler", "cfg": 1.0, "noise_level": 800}
    write_lora(path, network, sampling=few)
    return path


def test_a_lora_needs_no_other_setting_and_each_can_be_overridden(lora):
    sampling = settings_of("in.mkv", "out.mkv", "--lora", lora).sampling
    facts = (sampling.steps, sampling.sampler, sampling.cfg, sampling.noise_level)
    assert facts == (2, "euler", 1.0, 800)
    more = ["--lora", f"{lora}:0.5", "--steps", "4", "--sampler", "lcm"]
    sampling = settings_of("in.mkv", "out.mkv", *more).sampling
    assert (sampling.steps, sampling.sampler, sampling.noise_level) == (4, "lcm", 800)
    assert settings_of("in.mkv", "out.mkv", "--lora", f"{lora}:0").sampling.noise_level == 900
    assert settings_of("in.mkv", "out.mkv").sampling.noise_level == 900


def test_loras_change_the_result_by_their_strengths(capsys, tmp_path, lora):
    clip = write_clip(tmp_path / "in.mkv", 2, 16, 20)
    common = ["--scale", 2, "--noise-level", 900, "--steps", 1]

    def result(name, *options):
        report = upscaled(capsys, clip, tmp_path / name, *common, *options)
        assert report["sampling"]["steps"] == 1
        return frames_of(tmp_path / name)

    plain = result("plain.mkv")
    one = result("one.mkv", "--lora", lora)
    halves = result("halves.mkv", "--lora", f"{lora}:0.5", f"{lora}:0.5")
    off = result("off.mkv", "--lora", f"{lora}:0")
    assert (one - plain).abs().max() > 0.02
    assert (halves - one).abs().max() < 0.01
    assert torch.equal(off, plain)
    assert "does not exist" in refused(capsys, "upscale", clip, "o.mkv", "--lora", "nothing.pt")
    # A file whose name has a colon is a file.
    assert "a:b.pt does not exist" in refused(capsys, "upscale", clip, "o.mkv", "--lora", "a:b.pt")


def test_train_hands_its_arguments_to_the_recipe(tmp_path, capsys, monkeypatch):
    def train_tiny(data, out, *, steps, seed, start, sharp, metric_weights, bf16, on_step):
        assert start == tmp_path and sharp == 0.5 and metric_weights is None and not bf16
        on_step(steps, steps, {"velocity": float(seed)})

    monkeypatch.setattr("star_core.training.tiny.train_tiny", train_tiny)
    where = ["--data", tmp_path, "--out", tmp_path / "out", "--start", tmp_path, "--sharp", 0.5]
    code, out, err = run(capsys, "train", "--built-in", *where, "--steps", 7, "--seed", 3)
    assert (code, out, err) == (0, "", "step 7/7, velocity 3.0000, 0:00 left\n")


@pytest.mark.parametrize("given", [False, True], ids=["defaults", "options"])
def test_train_hands_its_options_to_the_training_of_a_model(tmp_path, monkeypatch, given):
    seen = {}

    def finetune(model, vae_file, material, out, config, **others):
        seen.update(material=material, config=config, **others)

    monkeypatch.setattr("star_core.training.finetune.finetune", finetune)
    options = ["--bf16", "--checkpointing", "--df-alpha", "0.5", "--df-beta", "3"]
    options += ["--interval", "5", "--df-space", "latents", "--batch", "4", "--every", "7"]
    options += ["--clip-frames", "9", "--size", "640x360", "--learning-rate", "0.25", "--rank", "3"]
    options += ["--recipe", "light", "--trains", "lora", "--seed", "8"]
    command = ["train", "--model", "tiny", "--data", str(tmp_path), "--out", str(tmp_path)]
    assert main([*command, "--steps", "11", *(options if given else [])]) == 0
    config, material = seen["config"], seen["material"]
    facts = [config.bf16, config.checkpointing, config.df.alpha, config.df.beta, config.df_space]
    facts += [config.batch, config.learning_rate, config.trains, config.seed, config.steps]
    facts += [material.interval, material.frames, material.size, material.recipe.name]
    facts += [seen["every"], seen["rank"]]
    assert facts == (
        [True, True, 0.5, 3.0, "latents", 4, 0.25, "lora", 8, 11]
        + [5, 9, (360, 640), "light", 7, 3]
        if given
        else [False, False, 2.0, 1.0, "pixels", 1, 5e-5, "star", 0, 11]
        + [2, 32, (720, 1280), "heavy", 500, 16]
    )
    # Every noise level is trained, none more than others: the paper's setting.
    assert (config.noise_level, config.early, config.start) == (1000, 0.0, 0.0)


def test_train_hands_its_options_to_a_distillation(tmp_path, monkeypatch, capsys):
    seen = {}

    def finetune(model, vae_file, material, out, config, **others):
        seen.update(config=config, **others)

    monkeypatch.setattr("star_core.training.finetune.finetune", finetune)
    command = ["train", "--model", "tiny", "--data", str(tmp_path), "--out", str(tmp_path)]
    command += ["--steps", "11"]
    assert main([*command, "--distill", "2"]) == 0
    config, distill = seen["config"], seen["distill"]
    assert (config.trains, config.df.beta, config.df_space) == ("lora", 0.0, "latents")
    facts = (distill.evaluations, distill.solver_steps, distill.pixels, distill.sampler)
    assert facts == (2, 16, 0.0, "euler")
    assert (seen["lora_layers"], seen["lora_controlnet"], seen["teacher"]) == ("all", True, {})
    options = ["--solver-steps", "6", "--pixels", "0.5", "--sampler", "lcm", "--cfg", "5"]
    options += ["--cfg-rescale", "0.1", "--df-beta", "0.25", "--df-space", "pixels"]
    options += ["--lora-layers", "attention", "--no-lora-controlnet"]
    assert main([*command, "--distill", "1", *options]) == 0
    config, distill = seen["config"], seen["distill"]
    assert (config.df.beta, config.df_space) == (0.25, "pixels")
    facts = (distill.evaluations, distill.solver_steps, distill.pixels, distill.sampler)
    assert facts == (1, 6, 0.5, "lcm")
    assert (seen["lora_layers"], seen["lora_controlnet"]) == ("attention", False)
    assert seen["teacher"] == {"cfg": 5.0, "cfg_rescale": 0.1}
    assert main([*command, "--pixels", "0.5"]) == 2
    assert "--pixels belongs to --distill" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    ["upscale", "demo", "download", "info", "convert", "verify", "manifest", "bench", "train"],
)
def test_every_command_explains_itself(capsys, command):
    code, out, err = run(capsys, command, "--help")
    assert (code, err) == (0, "") and out.startswith("usage: star-vsr " + command)


def test_help_imports_nothing_heavy():
    code = "import sys; import star_core.cli as c; c.parser(); print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout == "False\n", result.stderr


# going on


def killed_when(entries: int, command: list[str], folder: Path) -> None:
    """Starts the command line and kills it once its work holds so many entries, or it is done."""
    process = subprocess.Popen([sys.executable, "-m", "star_core", *command], cwd=ROOT)
    while process.poll() is None and len(list(folder.glob("*.safetensors"))) < entries:
        time.sleep(0.01)
    process.kill()
    process.wait()


def test_a_killed_run_goes_on_to_the_same_file_byte_for_byte(tmp_path, capsys):
    source = write_clip(tmp_path / "in.mkv", 20, 12, 16)
    options = ["--scale", "2", "--chunk-frames", "6", "--merge-up-to", "0", "--shots", "7"]
    options += ["--solver-mode", "normal", "--steps", "3"]
    upscaled(capsys, source, tmp_path / "whole.mp4", *options)
    out = tmp_path / "out.mp4"
    for entries in (1, 4):
        killed_when(entries, ["upscale", str(source), str(out), *options], work_folder(out))
        assert not out.exists()
        newest = max(work_folder(out).glob("*.safetensors"), key=lambda p: p.stat().st_mtime)
        newest.write_bytes(newest.read_bytes()[:100])  # as a power cut leaves it
    code, _, err = run(capsys, "upscale", source, out, *options, "--keep-work")
    assert code == 0 and "is damaged" not in err  # that goes to the log
    assert out.read_bytes() == (tmp_path / "whole.mp4").read_bytes()
    assert list(work_folder(out).glob("*.safetensors"))
    upscaled(capsys, source, out, *options, "--overwrite")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.mkv", "out.mp4", "whole.mp4"]


def test_work_of_other_settings_is_not_gone_on_with(tmp_path, capsys):
    source = write_clip(tmp_path / "in.mkv", 3, 12, 16)
    outs = [tmp_path / "a.mkv", tmp_path / "b.mkv"]
    upscaled(capsys, source, outs[0], "--scale", 2, "--seed", 1, "--keep-work")
    upscaled(capsys, source, outs[0], "--scale", 2, "--seed", 2, "--overwrite")
    upscaled(capsys, source, outs[1], "--scale", 2, "--seed", 2)
    assert torch.equal(*map(frames_of, outs))


# memory


def test_a_memory_given_makes_a_plan_that_is_told_and_followed(tmp_path, capsys, monkeypatch):
    import star_core.upscale

    seen, restore = [], star_core.upscale.restore

    def watching(frames, model, vae, shots, canvas, **options):
        seen.extend(shot.execution for shot in shots)
        return restore(frames, model, vae, shots, canvas, **options)

    monkeypatch.setattr("star_core.upscale.restore", watching)
    source = write_clip(tmp_path / "in.mkv", 2, 24, 32)
    command = ("upscale", source, tmp_path / "out.mkv", "--scale", 12)
    code, _, err = run(capsys, *command, "--memory", "20M")
    assert code == 0 and "GiB" in err
    (execution,) = seen
    assert execution.slicing.offload
    assert open_video(tmp_path / "out.mkv").info.width == 384
    assert "leave one of them out" in refused(capsys, *command, "--memory", "1G", "--tile", "256")


# shots


def test_shots_are_named_found_or_read_from_a_file_and_differ_as_it_says(tmp_path, capsys):
    source = write_clip(tmp_path / "in.mkv", 4, 12, 16)
    shots = tmp_path / "shots.json"
    shots.write_text('[{"start": 0, "strength": 0}, {"start": 2, "noise_level": 700}]')
    report = upscaled(capsys, source, tmp_path / "out.mkv", "--scale", 2, "--shots", shots)
    assert [shot["start"] for shot in report["shots"]] == [0, 2]
    assert [shot["sampling"]["noise_level"] for shot in report["shots"]] == [900, 700]
    bicubic = upsample(frames_of(source), (32, 24), "bicubic").clamp(0, 1)
    change = (frames_of(tmp_path / "out.mkv") - bicubic).abs().amax(dim=(1, 2, 3))
    assert (change <= 1 / 255).tolist() == [True, True, False, False]
    report = upscaled(capsys, source, tmp_path / "b.mkv", "--scale", 1, "--shots", "1,3")
    assert [shot["start"] for shot in report["shots"]] == [0, 1, 3]


@pytest.mark.parametrize(
    ("shots", "message"),
    [
        ("9", "no cut at frame 9"),
        ("nowhere.json", "there is no nowhere.json"),
        ([{"start": 1}], "must begin at 0"),
        ([{"start": 0}, {"start": True}], 'shot 2 must be like {"start": 0}'),
        ([{"start": 0, "noise-level": 2000}], "shot 1: noise level must be in [0, 1000], got 2000"),
        ([{"start": 0, "speed": 2}], "shots.json, shot 1, speed: a shot takes start"),
        ([{"start": 0, "strength": 2}], "shots.json, shot 1: strength must be from 0 to 1"),
        ([{"start": 0, "strength": None}], "shot 1, strength: must be a number, not null"),
        ([{"start": 0, "steps": "20"}], 'shot 1, steps: must be an integer, not "20"'),
        ([{"start": 0}, {"start": 1, "cfg": [1]}], "shot 2, cfg: must be a number, not [1]"),
        ([{"start": 0, "prompt": "a cat"}], "learned prompts"),
    ],
)
def test_shots_that_cannot_be_are_refused(tmp_path, capsys, clip, shots, message):
    if not isinstance(shots, str):
        path = tmp_path / "shots.json"
        path.write_text(json.dumps(shots))
        shots = path
    assert message in refused(capsys, "upscale", clip, tmp_path / "o.mkv", "--shots", shots)


# files as they come


@pytest.mark.skipif(os.name == "nt", reason="file names are text there")
def test_a_name_that_is_not_utf8_is_taken(tmp_path, capsys, clip):
    name = tmp_path / os.fsdecode(b"caf\xe9.mkv")
    shutil.copy(clip, name)
    upscaled(capsys, name, tmp_path / "o.mkv", "--scale", 1)


def test_a_name_as_long_as_the_file_system_takes_is_written(tmp_path, capsys, clip):
    out = tmp_path / f"{'影' * 82}.mkv"
    upscaled(capsys, clip, out, "--scale", 1)
    assert out.exists()


def test_hidden_files_are_no_input_and_do_not_undo_finished_work(tmp_path, capsys, clip, caplog):
    frames = tmp_path / "frames"
    upscaled(capsys, clip, frames, "--scale", 1, "--strength", 0)
    out = tmp_path / "o.mkv"
    upscaled(capsys, frames, out, "--scale", 1, "--keep-work")
    for name in (".DS_Store", "._00000.png"):  # the Finder's, and macOS's on network drives
        (frames / name).write_bytes(b"\0\5\26\7\0\2\0\0Mac OS X        ")
    caplog.clear()
    upscaled(capsys, frames, out, "--scale", 1, "--keep-work", "--overwrite")
    assert "continuing with the finished parts" in caplog.text


# documents


def test_the_page_of_the_command_line_is_what_the_parsers_say():
    assert PAGE.read_text(encoding="utf-8") == page()


def test_the_version_is_that_of_the_project(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'version = "{capsys.readouterr().out.split()[1]}"' in project
