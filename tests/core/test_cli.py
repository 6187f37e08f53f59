"""Tests what the command line says, and which options it hands on."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from star_core.cli import main
from star_core.diffusion.shortcuts import FAST, Shortcuts
from star_core.lora import add_lora, lora_layers, write_lora
from star_core.model import BUILT_IN
from star_core.star_checkpoint import load_model
from star_core.video_io import open_video
from star_core.windows.tiling import Tile
from tests.cli_page import PAGE, page
from tests.command_line import frames_of, refused, run, settings_of, shot_of, upscaled, write_clip
from tests.paths import ROOT


def test_progress_goes_to_stderr_with_time_left_and_nothing_to_stdout(tmp_path, capsys, clip):
    code, out, err = run(capsys, "upscale", clip, tmp_path / "out.mkv", "--scale", 1)
    assert (code, out) == (0, "")
    assert "encode 3/3" in err and "denoise 1/1" in err and "0:00 left" in err


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
        (["--cache", "0.02"], Shortcuts(cache=0.02)),
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
    def train_tiny(
        data, out, *, steps, seed, start, sharp, metric_weights, bf16, on_step, on_progress
    ):
        on_progress("VAE", 3, 3)
        assert start == tmp_path and sharp == 0.5 and metric_weights is None and not bf16
        on_step(steps, steps, {"velocity": float(seed)})

    monkeypatch.setattr("star_core.training.tiny.train_tiny", train_tiny)
    where = ["--data", tmp_path, "--out", tmp_path / "out", "--start", tmp_path, "--sharp", 0.5]
    code, out, err = run(capsys, "train", "--built-in", *where, "--steps", 7, "--seed", 3)
    assert (code, out, err) == (0, "", "2/3 VAE 3/3\nstep 7/7, velocity 3.0000, 0:00 left\n")


@pytest.mark.parametrize("given", [False, True], ids=["defaults", "options"])
def test_train_hands_its_options_to_the_training_of_a_model(tmp_path, monkeypatch, given):
    seen = {}

    def finetune(model, vae_file, material, out, config, **others):
        seen.update(material=material, config=config, **others)

    monkeypatch.setattr("star_core.training.finetune.finetune", finetune)
    options = ["--bf16", "--checkpointing", "--df-alpha", "0.5", "--df-beta", "3"]
    options += ["--interval", "5", "--df-space", "latents", "--batch", "4", "--every", "7"]
    options += ["--clip-frames", "9", "--size", "640x360", "--learning-rate", "0.25", "--rank", "3"]
    options += ["--recipe", "light", "--trains", "lora", "--seed", "8", "--accumulate", "3"]
    options += ["--workers", "2", "--optimizer", "muon", "--warmup", "6", "--decay-from", "10"]
    options += ["--weight-decay", "0.5", "--average-on-cpu", "--keep", "12"]
    command = ["train", "--model", "tiny", "--data", str(tmp_path), "--out", str(tmp_path)]
    assert main([*command, "--steps", "11", *(options if given else [])]) == 0
    config, material = seen["config"], seen["material"]
    facts = [config.bf16, config.checkpointing, config.df.alpha, config.df.beta, config.df_space]
    facts += [config.batch, config.learning_rate, config.trains, config.seed, config.steps]
    sample, execution = material.sample, seen["execution"]
    facts += [sample.interval, sample.frames, sample.size, material.recipe.name]
    facts += [seen["every"], seen["rank"], config.optimizer, config.warmup, config.decay_from]
    facts += [config.weight_decay, execution.workers, execution.accumulate]
    facts += [execution.average_on_cpu, execution.keep]
    assert facts == (
        [True, True, 0.5, 3.0, "latents", 4, 0.25, "lora", 8, 11]
        + [5, 9, (360, 640), "light", 7, 3, "muon", 6, 10, 0.5, 2, 3, True, 12]
        if given
        else [False, False, 2.0, 1.0, "pixels", 1, 5e-5, "star", 0, 11]
        + [2, 32, (720, 1280), "heavy", 500, 16, "adamw", 0, None, 0.01, 4, 1, False, 2]
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


# documents


def test_the_page_of_the_command_line_is_what_the_parsers_say():
    assert PAGE.read_text(encoding="utf-8") == page()


def test_the_version_is_that_of_the_project(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'version = "{capsys.readouterr().out.split()[1]}"' in project
