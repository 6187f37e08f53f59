"""A node that loads a model with its VAE and text encoder: bundled, local, or downloaded."""

from comfy_api.latest import io

from ..star_core.star_checkpoint import open_model
from .host import AUTO, node_errors
from .host_features import advanced, schema
from .host_files import (
    BUILT_IN_NAME,
    DECODER_FOLDERS,
    DOWNLOAD,
    MODEL_FOLDERS,
    TEXT_ENCODER_FOLDERS,
    VAE_FOLDERS,
    choices,
    model_file,
)
from .host_model import WEIGHT_TYPES, load_patcher
from .host_parts import NONE, load_clip, load_vae


class StarLoadModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="STAR_LoadModel",
            display_name="STAR Load Model",
            category="STAR/load",
            search_aliases=["load STAR", "load VAE", "load text encoder", "checkpoint loader"],
            description="Loads a STAR model with its VAE and text encoder: the small built-in "
            "model, or files from ComfyUI's model folders.",
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=choices(MODEL_FOLDERS, BUILT_IN_NAME),
                    tooltip="tiny is small, much weaker than STAR, and needs no other file. "
                    "light_deg is for mildly degraded clips, heavy_deg for badly degraded ones. "
                    "Choices that end in (download) download the file, its VAE and its text "
                    "encoder when the node runs, unless they are already there.",
                ),
                advanced(
                    io.Combo.Input(
                        "weight_dtype",
                        options=list(WEIGHT_TYPES),
                        default=AUTO,
                        tooltip="Data type of the weights in memory. auto chooses by file and "
                        "device and keeps quantised files quantised; the other types unpack them. "
                        "fp8 needs half the memory of fp16 and loses some detail.",
                    )
                ),
                advanced(
                    io.Combo.Input(
                        "vae_name",
                        options=choices(VAE_FOLDERS, AUTO, BUILT_IN_NAME),
                        default=AUTO,
                        tooltip="auto finds the model's VAE in ComfyUI's model folders.",
                    )
                ),
                advanced(
                    io.Combo.Input(
                        "text_encoder",
                        options=choices(TEXT_ENCODER_FOLDERS, AUTO, NONE),
                        default=AUTO,
                        tooltip="auto finds the model's text encoder in ComfyUI's model folders "
                        "and loads nothing for models that need no text. Choose none to use Load "
                        "CLIP instead.",
                    )
                ),
                advanced(
                    io.Combo.Input(
                        "decoder",
                        options=choices(DECODER_FOLDERS, NONE),
                        default=NONE,
                        tooltip="A small decoder that takes the place of the VAE's own, faster and "
                        "in less memory, but less exact: a file in models/vae_approx, made by "
                        "train --trains decoder, or TAESD's, which fits STAR's VAE. none keeps the "
                        "VAE's own.",
                    )
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="The network, for STAR nodes and for ComfyUI's samplers."),
                io.Clip.Output(
                    tooltip="The text encoder, for STAR Text Encode or STAR Restore. Empty for "
                    "models that need no text, such as tiny."
                ),
                io.Vae.Output(tooltip="The VAE, for STAR nodes and for ComfyUI's VAE nodes."),
            ],
        )

    @classmethod
    def execute(cls, model_name, weight_dtype, vae_name, text_encoder, decoder) -> io.NodeOutput:
        with node_errors("STAR Load Model"):
            star = open_model(model_file(model_name))
            model = load_patcher(star, weight_dtype)  # first: it rejects other files
            fetch = model_name.endswith(DOWNLOAD)
            vae = load_vae(star, vae_name, decoder, fetch=fetch)
            return io.NodeOutput(model, load_clip(star, text_encoder, fetch=fetch), vae)
