"""A model with its VAE and text encoder: built in, from the host's folders, or fetched."""

from comfy_api.latest import io

from ..star_core.star_checkpoint import open_model
from .host import AUTO, named
from .host_features import advanced, schema
from .host_files import (
    BUILT_IN_NAME,
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
            description="Loads a STAR model with the VAE and the text encoder that belong to it: "
            "the small built-in one, or files of ComfyUI's model folders.",
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=choices(MODEL_FOLDERS, BUILT_IN_NAME),
                    tooltip="tiny is small, weak and needs no other file. light_deg is for mildly "
                    "degraded clips, heavy_deg for bad ones. A choice that ends in (download) "
                    "fetches the file when the node runs, unless it is there, and the VAE and text "
                    "encoder with it.",
                ),
                advanced(
                    io.Combo.Input(
                        "weight_dtype",
                        options=list(WEIGHT_TYPES),
                        default=AUTO,
                        tooltip="Type of the weights in memory. auto: what suits the file and the "
                        "device; a quantised file stays so, and the other choices unpack it. fp8 "
                        "takes half the memory of fp16 and loses some detail.",
                    )
                ),
                advanced(
                    io.Combo.Input(
                        "vae_name",
                        options=choices(VAE_FOLDERS, AUTO, BUILT_IN_NAME),
                        default=AUTO,
                        tooltip="auto: the VAE that belongs to the model, wherever it lies in "
                        "ComfyUI's model folders.",
                    )
                ),
                advanced(
                    io.Combo.Input(
                        "text_encoder",
                        options=choices(TEXT_ENCODER_FOLDERS, AUTO, NONE),
                        default=AUTO,
                        tooltip="auto: the text encoder that belongs to the model, wherever it "
                        "lies in ComfyUI's model folders; none is loaded for a model that takes no "
                        "text. none: for those who use Load CLIP.",
                    )
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="The network, for STAR nodes and for ComfyUI's samplers."),
                io.Clip.Output(
                    tooltip="The text encoder, for STAR Text Encode or STAR Restore. Empty for a "
                    "model that takes no text, such as tiny."
                ),
                io.Vae.Output(tooltip="The VAE, for STAR nodes and for ComfyUI's VAE nodes."),
            ],
        )

    @classmethod
    def execute(cls, model_name, weight_dtype, vae_name, text_encoder) -> io.NodeOutput:
        with named("STAR Load Model"):
            star = open_model(model_file(model_name))
            model = load_patcher(star, weight_dtype)  # first: it tells what is no STAR network
            fetch = model_name.endswith(DOWNLOAD)
            vae = load_vae(star, vae_name, fetch=fetch)
            return io.NodeOutput(model, load_clip(star, text_encoder, fetch=fetch), vae)
