"""CLIP's byte-pair tokenizer (Radford et al. 2021), from any of the published vocabulary files."""

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
# open_clip's file has more merges than CLIP uses. Of CLIP's 49408 tokens, 256 bytes, the same at
# the end of a word, and two special tokens are not merges.
_MERGES = 49408 - 2 * 256 - 2
# What ftfy does to intact text: straight quotes, no ligatures, full-width letters made narrow.
_PLAIN = dict.fromkeys([0x2BC, *range(0x2018, 0x201C)], "'")
_PLAIN |= dict.fromkeys(range(0x201C, 0x2020), '"')
_PLAIN |= {
    code: unicodedata.normalize("NFKC", chr(code))
    for code in (*range(0xFB00, 0xFB05), 0x3000, *range(0xFF01, 0xFFEF))
}


class ClipTokenizer:
    """Converts prompts to the token ids that open_clip gives.

    open_clip cleans text with ftfy. The same is done here, except that text with a broken encoding
    is not repaired.
    """

    def __init__(self, vocab: dict[str, int], merges: list[tuple[str, str]]) -> None:
        """vocab: token -> id, with the special tokens. merges: pairs of tokens, in order."""
        # Imported here because `import star_core` must not load optional packages.
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
        """Returns the ids (1 l) of a prompt: start, text (cut to fit), end, then zeros.

        length: l.
        """
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
    """Loads a CLIP tokenizer.

    path: its file or folder. None searches the folder of `text_encoder`, the ComfyUI folder (see
    `checkpoints.find.comfyui_folder`) and the installed package open-clip-torch, in this order.
    Raises ValueError if there is no tokenizer, or if its files are damaged.
    """
    if path is not None:
        if (vocabulary := _vocabulary_in(Path(path))) is None:
            raise ValueError(
                f"{path} contains no CLIP tokenizer: it needs tokenizer.json, or vocab.json and "
                f"merges.txt, or {_OPEN_CLIP_FILE}"
            )
        return ClipTokenizer(*vocabulary)
    folders = []
    if text_encoder is not None:
        folder = Path(text_encoder)
        folder = folder if folder.is_dir() else folder.parent
        folders += [folder, folder / "tokenizer", folder.parent / "tokenizer"]
    if root := comfyui_folder(comfyui):
        folders.append(root / "comfy" / "sd1_tokenizer")
    # Not imported, because importing open_clip needs torchvision.
    if (package := find_spec("open_clip")) and package.submodule_search_locations:
        folders += [Path(folder) for folder in package.submodule_search_locations]
    for folder in folders:
        if vocabulary := _vocabulary_in(folder):
            return ClipTokenizer(*vocabulary)
    raise ValueError(
        "no CLIP tokenizer found: put any CLIP model's vocab.json and merges.txt beside the text "
        "encoder, or set COMFYUI_DIR to a ComfyUI folder, or run "
        "`pip install --no-deps open-clip-torch`"
    )


def _vocabulary_in(path: Path) -> tuple[dict[str, int], list[tuple[str, str]]] | None:
    """Returns the tokens and merges of a tokenizer's file or folder, None if there are none."""
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
        return None  # the tokenizer of another model
    return vocab, [_pair(line) for line in lines]


def _open_clip_vocabulary(text: str) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Makes tokens and merges from a list of merges, whose order gives the ids."""
    merges = [_pair(line) for line in text.splitlines()[1 : 1 + _MERGES]]
    # A byte is written as the character with its code if that is visible, else as one from 256 up.
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(byte) for byte in visible]
    letters += [chr(256 + n) for n in range(256 - len(visible))]
    tokens = letters + [letter + "</w>" for letter in letters]
    tokens += ["".join(pair) for pair in merges] + [_START, _END]
    return {token: index for index, token in enumerate(tokens)}, merges


def _pair(line: str) -> tuple[str, str]:
    first, second = line.split()
    return first, second
