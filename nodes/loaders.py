"""A model with its VAE and text encoder: built in, from the host's folders, or fetched."""

import comfy.sd
import folder_paths
from comfy_api.latest import io

from ..star_core.checkpoints import ModelFile, open_model
from ..star_core.known_files import CLIP_OPEN_CLIP, CLIP_TRANSFORMERS, T5
from ..star_core.model import BUILT_IN, check_vae
from ..star_core.networks import backbone_of
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
    part_of_model,
)
from .host_model import WEIGHT_TYPES, load_patcher
from .host_vae import load_host_vae, star_vae

NONE = "none"


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
                        "device. fp8 takes half the memory of fp16 and loses some detail.",
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


def load_vae(star: ModelFile, name: str, *, fetch: bool) -> comfy.sd.VAE:
    """The VAE of a choice; "auto" is the built-in one for a model of its latents."""
    own_model, own_vae = BUILT_IN["tiny"]
    own = open_model(own_model)
    if name == AUTO and (own.config.in_dim, own.latents) == (star.config.in_dim, star.latents):
        name = BUILT_IN_NAME
    if name == BUILT_IN_NAME:
        path = own_vae
    else:
        kinds = backbone_of(star.config).vae
        path = part_of_model(name, "vae_name", VAE_FOLDERS, kinds, fetch=fetch)
    window = star.sampling.decode_window
    vae = load_host_vae(path, scale=star.latents.scale, window=window)
    check_vae(star_vae(vae).video_vae, star.config, star.latents)
    return vae


def load_clip(star: ModelFile, name: str, *, fetch: bool) -> comfy.sd.CLIP | None:
    """The text encoder of a choice; None for a model that takes no text."""
    if name == NONE or (name == AUTO and star.prompts is not None):
        return None
    kinds = tuple(
        kind
        for kind in backbone_of(star.config).text_encoder
        if kind in (CLIP_OPEN_CLIP, CLIP_TRANSFORMERS, T5)  # the host finds it in no other file
    )
    path = part_of_model(
        name,
        "text_encoder",
        TEXT_ENCODER_FOLDERS,
        kinds,
        fetch=fetch,
        width=star.config.context_dim,
    )
    # Of the types that the host knows for T5, this one masks nothing.
    types = comfy.sd.CLIPType
    return comfy.sd.load_clip(
        ckpt_paths=[str(path)],
        embedding_directory=folder_paths.get_folder_paths("embeddings"),
        clip_type=types.PIXART if T5 in kinds else types.STABLE_DIFFUSION,
    )
