"""CLIP's byte-pair tokenizer (Radford et al. 2021), from whichever vocabulary is at hand."""

from __future__ import annotations

import gzip
import html
import json
import os
import unicodedata
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoints.find import comfyui_folder

_START, _END = "<|startoftext|>", "<|endoftext|>"
_OPEN_CLIP_FILE = "bpe_simple_vocab_16e6.txt.gz"
# open_clip's file holds more merges than CLIP's 49408 tokens use: 256 bytes, each also as the end
# of a word, and two special tokens are not merges.
_MERGES = 49408 - 2 * 256 - 2
# What ftfy does to sound text: straight quotes, plain ligatures, full-width letters made narrow.
_PLAIN = dict.fromkeys([0x2BC, *range(0x2018, 0x201C)], "'")
_PLAIN |= dict.fromkeys(range(0x201C, 0x2020), '"')
_PLAIN |= {
    code: unicodedata.normalize("NFKC", chr(code))
    for code in (*range(0xFB00, 0xFB05), 0x3000, *range(0xFF01, 0xFFEF))
}


class ClipTokenizer:
    """Prompts to token ids, equal to open_clip's.

    vocab: token -> id, the special tokens included. merges: pairs of tokens, the first merged
    first. open_clip has ftfy repair the text; what that does to sound text is done here too, broken
    encodings are not mended.
    """

    def __init__(self, vocab: dict[str, int], merges: list[tuple[str, str]]) -> None:
        # Not at the top: the package must import without loading transformers' dependencies.
        from tokenizers import Regex, Tokenizer
        from tokenizers.models import BPE
        from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split

        self.start, self.end = vocab[_START], vocab[_END]
        self._bpe = Tokenizer(BPE(vocab=vocab, merges=merges, end_of_word_suffix="</w>"))
        words = Regex(r"(?i)'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+")
        self._bpe.pre_tokenizer = Sequence(
            [
                Split(words, behavior="removed", invert=True),
                ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )

    def __call__(self, prompt: str, length: int = 77) -> Tensor:
        """Ids (1 l), l = length: start, text (cut to fit), end, then zeros."""
        text = html.unescape(html.unescape(unicodedata.normalize("NFC", prompt.translate(_PLAIN))))
        text = " ".join(text.split()).lower()
        ids = [self.start, *self._bpe.encode(text).ids[: length - 2], self.end]
        return torch.tensor([ids + [0] * (length - len(ids))])


def load_tokenizer(
    path: str | os.PathLike[str] | None = None,
    *,
    text_encoder: str | os.PathLike[str] | None = None,
    comfyui: str | os.PathLike[str] | None = None,
) -> ClipTokenizer:
    """The tokenizer at `path` (file or folder), else the first one found.

    Sought in the text encoder's folder, in the ComfyUI tree (see `model_files.comfyui_folder`) and
    in the installed package open-clip-torch. ValueError if there is none.
    """
    if path is not None:
        if (found := _vocabulary_in(Path(path))) is None:
            raise ValueError(
                f"{path} holds no CLIP tokenizer: it needs tokenizer.json, or vocab.json and "
                f"merges.txt, or {_OPEN_CLIP_FILE}"
            )
        return ClipTokenizer(*found)
    places = []
    if text_encoder is not None:
        folder = Path(text_encoder)
        folder = folder if folder.is_dir() else folder.parent
        places += [folder, folder / "tokenizer", folder.parent / "tokenizer"]
    if root := comfyui_folder(comfyui):
        places.append(root / "comfy" / "sd1_tokenizer")
    # Found, not imported: importing open_clip needs torchvision.
    if (package := find_spec("open_clip")) and package.submodule_search_locations:
        places += [Path(place) for place in package.submodule_search_locations]
    for place in places:
        if found := _vocabulary_in(place):
            return ClipTokenizer(*found)
    raise ValueError(
        "no CLIP tokenizer found: put any CLIP model's vocab.json and merges.txt beside the text "
        "encoder, or set COMFYUI_DIR to a ComfyUI folder, or run "
        "`pip install --no-deps open-clip-torch`"
    )


def _vocabulary_in(path: Path) -> tuple[dict[str, int], list[tuple[str, str]]] | None:
    """Tokens and merges of a tokenizer file or folder, None if there are none."""
    folder = path if path.is_dir() else path.parent
    try:
        if (file := path if path.name.endswith(".gz") else folder / _OPEN_CLIP_FILE).is_file():
            return _open_clip_vocabulary(gzip.decompress(file.read_bytes()).decode())
        if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
            lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
            lines = [line for line in lines if line and not line.startswith("#version")]
        elif (folder / "tokenizer.json").is_file():
            model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
            vocab = model["vocab"]
            lines = [line if isinstance(line, str) else " ".join(line) for line in model["merges"]]
        else:
            return None
    except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
        raise ValueError(
            f"the tokenizer in {folder} is unreadable ({error}): copy it again"
        ) from None
    if _START not in vocab or _END not in vocab:
        return None  # some other model's
    return vocab, [_pair(line) for line in lines]


def _open_clip_vocabulary(text: str) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """From the list of merges alone: the ids follow from their order."""
    merges = [_pair(line) for line in text.splitlines()[1 : 1 + _MERGES]]
    # A byte is written as the character of its code if that is visible, else as one from 256 on.
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(byte) for byte in visible]
    letters += [chr(256 + n) for n in range(256 - len(visible))]
    tokens = letters + [letter + "</w>" for letter in letters]
    tokens += ["".join(pair) for pair in merges] + [_START, _END]
    return {token: index for index, token in enumerate(tokens)}, merges


def _pair(line: str) -> tuple[str, str]:
    first, second = line.split()
    return first, second
