import shutil

import pytest
import torch

from star_core.checkpoints.tensors import open_tensors
from star_core.cli import main
from star_core.lora import open_lora
from star_core.model import BUILT_IN
from star_core.star_checkpoint import load_model
from tests.films import write_shards


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("clips"))


def arguments(shards, out, *more):
    common = ["train", "--model", "tiny", "--data", str(shards), "--out", str(out), "--steps", "2"]
    data = ["--clip-frames", "2", "--size", "32x24", "--recipe", "fixed-mild", "--workers", "0"]
    return [*common, *data, *more]


def test_star_training_of_a_model_file_writes_a_model_that_loads(shards, tmp_path):
    more = ["--validate", str(shards), "--bf16", "--checkpointing", "--learning-rate", "0.01"]
    assert main(arguments(shards, tmp_path, *more)) == 0
    trained = load_model(tmp_path / "model.safetensors")
    given = load_model(BUILT_IN["tiny"][0])
    assert (trained.config, trained.sampling) == (given.config, given.sampling)
    old, new = given.network.state_dict(), trained.network.state_dict()
    changed = {key for key in old if not torch.equal(old[key], new[key])}
    assert changed and all("VideoControlNet" in k or ".local" in k for k in changed)
    assert list((tmp_path / "validation").glob("*.mp4"))


def test_a_published_model_and_its_vae_are_found(shards, tmp_path, capsys):
    for folder, name, source in zip(
        ("diffusion_models", "vae"), ("light_deg", "svd_vae"), BUILT_IN["tiny"], strict=True
    ):
        (tmp_path / "models" / folder).mkdir(parents=True)
        shutil.copyfile(source, tmp_path / "models" / folder / f"{name}.safetensors")
    command = arguments(shards, tmp_path / "out", "--models-dir", str(tmp_path / "models"))
    command[2] = "light_deg"
    assert main(command) == 0
    assert load_model(tmp_path / "out" / "model.safetensors").prompts is not None
    assert "1/2 index 1/1" in capsys.readouterr().err


def test_a_lora_is_written_alone(shards, tmp_path):
    assert main(arguments(shards, tmp_path, "--trains", "lora", "--rank", "2")) == 0
    lora = open_tensors(tmp_path / "lora.safetensors")
    assert all(".lora_" in key or key.endswith(".alpha") for key in lora)
    assert not (tmp_path / "model.safetensors").exists()


def test_a_distilled_lora_says_how_it_is_sampled(shards, tmp_path, capsys):
    options = ["--distill", "2", "--solver-steps", "4", "--cfg", "1.5", "--rank", "2"]
    assert main(arguments(shards, tmp_path, *options, "--no-lora-controlnet")) == 0
    lora = open_lora(tmp_path / "lora.safetensors")
    assert lora.sampling == {
        "steps": 2,
        "solver_mode": "normal",
        "sampler": "euler",
        "cfg": 1.0,
        "cfg_mode": "constant",
        "noise_level": 900,
    }
    assert any(down.ndim == 4 for _, down, _ in lora.changes.values())
    assert not any(name.startswith("VideoControlNet") for name in lora.changes)
    assert main(arguments(shards, tmp_path, "--distill", "2", "--trains", "star")) == 2
    assert "--trains" in capsys.readouterr().err


def test_a_second_stage_goes_on_with_the_lora_of_the_first(shards, tmp_path, capsys):
    options = ["--distill", "1", "--cfg", "1.5", "--rank", "2", "--learning-rate", "0.01"]
    assert main(arguments(shards, tmp_path / "first", *options)) == 0
    first = tmp_path / "first" / "lora.safetensors"
    options = [*options[:-1], "1e-8", "--lora", str(first), "--adversarial", "0.1"]
    assert main(arguments(shards, tmp_path / "second", *options)) == 0
    before, after = (
        open_lora(tmp_path / each / "lora.safetensors") for each in ("first", "second")
    )
    assert after.sampling == before.sampling and after.changes.keys() == before.changes.keys()
    for name, (up, down, scale) in before.changes.items():
        torch.testing.assert_close(after.changes[name][0], up, atol=1e-4, rtol=1e-2)
        torch.testing.assert_close(after.changes[name][1], down, atol=1e-4, rtol=1e-2)
        assert after.changes[name][2] == scale
    assert any(up.any() for up, _, _ in before.changes.values())
    for more, word in (
        (["--rank", "3"], "--rank"),
        (["--lora-layers", "attention"], "--lora-layers"),
        (["--adversarial", "-1"], "at least 0"),
        (["--lora", "none.safetensors"], "none.safetensors"),
    ):
        assert main(arguments(shards, tmp_path / "other", *options, *more)) == 2
        assert word in capsys.readouterr().err
    assert main(arguments(shards, tmp_path / "other", "--lora", str(first))) == 2
    assert "--trains lora" in capsys.readouterr().err
    assert main(arguments(shards, tmp_path / "other", "--adversarial", "1")) == 2
    assert "belongs to --distill" in capsys.readouterr().err


def test_sizes_that_do_not_fit_and_missing_options_are_told(shards, tmp_path, capsys):
    for command in (arguments(shards, tmp_path), ["train", "--model", "tiny", "--plan"]):
        assert main([*command, "--size", "32x32"]) == 2
        assert "choose --size 32x40, or less by multiples of 16" in capsys.readouterr().err
    assert main(arguments(shards, tmp_path, "--sharp", "0.5")) == 2
    assert "--built-in" in capsys.readouterr().err
    assert main(["train", "--model", "tiny", "--data", "x"]) == 2
    assert "--out, --steps" in capsys.readouterr().err
    assert (
        main(
            arguments(shards, tmp_path)[:2]
            + ["nothing.pt", "--data", "x", "--out", "y", "--steps", "1"]
        )
        == 2
    )
    assert "nothing.pt" in capsys.readouterr().err


def test_the_plan_tells_memory_and_work_without_training(tmp_path, capsys):
    plan = ["train", "--model", "tiny", "--plan", "--clip-frames", "2", "--size", "32x24"]
    assert main(plan) == 0
    out = capsys.readouterr().out
    assert "PFLOP a step" in out and "GiB on the first GPU" in out and "VAE" in out
    assert "4 cores" in out
    for option, value in (("--vae", "none.pt"), ("--data", "none"), ("--model", "none.pt")):
        assert main([*plan, option, value]) == 2
        assert value in capsys.readouterr().err
