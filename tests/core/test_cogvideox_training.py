"""Training of the second backbone: it starts, learns one clip, saves."""

import torch

from star_core.backbones import COGVIDEOX_LATENTS
from star_core.checkpoints import load_model, save_model
from star_core.losses import DFLossConfig
from star_core.networks import build_network
from star_core.training.objective import Sample, TrainConfig
from star_core.training.trainer import choose_trained, train
from tests.cogvideox_files import CONFIG, SAMPLING


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
        OneClip(), network, config, tmp_path, write=write,
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
