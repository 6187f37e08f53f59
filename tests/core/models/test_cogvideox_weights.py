"""Names of the second backbone's weights, there and back, and LoRA."""

import pytest
import torch

from star_core.models.cogvideox_dit import CogVideoXDiT
from star_core.models.cogvideox_weights import (
    COGVIDEOX_2B,
    CogVideoXConfig,
    in_diffusers_naming,
    in_sat_naming,
    infer_config,
)

SMALL = CogVideoXConfig(
    in_dim=4, context_dim=12, dim=64, num_heads=2, num_layers=2, time_dim=16, positions="sincos"
)
PREFIX = "model.diffusion_model."
ROTARY = {f"{PREFIX}mixins.pos_embed.freqs_{f}": torch.zeros(3, 32) for f in ("sin", "cos")}
SINCOS = {f"{PREFIX}mixins.pos_embed.pos_embedding": torch.zeros(1, 4, 64)}


@pytest.fixture(scope="module")
def ours():
    torch.manual_seed(0)
    return CogVideoXDiT(SMALL).state_dict()


def test_names_go_to_sats_and_back_with_every_value(ours):
    theirs = in_sat_naming(ours)
    assert not theirs.keys() & ours.keys()
    back = in_diffusers_naming(theirs)
    assert back.keys() == ours.keys()
    assert all(torch.equal(back[key], ours[key]) for key in ours)


def test_diffusers_naming_passes_unchanged(ours):
    assert in_diffusers_naming(ours) is ours


def test_other_networks_and_tables_in_the_file_are_left_out_and_unknown_keys_stay(ours):
    theirs = in_sat_naming(ours) | ROTARY | {
        f"{PREFIX}transformer.position_embeddings.weight": torch.zeros(1),
        "conditioner.embedders.0.transformer.shared.weight": torch.zeros(1),
        "first_stage_model.encoder.conv_in.conv.weight": torch.zeros(1),
        f"{PREFIX}transformer.surprise": torch.zeros(1),
    }  # fmt: skip
    bare = {key.removeprefix(PREFIX): tensor for key, tensor in theirs.items()}
    for file in (theirs, bare):
        assert in_diffusers_naming(file).keys() - ours.keys() == {"transformer.surprise"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lora_is_merged_with_a_scale_of_one_by_its_rank(ours, dtype):
    theirs = {key: tensor.to(dtype) for key, tensor in in_sat_naming(ours).items()}
    rank, stem = 4, f"{PREFIX}transformer.layers.1.attention.query_key_value"
    for end in ("weight", "bias"):
        theirs[f"{stem}.original.{end}"] = theirs.pop(f"{stem}.{end}")
    down, up = torch.randn(2, 3, rank, 64).to(dtype)
    for k in range(3):
        theirs[f"{stem}.matrix_A.{k}"], theirs[f"{stem}.matrix_B.{k}"] = down[k], up[k].T
    merged = in_diffusers_naming(theirs)
    assert merged.keys() == ours.keys()
    for k, name in enumerate(("to_q", "to_k", "to_v")):
        key = f"transformer_blocks.1.attn1.{name}.weight"
        change = up[k].T.float() @ down[k].float() / rank
        expected = (ours[key].to(dtype).float() + change).to(dtype)
        torch.testing.assert_close(merged[key], expected)
        bias = key.replace("weight", "bias")
        torch.testing.assert_close(merged[bias], ours[bias].to(dtype))


@pytest.mark.parametrize(
    "tables, positions", [(ROTARY, "rotary"), (SINCOS, "sincos"), ({}, "rotary")]
)
def test_the_size_is_read_from_the_tensors(ours, tables, positions):
    found = infer_config(in_sat_naming(ours) | tables)
    assert found.positions == positions
    assert (found.dim, found.num_heads, found.num_layers) == (64, 2, 2)
    assert (found.in_dim, found.context_dim, found.time_dim) == (4, 12, 16)


@pytest.mark.parametrize(
    "config, values", [(CogVideoXConfig(), 5_570_483_880), (COGVIDEOX_2B, 1_693_909_752)]
)
def test_published_sizes_have_the_number_of_values_that_the_specification_counts(config, values):
    weights = CogVideoXDiT(config, device="meta").state_dict()
    assert sum(tensor.numel() for tensor in weights.values()) == values
    assert infer_config(in_sat_naming(weights)) == config
