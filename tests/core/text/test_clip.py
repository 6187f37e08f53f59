"""Text encoder: equal to open_clip's formula from either naming, STAR's prompts."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from star_core.checkpoints.find import find_text_encoder
from star_core.text.clip import _used_layers, load_text_encoder
from star_core.text.prompts import NEGATIVE_PROMPT, POSITIVE_PROMPT, join_prompt
from tests.paths import GOLDEN

WIDTH, LAYERS, VOCABULARY = 128, 3, 600


def open_clip_weights(layers=LAYERS, width=WIDTH) -> dict[str, Tensor]:
    """A text tower in open_clip's naming with weights large enough to matter."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape, scale=1.0):
        return torch.randn(shape, generator=generator) * scale

    weights = {
        "token_embedding.weight": random(VOCABULARY, width),
        "positional_embedding": random(77, width),
        "ln_final.weight": random(width),
        "ln_final.bias": random(width),
        "text_projection": random(width, width),
        "logit_scale": random(),
    }
    for i in range(layers):
        block = f"transformer.resblocks.{i}."
        for name, out, inputs in (
            ("attn.in_proj_", 3 * width, width),
            ("attn.out_proj.", width, width),
            ("mlp.c_fc.", 4 * width, width),
            ("mlp.c_proj.", width, 4 * width),
        ):
            weights[f"{block}{name}weight"] = random(out, inputs, scale=2 * inputs**-0.5)
            weights[f"{block}{name}bias"] = random(out)
        for name in ("ln_1", "ln_2"):
            weights[f"{block}{name}.weight"] = random(width)
            weights[f"{block}{name}.bias"] = random(width)
    return weights


def open_clip_embedding(w: dict[str, Tensor], ids: Tensor, layers: int) -> Tensor:
    """Specification, section 4, in plain operations: ids (l,) -> (l d) after `layers` blocks."""

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], w[name + ".weight"], w[name + ".bias"])

    x = w["token_embedding.weight"][ids] + w["positional_embedding"][: len(ids)]
    later = torch.ones(len(ids), len(ids)).triu(1).bool()
    for i in range(layers):
        b = f"transformer.resblocks.{i}."
        h = norm(x, b + "ln_1") @ w[b + "attn.in_proj_weight"].T + w[b + "attn.in_proj_bias"]
        q, k, v = (p.unflatten(1, (-1, 64)).transpose(0, 1) for p in h.chunk(3, dim=1))
        scores = (q @ k.transpose(1, 2) / 8).masked_fill(later, -torch.inf)
        h = (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)
        x = x + h @ w[b + "attn.out_proj.weight"].T + w[b + "attn.out_proj.bias"]
        h = norm(x, b + "ln_2") @ w[b + "mlp.c_fc.weight"].T + w[b + "mlp.c_fc.bias"]
        h = 0.5 * h * (1 + torch.erf(h / 2**0.5))
        x = x + h @ w[b + "mlp.c_proj.weight"].T + w[b + "mlp.c_proj.bias"]
    return norm(x, "ln_final")


