"""Prompts to embeddings by T5, as CogVideoX reads them: 226 tokens, none of them masked."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..checkpoints.find import comfyui_folder
from ..checkpoints.kinds import T5, identify
from ..checkpoints.tensors import load_into, open_tensors

if TYPE_CHECKING:
    from transformers import T5EncoderModel

LENGTH = 226
_END = "</s>"


class T5TextEncoder(nn.Module):
    """model: transformers' T5EncoderModel. tokenizer: of `tokenizers`. length: of embeddings."""

    def __init__(self, model: T5EncoderModel, tokenizer: Any, length: int = LENGTH) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.length = length
        self.width: int = model.config.d_model

    def ids(self, prompt: str) -> Tensor:
        """Token ids (1 l): the text, cut to fit, its end, then zeros."""
        text = self.tokenizer.encode(prompt, add_special_tokens=False).ids
        ids = [*text[: self.length - 1], self.tokenizer.token_to_id(_END)]
        return torch.tensor([ids + [0] * (self.length - len(ids))])

    @torch.no_grad()
    def encode(self, prompt: str) -> Tensor:
        """Embedding (1 l d) in the model's dtype; padding takes part, as in training."""
        ids = self.ids(prompt).to(self.model.device)
        return self.model(input_ids=ids).last_hidden_state


def load_t5(
    path: str | os.PathLike[str],
    *,
    tokenizer: str | os.PathLike[str] | None = None,
    comfyui: str | os.PathLike[str] | None = None,
    width: int | None = None,
    length: int = LENGTH,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
) -> T5TextEncoder:
    """Load a T5 v1.1 encoder from a file, or from the folder or the first file of one in parts.

    tokenizer: file or folder; None seeks it beside the model and in ComfyUI. width: that the
    network asks for. Raises ValueError for another kind of file, another width, no tokenizer.
    """
    files = [open_tensors(part) for part in _parts(Path(path))]
    tensors = {key: tensor for file in files for key, tensor in file.items()}
    if identify(tensors) is not T5:
        raise ValueError(
            f"{path} has no T5 text encoder, it seems to be a {identify(tensors).title}: CogVideoX "
            "takes t5-v1_1-xxl (folder text_encoder of THUDM/CogVideoX-5b, or t5xxl_fp16)"
        )
    tensors = {key.removeprefix("text_encoder."): tensor for key, tensor in tensors.items()}
    tensors.setdefault("shared.weight", tensors.get("encoder.embed_tokens.weight", torch.empty(0)))
    tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"]
    if width is not None and tensors["shared.weight"].shape[-1] != width:
        raise ValueError(
            f"{path} is a T5 of width {tensors['shared.weight'].shape[-1]}, the network needs "
            f"{width}: CogVideoX takes t5-v1_1-xxl"
        )
    words = _tokenizer(tokenizer, Path(path), comfyui)
    # Not at the top: it takes seconds.
    from transformers import T5EncoderModel

    with torch.device("meta"):
        model = T5EncoderModel(_config(tensors))
    load_into(model, tensors, device=device, dtype=dtype, name=str(path))
    model.eval().requires_grad_(False)
    return T5TextEncoder(model, words, length)


def _parts(path: Path) -> list[Path]:
    """The files of a model: one, or all parts of it."""
    if path.is_dir():
        folder = path / "text_encoder" if (path / "text_encoder").is_dir() else path
        found = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
        if not found:
            raise ValueError(f"{path} holds no weights: name the folder or file of T5")
        path = found[0]
    match = re.fullmatch(r"(.*)-\d+-of-(\d+)(\.\w+)", path.name)
    if match is None:
        return [path]
    stem, count, suffix = match.groups()
    return [
        path.with_name(f"{stem}-{i:0{len(count)}}-of-{count}{suffix}")
        for i in range(1, int(count) + 1)
    ]


def _config(tensors: Mapping[str, Tensor]) -> Any:
    """What shapes tell; the rest is that of T5 v1.1."""
    from transformers import T5Config

    attention = "encoder.block.0.layer.0.SelfAttention"
    try:
        vocabulary, width = tensors["shared.weight"].shape
        buckets, heads = tensors[f"{attention}.relative_attention_bias.weight"].shape
        inner = tensors[f"{attention}.q.weight"].shape[0]
        feed_forward = tensors["encoder.block.0.layer.1.DenseReluDense.wi_0.weight"].shape[0]
    except (KeyError, ValueError) as error:
        raise ValueError(f"the T5 file is incomplete or of T5 before v1.1: {error}") from None
    layers = (re.match(r"encoder\.block\.(\d+)\.", key) for key in tensors)
    return T5Config(
        vocab_size=vocabulary,
        d_model=width,
        d_kv=inner // heads,
        d_ff=feed_forward,
        num_layers=1 + max(int(match[1]) for match in layers if match),
        num_heads=heads,
        relative_attention_num_buckets=buckets,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
    )


def _tokenizer(
    given: str | os.PathLike[str] | None, model: Path, comfyui: str | os.PathLike[str] | None
) -> Any:
    from tokenizers import Tokenizer

    folder = model if model.is_dir() else model.parent
    root = comfyui_folder(comfyui)
    places = [folder / "tokenizer", folder, folder.parent / "tokenizer"]
    if root:
        places.append(root / "comfy" / "text_encoders" / "t5_tokenizer")
    if given is not None:
        places = [Path(given)]
    for place in places:
        file = place if place.is_file() else place / "tokenizer.json"
        if file.is_file():
            try:
                words = Tokenizer.from_file(str(file))
            except Exception as error:  # tokenizers raises plain Exceptions
                raise ValueError(f"{file} is no tokenizer ({error}): download it again") from None
            if words.token_to_id(_END) is None:
                raise ValueError(f"{file} is no tokenizer of T5: it has no token {_END}")
            return words
        if (place / "spiece.model").is_file():
            return _from_spiece(place)
    raise ValueError(
        "no tokenizer of T5 found: put tokenizer.json of t5-v1_1-xxl (or the folder tokenizer of "
        f"THUDM/CogVideoX-5b) beside {model}"
    )


def _from_spiece(folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder)).backend_tokenizer
    except (ImportError, ValueError) as error:
        raise ValueError(
            f"{folder / 'spiece.model'} needs a package to be read ({error}): "
            "pip install sentencepiece, or put tokenizer.json beside it"
        ) from None
