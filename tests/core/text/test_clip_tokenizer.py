"""CLIP's tokenizer: the same ids from each vocabulary format, and where it is found."""

import gzip
import json
from importlib.util import find_spec

import pytest

from star_core.text.clip_tokenizer import load_tokenizer
from star_core.text.prompts import NEGATIVE_PROMPT, POSITIVE_PROMPT

needs_vocabulary = pytest.mark.skipif(
    find_spec("open_clip") is None, reason="the vocabulary comes with open-clip-torch"
)


@pytest.fixture(autouse=True)
def no_comfyui(monkeypatch):
    monkeypatch.delenv("COMFYUI_DIR", raising=False)


def write_vocabulary(folder, style):
    """The letters a to e with two merges, in one of the formats that text encoders come with."""
    letters = "abcde"
    merges = [("a", "b"), ("ab", "c</w>")]
    tokens = [*letters, *(x + "</w>" for x in letters), "ab", "abc</w>"]
    vocab = {token: i for i, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    folder.mkdir(parents=True, exist_ok=True)
    if style == "vocab.json":
        (folder / "vocab.json").write_text(json.dumps(vocab))
        lines = ["#version: 0.2", *(" ".join(pair) for pair in merges), ""]
        (folder / "merges.txt").write_text("\n".join(lines))
    else:
        pairs = [list(p) if style == "tokenizer.json pairs" else " ".join(p) for p in merges]
        model = {"type": "BPE", "vocab": vocab, "merges": pairs}
        (folder / "tokenizer.json").write_text(json.dumps({"model": model}))


@pytest.mark.parametrize("style", ["vocab.json", "tokenizer.json pairs", "tokenizer.json lines"])
def test_ids_are_start_text_end_and_zeros(tmp_path, style):
    write_vocabulary(tmp_path, style)
    ids = load_tokenizer(tmp_path)("ABC  ab d", length=9)
    assert ids.tolist() == [[12, 11, 0, 6, 8, 13, 0, 0, 0]]


def test_long_prompts_are_cut_before_the_end_token(tmp_path):
    write_vocabulary(tmp_path, "vocab.json")
    ids = load_tokenizer(tmp_path)("d " * 100)[0].tolist()
    assert ids == [12, *[8] * 75, 13]


@pytest.mark.parametrize("place", [".", "tokenizer", "../tokenizer"])
def test_the_text_encoders_own_tokenizer_comes_first(tmp_path, place):
    home = tmp_path / "text_encoder"
    home.mkdir()
    write_vocabulary(home / place, "vocab.json")
    for text_encoder in (home, home / "model.safetensors"):
        assert load_tokenizer(text_encoder=text_encoder).end == 13


def test_a_comfyui_tree_has_a_tokenizer(tmp_path, monkeypatch):
    write_vocabulary(tmp_path / "comfy" / "sd1_tokenizer", "vocab.json")
    assert load_tokenizer(text_encoder=tmp_path / "elsewhere", comfyui=tmp_path).end == 13
    monkeypatch.setenv("COMFYUI_DIR", str(tmp_path))
    assert load_tokenizer().end == 13


def test_another_models_tokenizer_is_passed_over(tmp_path):
    home = tmp_path / "encoder"
    home.mkdir()
    (home / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0}, "merges": []}}))
    write_vocabulary(tmp_path / "tokenizer", "vocab.json")
    assert load_tokenizer(text_encoder=home).end == 13


def test_without_a_tokenizer_the_three_ways_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr("star_core.text.clip_tokenizer.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="beside the text encoder.*COMFYUI_DIR.*open-clip-torch"):
        load_tokenizer(text_encoder=tmp_path)


def test_a_named_place_without_tokenizer_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="contains no CLIP tokenizer: it needs tokenizer.json"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["vocab.json", "tokenizer.json", "bpe_simple_vocab_16e6.txt.gz"])
def test_a_damaged_tokenizer_is_named(tmp_path, name):
    (tmp_path / "merges.txt").write_text("")
    (tmp_path / name).write_bytes(b"\xff{")
    with pytest.raises(ValueError, match="unreadable.*copy it again"):
        load_tokenizer(tmp_path)


def test_open_clips_list_of_merges_gives_bytes_words_and_special_tokens(tmp_path):
    merges = ["t h", "th e</w>"]
    content = "\n".join(["header", *merges, *["x x"] * 48892, "not used"])
    (tmp_path / "bpe_simple_vocab_16e6.txt.gz").write_bytes(gzip.compress(content.encode()))
    tokenizer = load_tokenizer(tmp_path)
    # Bytes are 0-255 in the order of CLIP's table, the same as word ends 256-511, then merges.
    assert tokenizer("the a! é", length=8).tolist() == [[49406, 513, 320, 256, 127, 358, 49407, 0]]


# What open_clip 3.3.0's SimpleTokenizer gives, with ftfy 6.
OPEN_CLIP_IDS = {
    "": [],
    "a good video": [320, 886, 1455],
    "It’s “quoted” &amp;amp; 3.14": [585, 568, 257, 27706, 257, 261, 274, 269, 272, 275],
    "e\u0301 café, naïve 中文， 😀": [
        4166, 15304, 267, 1097, 35689, 563, 19759, 255, 29032, 485, 267, 7334,
    ],
    "they'LL don't\t\nİ <b> ___ ¹½": [
        889, 1342, 847, 713, 328, 16384, 283, 321, 285, 13530, 126, 373, 33613,
    ],
    "ﬁsh ＡＢＣ": [2759, 5334],
    "a good video" + POSITIVE_PROMPT: [
        320, 886, 1334, 1566, 855, 7900, 267, 1400, 18501, 267, 5302, 12609, 267, 2807, 1996, 320,
        9310, 17805, 337, 3934, 267, 22146, 12609, 1125, 268, 16157, 13162, 7657, 267, 274, 273,
        330, 267, 3140, 19016, 267, 8118, 4414, 267, 8331, 613, 890, 4281, 23163, 267, 3575, 28267,
        23163, 267, 22146, 17126, 1294, 267, 1878, 2193, 561, 37715, 269,
    ],
    NEGATIVE_PROMPT: [
        3086, 267, 2870, 3086, 267, 6052, 267, 3610, 267, 794, 267, 5269, 267, 2870, 3086, 267,
        7651, 267, 14740, 1844, 267, 274, 323, 13024, 267, 15636, 5857, 267, 12102, 2540, 267, 7615,
        267, 15987, 267, 5719, 3027, 267, 1042, 3027, 267, 15479, 267, 2505, 2110, 267, 9189, 267,
        73, 11207, 30249, 267, 561, 6528, 267, 1049, 934, 267, 962, 268, 8990,
    ],
}  # fmt: skip


@needs_vocabulary
def test_ids_are_open_clips():
    tokenizer = load_tokenizer()
    for prompt, ids in OPEN_CLIP_IDS.items():
        expected = [49406, *ids, 49407]
        assert tokenizer(prompt)[0].tolist() == expected + [0] * (77 - len(expected)), prompt
