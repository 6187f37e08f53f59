"""Text embeddings by T5 for CogVideoX: 226 tokens without a mask."""

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
    """Encodes prompts with T5."""

    def __init__(self, model: T5EncoderModel, tokenizer: Any, length: int = LENGTH) -> None:
        """tokenizer: of the package `tokenizers`. length: number of tokens of an embedding."""
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.length = length
        self.width: int = model.config.d_model

    def ids(self, prompt: str) -> Tensor:
        """Returns the token ids (1 l) of a prompt: text (cut to fit), end, then zeros."""
        text = self.tokenizer.encode(prompt, add_special_tokens=False).ids
        ids = [*text[: self.length - 1], self.tokenizer.token_to_id(_END)]
        return torch.tensor([ids + [0] * (self.length - len(ids))])

    @torch.no_grad()
    def encode(self, prompt: str) -> Tensor:
        """Returns the embedding (1 l d) of a prompt in the model's dtype.

        Longer prompts are cut. Padding is not masked, as in training.
        """
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
    """Loads a T5 v1.1 encoder.

    path: its file, the first file of one in several parts, or its folder.
    tokenizer: its file or folder; None searches beside the model and in ComfyUI.
    comfyui: the ComfyUI folder, see `checkpoints.find.comfyui_folder`.
    width: width of the embeddings that the network needs, None for any.
    length: number of tokens of an embedding. device, dtype: device and dtype of the weights.
    Raises ValueError for another kind of file, another width, and without a tokenizer.
    """
    files = [open_tensors(part) for part in _parts(Path(path))]
    tensors = {key: tensor for file in files for key, tensor in file.items()}
    if identify(tensors) is not T5:
        raise ValueError(
            f"{path} contains no T5 text encoder, it seems to be a {identify(tensors).title}: use "
            "t5-v1_1-xxl (folder text_encoder of THUDM/CogVideoX-5b, or t5xxl_fp16)"
        )
    tensors = {key.removeprefix("text_encoder."): tensor for key, tensor in tensors.items()}
    tensors.setdefault("shared.weight", tensors.get("encoder.embed_tokens.weight", torch.empty(0)))
    tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"]
    if width is not None and tensors["shared.weight"].shape[-1] != width:
        raise ValueError(
            f"{path} is a T5 of width {tensors['shared.weight'].shape[-1]}, the network needs "
            f"{width}: use t5-v1_1-xxl"
        )
    t5_tokenizer = _tokenizer(tokenizer, Path(path), comfyui)
    # Imported here because it takes seconds.
    from transformers import T5EncoderModel

    with torch.device("meta"):
        model = T5EncoderModel(_config(tensors))
    load_into(model, tensors, device=device, dtype=dtype, name=str(path))
    model.eval().requires_grad_(False)
    return T5TextEncoder(model, t5_tokenizer, length)


def _parts(path: Path) -> list[Path]:
    """Returns the files of a model: one, or all its parts."""
    if path.is_dir():
        folder = path / "text_encoder" if (path / "text_encoder").is_dir() else path
        files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
        if not files:
            raise ValueError(f"{path} contains no weights: name the folder or file of T5")
        path = files[0]
    match = re.fullmatch(r"(.*)-\d+-of-(\d+)(\.\w+)", path.name)
    if match is None:
        return [path]
    stem, count, suffix = match.groups()
    return [
        path.with_name(f"{stem}-{i:0{len(count)}}-of-{count}{suffix}")
        for i in range(1, int(count) + 1)
    ]


def _config(tensors: Mapping[str, Tensor]) -> Any:
    """Returns the config from the shapes of the weights; the rest is that of T5 v1.1."""
    from transformers import T5Config

    attention = "encoder.block.0.layer.0.SelfAttention"
    try:
        vocabulary, width = tensors["shared.weight"].shape
        buckets, heads = tensors[f"{attention}.relative_attention_bias.weight"].shape
        inner = tensors[f"{attention}.q.weight"].shape[0]
        feed_forward = tensors["encoder.block.0.layer.1.DenseReluDense.wi_0.weight"].shape[0]
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"the T5 file is incomplete or older than v1.1 ({error}): use t5-v1_1-xxl"
        ) from None
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
    path: str | os.PathLike[str] | None, model: Path, comfyui: str | os.PathLike[str] | None
) -> Any:
    from tokenizers import Tokenizer

    folder = model if model.is_dir() else model.parent
    root = comfyui_folder(comfyui)
    candidates = [folder / "tokenizer", folder, folder.parent / "tokenizer"]
    if root:
        candidates.append(root / "comfy" / "text_encoders" / "t5_tokenizer")
    if path is not None:
        candidates = [Path(path)]
    for candidate in candidates:
        file = candidate if candidate.is_file() else candidate / "tokenizer.json"
        if file.is_file():
            try:
                tokenizer = Tokenizer.from_file(str(file))
            except Exception as error:  # tokenizers raises plain Exceptions
                raise ValueError(
                    f"{file} is not a tokenizer ({error}): download it again"
                ) from None
            if tokenizer.token_to_id(_END) is None:
                raise ValueError(
                    f"{file} is not a tokenizer of T5, it has no token {_END}: use that of "
                    "t5-v1_1-xxl"
                )
            return tokenizer
        if (candidate / "spiece.model").is_file():
            return _from_spiece(candidate)
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
            f"cannot read {folder / 'spiece.model'} ({error}): pip install sentencepiece, or put "
            "tokenizer.json beside it"
        ) from None