def in_transformers_naming(w: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    names = {
        "embeddings.token_embedding.weight": w["token_embedding.weight"],
        "embeddings.position_embedding.weight": w["positional_embedding"],
        "final_layer_norm.weight": w["ln_final.weight"],
        "final_layer_norm.bias": w["ln_final.bias"],
    }
    for i in range(layers):
        theirs, ours = f"transformer.resblocks.{i}.", f"encoder.layers.{i}."
        for kind in ("weight", "bias"):
            for letter, part in zip("qkv", w[f"{theirs}attn.in_proj_{kind}"].chunk(3), strict=True):
                names[f"{ours}self_attn.{letter}_proj.{kind}"] = part
            for a, b in (
                ("attn.out_proj", "self_attn.out_proj"),
                ("mlp.c_fc", "mlp.fc1"),
                ("mlp.c_proj", "mlp.fc2"),
                ("ln_1", "layer_norm1"),
                ("ln_2", "layer_norm2"),
            ):
                names[f"{ours}{b}.{kind}"] = w[f"{theirs}{a}.{kind}"]
    return names


@pytest.fixture(scope="module")
def weights():
    return open_clip_weights()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with a tokenizer of single characters, outside of any ComfyUI."""
    monkeypatch.delenv("COMFYUI_DIR", raising=False)
    letters = [chr(c) for c in range(33, 127)]
    tokens = [
        *letters,
        *(letter + "</w>" for letter in letters),
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    vocab = {token: index for index, token in enumerate(tokens)}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    return tmp_path


def saved(path: Path, tensors: dict[str, Tensor]) -> Path:
    torch.save({key: tensor.clone() for key, tensor in tensors.items()}, path)
    return path


def under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + key: tensor for key, tensor in tensors.items()}


IMAGE_TOWER = {
    "visual.transformer.resblocks.0.attn.in_proj_weight": torch.ones(3, 1),
    "visual.ln_post.weight": torch.ones(2),
    "vision_model.encoder.layers.0.self_attn.q_proj.weight": torch.ones(2, 2),
}
# The same text tower as the files that carry it name it.
LAYOUTS = {
    "open_clip": lambda w, hf: w,
    "open_clip with image tower": lambda w, hf: {**IMAGE_TOWER, **w},
    "open_clip custom text": lambda w, hf: {**IMAGE_TOWER, **under("text.", w)},
    "Stable Diffusion 2": lambda w, hf: {
        "model.diffusion_model.out.2.bias": torch.ones(4),
        **under("cond_stage_model.model.", w),
    },
    "transformers 5": lambda w, hf: hf,
    "transformers 4": lambda w, hf: {
        **under("text_model.", hf),
        "text_model.embeddings.position_ids": torch.arange(77)[None],
        "text_projection.weight": torch.ones(2, 2),
    },
    "transformers CLIPModel": lambda w, hf: {**IMAGE_TOWER, **under("text_model.", hf)},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_embedding_is_open_clips_penultimate_layer_in_every_naming(folder, weights, layout, caplog):
    tensors = LAYOUTS[layout](weights, in_transformers_naming(weights, LAYERS))
    encoder = load_text_encoder(saved(folder / "clip.pt", tensors))
    embedding = encoder.encode("A good Video!")
    ids = encoder.tokenizer("A good Video!")[0]
    assert embedding.shape == (1, 77, WIDTH) and not caplog.records
    expected = open_clip_embedding(weights, ids, LAYERS - 1)
    # Float32 in another order of summation, at values up to 10.
    torch.testing.assert_close(embedding[0], expected, atol=1e-4, rtol=1e-4)


def test_a_vit_h_that_comes_without_its_last_layer_keeps_all_others():
    weights = {f"encoder.layers.{i}.layer_norm1.bias": torch.empty(0) for i in range(23)}
    assert _used_layers(weights, 1024) == 23
    assert (
        _used_layers(weights | {"encoder.layers.23.layer_norm1.bias": torch.empty(0)}, 1024) == 23
    )
    assert _used_layers(weights, 768) == 22


def test_weights_of_the_skipped_layer_do_not_matter(folder, weights):
    changed = {k: v + 1 if ".resblocks.2." in k else v for k, v in weights.items()}
    one, other = (
        load_text_encoder(saved(folder / f"{name}.pt", w)).encode("a b")
        for name, w in (("one", weights), ("other", changed))
    )
    assert torch.equal(one, other)


def test_the_encoder_has_the_type_and_no_gradient(folder, weights):
    encoder = load_text_encoder(saved(folder / "clip.pt", weights), dtype=torch.bfloat16)
    assert encoder.encode("a").dtype == torch.bfloat16
    assert not any(p.requires_grad or p.is_meta for p in encoder.parameters())
    assert not any(b.is_meta for b in encoder.buffers())


def test_a_folder_is_searched_for_the_encoder(folder, weights):
    saved(folder / "aa.pt", {"other": torch.ones(1)})
    saved(folder / "clip.pt", weights)
    assert load_text_encoder(find_text_encoder(folder)).width == WIDTH


def test_a_file_of_another_kind_or_width_is_refused(folder, weights):
    with pytest.raises(ValueError, match="no CLIP text encoder.*T5 text encoder.*ViT-H-14"):
        key = "encoder.block.0.layer.0.SelfAttention.q.weight"
        load_text_encoder(saved(folder / "t5.pt", {key: torch.ones(1)}))
    with pytest.raises(ValueError, match="width 128, the network needs 1024"):
        load_text_encoder(saved(folder / "clip.pt", weights), width=1024)


@pytest.mark.parametrize("key", ["positional_embedding", "transformer.resblocks.1.mlp.c_fc.bias"])
def test_an_incomplete_file_names_what_is_missing(folder, weights, key):
    rest = {name: tensor for name, tensor in weights.items() if name != key}
    with pytest.raises(
        ValueError, match=r"'e\S+(position_embedding.weight|1.mlp.fc1.bias)' is missing"
    ):
        load_text_encoder(saved(folder / "clip.pt", rest))


def test_unknown_parts_of_the_text_tower_are_reported(folder, weights, caplog):
    extra = {"transformer.resblocks.0.ls_1.gamma": torch.ones(WIDTH)}
    load_text_encoder(saved(folder / "clip.pt", weights | extra))
    assert "unexpected keys are ignored" in caplog.text and "ls_1.gamma" in caplog.text


def test_a_tokenizer_with_more_tokens_than_the_encoder_is_refused(folder, weights):
    weights = weights | {"token_embedding.weight": weights["token_embedding.weight"][:100]}
    with pytest.raises(ValueError, match="has 100 tokens.*use the tokenizer"):
        load_text_encoder(saved(folder / "clip.pt", weights))


def test_prompts_are_stars():
    vector = GOLDEN / "i2vgenxl" / "prompts.json"
    prompts = json.loads(vector.read_text(encoding="utf-8"))["data"]
    assert (prompts["positive"], prompts["negative"]) == (POSITIVE_PROMPT, NEGATIVE_PROMPT)


@pytest.mark.parametrize(
    "prompt, separator, joined",
    [
        ("a dog", "", "a dogCinematic"),
        ("a dog", ", ", "a dog, Cinematic"),
        ("", ", ", "Cinematic"),
        ("", "", "Cinematic"),
    ],
)
def test_prompts_are_joined_by_the_separator_where_there_are_two(prompt, separator, joined):
    assert join_prompt(prompt, "Cinematic", separator) == joined
    assert join_prompt(prompt, "", separator) == prompt
