"""Loads the VAE and the text encoder of a model as the host's VAE and CLIP."""

import comfy.sd
import folder_paths

from ..star_core.backbones import backbone_of
from ..star_core.checkpoints.kinds import CLIP_OPEN_CLIP, CLIP_TRANSFORMERS, T5
from ..star_core.model import BUILT_IN, check_vae
from ..star_core.star_checkpoint import ModelFile, open_model
from .host import AUTO
from .host_files import (
    BUILT_IN_NAME,
    DECODER_FOLDERS,
    TEXT_ENCODER_FOLDERS,
    VAE_FOLDERS,
    part_of_model,
    resolve,
)
from .host_vae import load_host_vae, star_vae

NONE = "none"


def load_vae(star: ModelFile, name: str, decoder: str, *, fetch: bool) -> comfy.sd.VAE:
    """Returns the VAE of a choice; "auto" is the built-in VAE for a model with its latents.

    decoder: the choice of a small decoder in place of the VAE's own, "none" for that. fetch:
    download the published VAE if "auto" finds none. ValueError if the VAE or the decoder does not
    fit.
    """
    tiny_model, tiny_vae = BUILT_IN["tiny"]
    tiny = open_model(tiny_model)
    if name == AUTO and (tiny.config.in_dim, tiny.latents) == (star.config.in_dim, star.latents):
        name = BUILT_IN_NAME
    if name == BUILT_IN_NAME:
        path = tiny_vae
    else:
        kinds = backbone_of(star.config).vae
        channels = star.config.in_dim
        path = part_of_model(name, "vae_name", VAE_FOLDERS, kinds, fetch=fetch, channels=channels)
    small = None if decoder == NONE else resolve(decoder, DECODER_FOLDERS, ())
    window = star.sampling.decode_window
    vae = load_host_vae(path, decoder=small, scale=star.latents.scale, window=window)
    check_vae(star_vae(vae).video_vae, star.config, star.latents)
    return vae


def load_clip(star: ModelFile, name: str, *, fetch: bool) -> comfy.sd.CLIP | None:
    """Returns the text encoder of a choice; None for "none" and for a model that needs no text.

    fetch: download the published text encoder if "auto" finds none.
    """
    if name == NONE or (name == AUTO and star.prompts is not None):
        return None
    kinds = tuple(
        kind
        for kind in backbone_of(star.config).text_encoder
        if kind in (CLIP_OPEN_CLIP, CLIP_TRANSFORMERS, T5)  # the host loads no other kind
    )
    path = part_of_model(
        name,
        "text_encoder",
        TEXT_ENCODER_FOLDERS,
        kinds,
        fetch=fetch,
        width=star.config.context_dim,
    )
    # The host has several types for T5; this one does not mask the padding.
    types = comfy.sd.CLIPType
    return comfy.sd.load_clip(
        ckpt_paths=[str(path)],
        embedding_directory=folder_paths.get_folder_paths("embeddings"),
        clip_type=types.PIXART if T5 in kinds else types.STABLE_DIFFUSION,
    )
