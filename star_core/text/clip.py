"""Text embeddings by the text tower of OpenCLIP ViT-H (specification, section 4)."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..checkpoints.kinds import identify
from ..checkpoints.tensors import load_into, open_tensors
from .clip_tokenizer import ClipTokenizer, load_tokenizer

if TYPE_CHECKING:
    from transformers import CLIPTextModel


class ClipTextEncoder(nn.Module):
    """Encodes prompts with CLIP's text tower."""

    def __init__(self, model: CLIPTextModel, tokenizer: ClipTokenizer) -> None:
        """model: without the layers that STAR skips."""
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.width: int = model.config.hidden_size
        self.length: int = model.config.max_position_embeddings

    @torch.no_grad()
    def encode(self, prompt: str) -> Tensor:
        """Returns the embedding (1 l d), l = 77, of a prompt in the model's dtype.

        Longer prompts are cut. Padding is not masked, as in training.
        """
        ids = self.tokenizer(prompt, self.length).to(self.model.device)
        return self.model(input_ids=ids).last_hidden_state


def load_text_encoder(
    path: str | os.PathLike[str],
    *,
    tokenizer: str | os.PathLike[str] | None = None,
    comfyui: str | os.PathLike[str] | None = None,
    width: int | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> ClipTextEncoder:
    """Loads a CLIP text encoder in open_clip's or transformers' naming.

    path: a file, which may also contain an image tower or be a whole Stable Diffusion 2 checkpoint;
    `checkpoints.find.find_text_encoder` finds it in a folder.
    tokenizer: its file or folder. comfyui: the ComfyUI folder. Both: see `load_tokenizer`.
    width: width of the embeddings that the network needs, None for any.
    device, dtype: device and dtype of the weights.
    Raises ValueError for a file without a text encoder of that width, an incomplete file, and a
    missing or wrong tokenizer.
    """
    file = open_tensors(path)
    towers = list(_text_towers(file))
    if not towers:
        raise ValueError(
            f"{path} contains no CLIP text encoder, it seems to be a {identify(file).title}: use "
            "that of OpenCLIP ViT-H-14, laion2b_s32b_b79k"
        )
    widths = [tower["embeddings.token_embedding.weight"].shape[1] for tower in towers]
    if width is not None and width not in widths:
        raise ValueError(
            f"{path} is a text encoder of width {widths[0]}, the network needs {width}: use that "
            "of OpenCLIP ViT-H-14, laion2b_s32b_b79k"
        )
    tensors = towers[0 if width is None else widths.index(width)]
    clip_tokenizer = load_tokenizer(tokenizer, text_encoder=path, comfyui=comfyui)
    # Imported here because it takes seconds and models with learned prompts do not need it.
    from transformers import CLIPTextConfig, CLIPTextModel

    try:
        vocabulary, width = tensors["embeddings.token_embedding.weight"].shape
        config = CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=tensors["encoder.layers.0.mlp.fc1.weight"].shape[0],
            num_hidden_layers=_used_layers(tensors, width),
            num_attention_heads=max(1, width // 64),
            max_position_embeddings=tensors["embeddings.position_embedding.weight"].shape[0],
            hidden_act="gelu",
            bos_token_id=clip_tokenizer.start,
            eos_token_id=clip_tokenizer.end,
            pad_token_id=0,
        )
    except KeyError as error:
        raise ValueError(f"{path} is incomplete: {error} is missing; download it again") from None
    if clip_tokenizer.end >= vocabulary:
        raise ValueError(
            f"{path} has {vocabulary} tokens, but the last one of the tokenizer is "
            f"{clip_tokenizer.end}: use the tokenizer of this text encoder"
        )
    with torch.device("meta"):
        model = CLIPTextModel(config)
    # In transformers 4 the tower is an attribute of the model, in 5 it is the model.
    tower = getattr(model, "text_model", model)
    used = {k: tensor for k, tensor in tensors.items() if _layer(k) < config.num_hidden_layers}
    load_into(tower, used, device=device, dtype=dtype, name=str(path))
    # This buffer is in no file, so it is still on the meta device.
    positions = torch.arange(config.max_position_embeddings, device=device)[None]
    tower.get_submodule("embeddings").register_buffer("position_ids", positions, persistent=False)
    model.eval().requires_grad_(False)
    return ClipTextEncoder(model, clip_tokenizer)


def _layer(key: str) -> int:
    """Returns the layer that a weight belongs to, -1 for none."""
    match = re.match(r"encoder\.layers\.(\d+)\.", key)
    return int(match[1]) if match else -1


def _used_layers(tensors: Mapping[str, Tensor], width: int) -> int:
    """Returns the number of layers without the last, which STAR skips.

    The ViT-H in Stable Diffusion 2 lacks that layer already.
    """
    layers = 1 + max(map(_layer, tensors))
    return layers if (width, layers) == (1024, 23) else layers - 1


_FIRST_WEIGHT = {
    "open_clip": r"^(?!.*visual\.)(.*\b|)transformer\.resblocks\.0\.attn\.in_proj_weight$",
    "transformers": r"^(?!.*vision_model\.)(.*\b|)encoder\.layers\.0\.self_attn\.q_proj\.weight$",
}
# open_clip's names -> transformers'.
_RENAMES = {
    "positional_embedding": "embeddings.position_embedding.weight",
    "token_embedding.": "embeddings.token_embedding.",
    "ln_final.": "final_layer_norm.",
    "transformer.resblocks.": "encoder.layers.",
    ".ln_1.": ".layer_norm1.",
    ".ln_2.": ".layer_norm2.",
    ".attn.": ".self_attn.",
    ".mlp.c_fc.": ".mlp.fc1.",
    ".mlp.c_proj.": ".mlp.fc2.",
}


def _text_towers(file: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Yields the text towers in a file, each in transformers' naming without prefix."""
    for naming, pattern in _FIRST_WEIGHT.items():
        for prefix in [match[1] for key in file if (match := re.match(pattern, key))]:
            tower = {k.removeprefix(prefix): v for k, v in file.items() if k.startswith(prefix)}
            if naming == "open_clip":
                tower = dict(_renamed(tower))
            tower = {
                key: tensor
                for key, tensor in tower.items()
                if key.startswith(("embeddings.", "encoder.", "final_layer_norm."))
                and key != "embeddings.position_ids"
            }
            if "embeddings.token_embedding.weight" in tower:
                yield tower


def _renamed(tower: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for key, tensor in tower.items():
        for theirs, ours in _RENAMES.items():
            key = key.replace(theirs, ours)
        if ".in_proj_" in key:
            for letter, weight in zip("qkv", tensor.chunk(3), strict=True):
                yield key.replace(".in_proj_", f".{letter}_proj."), weight
        else:
            yield key, tensor
