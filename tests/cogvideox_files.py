"""A small random model of the second backbone as files, as a person would have them."""

import json
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from star_core.backbones import build_network
from star_core.models.cogvideox_weights import CogVideoXConfig
from star_core.sampling_defaults import COGVIDEOX_LATENTS, COGVIDEOX_SAMPLING
from star_core.star_checkpoint import save_model
from star_core.vae.cogvideox import causal_vae

CONFIG = CogVideoXConfig(
    in_dim=4, context_dim=16, context_length=7, dim=32, num_heads=2, num_layers=1, time_dim=16,
    grid=(3, 4),
)  # fmt: skip
SAMPLING = replace(COGVIDEOX_SAMPLING, steps=2, chunk_frames=9)
VAE = {
    "block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 4,
    "latent_channels": 4, "sample_height": 32, "sample_width": 48, "scaling_factor": 0.7,
}  # fmt: skip
WORDS = ["<pad>", "</s>", "<unk>", "a", "good", "video", "bike"]


def write_model(folder: Path) -> Path:
    torch.manual_seed(0)
    path = folder / "star.safetensors"
    save_model(
        path, build_network(CONFIG), sampling=SAMPLING, latents=COGVIDEOX_LATENTS, overwrite=True
    )
    return path


def write_vae(folder: Path) -> Path:
    torch.manual_seed(0)
    path = folder / "cogvideox_vae.safetensors"
    weights = causal_vae(VAE).model.state_dict()
    save_file(weights, path, metadata={"star_vae": json.dumps(VAE)})
    return path


def write_t5(folder: Path, width: int = 16, parts: int = 1) -> Path:
    """As a folder of transformers: weights, perhaps in parts, and a tokenizer of WORDS."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(WORDS), d_model=width, d_kv=8, d_ff=24, num_layers=2, num_heads=2,
        feed_forward_proj="gated-gelu", dropout_rate=0.0,
    )  # fmt: skip
    weights = T5EncoderModel(config).state_dict()
    weights.pop("encoder.embed_tokens.weight", None)
    folder = folder / "t5"
    (folder / "text_encoder").mkdir(parents=True)
    keys = sorted(weights)
    for i in range(parts):
        name = "model.safetensors" if parts == 1 else f"model-{i + 1:05}-of-{parts:05}.safetensors"
        part = {key: weights[key].contiguous().clone() for key in keys[i::parts]}
        save_file(part, folder / "text_encoder" / name)
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    (folder / "tokenizer").mkdir()
    words.save(str(folder / "tokenizer" / "tokenizer.json"))
    return folder
