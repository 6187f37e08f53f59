"""Prompts for the second backbone: tokens, padding, files."""

import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import T5EncoderModel

from star_core.text.t5 import load_t5
from tests.cogvideox_files import WORDS, write_t5, write_vae


def ids(prompt, length=7):
    words = [WORDS.index(w) if w in WORDS else 2 for w in prompt.split()][: length - 1]
    return [*words, 1, *[0] * (length - 1 - len(words))]


@pytest.mark.parametrize("prompt", ["", "a good video", "a bike unknown", "a " * 20])
def test_prompts_are_cut_ended_and_padded(tmp_path, prompt):
    encoder = load_t5(write_t5(tmp_path), length=7)
    assert encoder.ids(prompt).tolist() == [ids(prompt)]


@pytest.mark.parametrize("parts", [1, 3])
def test_embeddings_are_those_of_transformers_without_a_mask(tmp_path, parts):
    folder = write_t5(tmp_path, parts=parts)
    encoder = load_t5(folder, length=7, dtype=torch.float32)
    theirs = encoder.model
    assert isinstance(theirs, T5EncoderModel)
    out = encoder.encode("a good bike")
    assert out.shape == (1, 7, 16)
    with torch.no_grad():
        given = torch.tensor([ids("a good bike")])
        torch.testing.assert_close(out, theirs(input_ids=given).last_hidden_state)
        masked = theirs(input_ids=given, attention_mask=(given > 0).long()).last_hidden_state
    assert not torch.allclose(out, masked)
    if parts > 1:
        first = folder / "text_encoder" / "model-00001-of-00003.safetensors"
        again = load_t5(first, length=7, dtype=torch.float32).encode("a good bike")
        torch.testing.assert_close(again, out)


def test_it_is_loaded_in_bfloat16(tmp_path):
    assert load_t5(write_t5(tmp_path), length=7).encode("").dtype == torch.bfloat16


def test_the_scaled_fp8_file_that_people_have_is_unpacked(tmp_path):
    folder = write_t5(tmp_path)
    path = folder / "text_encoder" / "model.safetensors"
    wanted = load_t5(folder, length=7, dtype=torch.float32).encode("a good bike")
    tensors = load_file(path)
    for key in [key for key in tensors if re.search(r"(SelfAttention|Dense\w+)\.", key)]:
        scale = tensors[key].abs().max() / 448
        tensors[key] = (tensors[key] / scale).to(torch.float8_e4m3fn)
        tensors[key.removesuffix("weight") + "scale_weight"] = scale
    tensors["scaled_fp8"] = torch.empty(0).to(torch.float8_e4m3fn)
    save_file(tensors, path)
    found = load_t5(folder, length=7, dtype=torch.float32).encode("a good bike")
    # Rounded to four bits each weight is off by up to 6 %; without its scale the text is another.
    assert 0 < (found - wanted).norm() / wanted.norm() < 0.1


def test_other_files_and_sizes_are_refused(tmp_path):
    with pytest.raises(ValueError, match="contains no T5 text encoder.*3D VAE"):
        load_t5(write_vae(tmp_path))
    folder = write_t5(tmp_path)
    with pytest.raises(ValueError, match="width 16, the network needs 4096"):
        load_t5(folder, width=4096)
    (folder / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="no tokenizer of T5 found"):
        load_t5(folder)
