"""Training of the second backbone: it starts, learns one clip, saves."""

from fractions import Fraction

import pytest
import torch

from star_core.backbones import build_network
from star_core.checkpoints.tensors import open_tensors
from star_core.cli import main
from star_core.losses import DFLossConfig
from star_core.sampling_defaults import COGVIDEOX_LATENTS
from star_core.star_checkpoint import load_model, save_model
from star_core.training.dataset import ClipFilter, make_dataset
from star_core.training.objective import Sample, TrainConfig, TrainingObjective
from star_core.training.plan import plan_training
from star_core.training.trainer import choose_trained, train
from star_core.video_io import open_sink
from tests.cogvideox_files import CONFIG, SAMPLING, write_model, write_t5, write_vae


class OneClip:
    """Restored latents that are half the low-quality ones, and a text."""

    def sample(self, generator):
        lq = torch.randn(4, 3, 6, 8, generator=torch.Generator().manual_seed(1))
        return Sample(hq=lq / 2, lq=lq, text=torch.zeros(7, 16))


def test_the_loss_falls_on_one_clip_and_the_network_is_saved(tmp_path):
    torch.manual_seed(0)
    network, seen = build_network(CONFIG), []

    def write(out, network, prompts, step):
        save_model(
            out / "star.safetensors", network, sampling=SAMPLING, latents=COGVIDEOX_LATENTS,
            overwrite=True,
        )  # fmt: skip

    config = TrainConfig(
        steps=80, batch=2, learning_rate=5e-3, warmup=5, noise_level=1000,
        df=DFLossConfig(beta=0.0),
    )  # fmt: skip
    train(
        OneClip(), TrainingObjective(network, config), tmp_path, write=write,
        on_step=lambda step, steps, parts: seen.append(parts["velocity"]),
    )  # fmt: skip
    assert sum(seen[-10:]) < 0.6 * sum(seen[:10])
    assert load_model(tmp_path / "star.safetensors").config == CONFIG


def test_what_star_trains_are_patches_gates_and_the_last_layer():
    network = build_network(CONFIG)
    choose_trained(network, "star")
    trained = {name.split(".weight")[0] for name, p in network.named_parameters()
               if p.requires_grad and name.endswith("weight")}  # fmt: skip
    assert trained == {
        "patch_embed.proj", "norm_out.linear", "norm_out.norm", "proj_out",
        "transformer_blocks.0.spa_local.conv1", "transformer_blocks.0.temp_local.conv1",
    }  # fmt: skip


def train_command(folder, out, *more):
    files = ["--model", write_model(folder), "--vae", write_vae(folder)]
    text = folder / "t5"
    files += ["--text-encoder", text if text.exists() else write_t5(folder)]
    what = [
        "--data",
        folder / "shards",
        "--out",
        out,
        "--steps",
        2,
        "--recipe",
        "fixed-mild",
        "--workers",
        0,
    ]
    size = ["--clip-frames", 5, "--size", "32x32", "--interval", 1, "--df-space", "latents"]
    return [str(word) for word in ("train", *files, *what, *size, *more)]


@pytest.fixture
def shards(tmp_path):
    videos = tmp_path / "videos"
    videos.mkdir()
    columns = torch.arange(48) / 5
    with open_sink(videos / "a.mkv", width=48, height=32, fps=Fraction(25)) as sink:
        for index in range(6):
            sink.write((0.5 + 0.4 * torch.sin(columns + index / 3)).expand(3, 32, 48))
    (videos / "a.txt").write_text("a good bike")
    make_dataset(videos, tmp_path / "shards", ClipFilter(length=(5, 6), size=(32, 32), detail=0.0))
    return tmp_path


def test_the_command_trains_both_backbones_alike(shards, tmp_path):
    command = train_command(
        shards, tmp_path / "out", "--validate", shards / "shards", "--checkpointing"
    )
    assert main([*command, "--learning-rate", "0.01"]) == 0
    given = load_model(tmp_path / "star.safetensors")
    trained = load_model(tmp_path / "out" / "model.safetensors")
    assert (trained.config, trained.sampling, trained.latents) == (
        given.config, given.sampling, given.latents,
    )  # fmt: skip
    old = given.network.state_dict()
    learned = torch.load(tmp_path / "out" / "state-0000002.pt", weights_only=True)["trained"]
    new = {key.removeprefix("network."): value for key, value in learned.items()}
    assert all(any(part in key for part in given.network.star_parts) for key in new)
    assert all((value != old[key]).any() for key, value in new.items() if "proj" in key)
    assert list((tmp_path / "out" / "validation").glob("*.mp4"))


def test_a_lora_of_the_second_backbone_covers_its_attention(shards, tmp_path):
    assert main(train_command(shards, tmp_path / "out", "--trains", "lora", "--rank", "2")) == 0
    lora = open_tensors(tmp_path / "out" / "lora.safetensors")
    assert "diffusion_model.transformer_blocks.0.attn1.to_q.lora_up.weight" in lora
    assert not any("local" in key for key in lora)


def test_what_the_second_backbones_vae_cannot_do_is_told(shards, tmp_path, capsys):
    assert main(train_command(shards, tmp_path / "out", "--df-space", "pixels")) == 2
    assert "--df-space latents" in capsys.readouterr().err
    assert main(train_command(shards, tmp_path / "out", "--clip-frames", "6")) == 2
    assert "a multiple of 4 more, got 6" in capsys.readouterr().err


def test_the_plan_of_training_counts_the_second_backbone(tmp_path, capsys):
    plan = ["train", "--plan", "--clip-frames", "5", "--size", "64x32", "--checkpointing"]
    model = ["--model", str(write_model(tmp_path))]
    assert main([*plan, *model]) == 2
    assert "no VAE found" in capsys.readouterr().err
    files = ["--vae", str(write_vae(tmp_path)), "--text-encoder", str(write_t5(tmp_path))]
    assert main([*plan, *model, *files]) == 0
    parameters = sum(p.numel() for p in build_network(CONFIG, device="meta").parameters())
    assert f"{parameters / 1e6:,.1f} M parameters" in capsys.readouterr().out
    work = [
        plan_training(CONFIG, frames=3, height=4, width=6, checkpointing=again).flops
        for again in (False, True)
    ]
    assert 0 < work[0] < work[1]
