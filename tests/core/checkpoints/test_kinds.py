"""Recognising checkpoints by their keys."""

import pytest

from star_core.checkpoints.kinds import identify


@pytest.mark.parametrize(
    "keys, name",
    [
        (
            ["VideoControlNet.input_hint_block.weight", "x.local1.conv1.weight"],
            "star-i2vgenxl",
        ),
        (["VideoControlNet.a", "input_blocks.1.0.temopral_conv.conv1.0.weight"], "venhancer"),
        (["input_blocks.1.0.temopral_conv.conv1.0.weight"], "i2vgenxl-unet"),
        (["model.diffusion_model.mixins.patch_embed.proj_sr.weight"], "star-cogvideox"),
        (["model.diffusion_model.mixins.patch_embed.proj.weight"], "cogvideox-sat"),
        (
            ["patch_embed.text_proj.weight", "transformer_blocks.0.norm1.linear.weight"],
            "cogvideox-diffusers",
        ),
        (["decoder.time_conv_out.weight", "encoder.conv_in.weight"], "vae-temporal-diffusers"),
        (["decoder.conv_out.time_mix_conv.weight"], "vae-temporal-svd"),
        (
            ["model.diffusion_model.a", "first_stage_model.decoder.conv_out.time_mix_conv.weight"],
            "svd",
        ),
        (["decoder.mid_block.resnets.0.conv1.weight"], "vae-image"),
        (["decoder.mid.block_1.conv1.conv.weight"], "vae-cogvideox"),
        (["transformer.resblocks.0.attn.in_proj_weight"], "clip-open_clip"),
        (
            [
                "visual.transformer.resblocks.0.attn.in_proj_weight",
                "transformer.resblocks.0.attn.in_proj_weight",
            ],
            "clip-open_clip",
        ),
        (["visual.transformer.resblocks.0.attn.in_proj_weight"], "clip-vision"),
        (
            [
                "text_model.encoder.layers.0.self_attn.q_proj.weight",
                "text_model.embeddings.token_embedding.weight",
            ],
            "clip-transformers",
        ),
        (["vision_model.encoder.layers.0.self_attn.q_proj.weight"], "clip-vision"),
        (["encoder.block.0.layer.0.SelfAttention.q.weight"], "t5"),
        (["down_blocks.0.attn.lora_A.weight", "decoder.time_conv_out.weight"], "lora"),
        (["lora_unet_input_blocks_1.lora_down.weight"], "lora"),
        (["model.diffusion_model.input_blocks.0.0.weight"], "stable-diffusion"),
        (["weight"], "unknown"),
        ([], "unknown"),
    ],
)
def test_files_are_told_apart_by_their_keys(keys, name):
    assert identify(keys).name == name
