"""Model files in the host's folders, the built-in model, and published files fetched on demand."""

import comfy.sd
import folder_paths
from comfy_api.latest import io

from ..star_core.causal_vae import open_vae
from ..star_core.checkpoints import open_model
from ..star_core.known_files import T5
from .host import named
from .host_files import (
    BUILT_IN_NAME,
    MODEL_FOLDERS,
    TEXT_ENCODER_FOLDERS,
    VAE_FOLDERS,
    check_text_encoder,
    choices,
    resolve,
)
from .host_model import WEIGHT_TYPES, load_patcher
from .host_vae import host_vae

MODELS = ("light_deg", "heavy_deg", "cogvideox")
VAES, TEXT_ENCODERS = ("svd_vae", "cogvideox_vae"), ("clip_vit_h", "t5xxl")


class StarLoadModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="STAR_LoadModel",
            display_name="STAR Load Model",
            category="STAR",
            description="Loads STAR's network: the small built-in model, or a file in "
            "models/diffusion_models, models/checkpoints or models/star. Published files that are "
            "missing are fetched when the node runs.",
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=choices(MODEL_FOLDERS, MODELS, built_in=True),
                    tooltip="light_deg for clips that are mildly degraded, heavy_deg for bad ones; "
                    "tiny is small, weak and needs nothing else.",
                ),
                io.Combo.Input(
                    "weight_dtype",
                    options=list(WEIGHT_TYPES),
                    default="default",
                    tooltip="Type of the weights in memory. default: what suits the device. fp8 "
                    "takes half the memory of fp16 and loses some detail.",
                ),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, model_name: str, weight_dtype: str) -> io.NodeOutput:
        with named("STAR Load Model"):
            path = resolve(model_name, MODEL_FOLDERS, built_in=0)
            return io.NodeOutput(load_patcher(open_model(path), weight_dtype))


class StarLoadVAE(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="STAR_LoadVAE",
            display_name="STAR Load VAE",
            category="STAR",
            description="Loads the VAE that belongs to the model: tiny's own, or that of Stable "
            "Video Diffusion, alone or inside a whole checkpoint, in either naming; or that of "
            "CogVideoX. The host's VAE nodes work on it as well.",
            inputs=[
                io.Combo.Input(
                    "vae_name",
                    options=choices(VAE_FOLDERS, VAES, built_in=True),
                    tooltip="tiny for the model tiny, the VAE of Stable Video Diffusion for "
                    "light_deg and heavy_deg.",
                )
            ],
            outputs=[io.Vae.Output()],
        )

    @classmethod
    def execute(cls, vae_name: str) -> io.NodeOutput:
        with named("STAR Load VAE"):
            path = resolve(vae_name, VAE_FOLDERS, built_in=1)
            model = resolve(BUILT_IN_NAME, MODEL_FOLDERS, built_in=0)
            own = {"window": open_model(model).sampling.decode_window}
            return io.NodeOutput(
                host_vae(open_vae(path), **(own if vae_name == BUILT_IN_NAME else {}))
            )


class StarLoadTextEncoder(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="STAR_LoadTextEncoder",
            display_name="STAR Load Text Encoder",
            category="STAR",
            description="Loads the text encoder OpenCLIP ViT-H-14 for light_deg and heavy_deg, or "
            "t5-v1_1-xxl for STAR on CogVideoX. Load CLIP with type stable_diffusion, or pixart "
            "for T5, serves as well; tiny needs none.",
            inputs=[
                io.Combo.Input(
                    "clip_name",
                    options=choices(TEXT_ENCODER_FOLDERS, TEXT_ENCODERS),
                    tooltip="A file in models/text_encoders, models/clip or models/star.",
                )
            ],
            outputs=[io.Clip.Output()],
        )

    @classmethod
    def execute(cls, clip_name: str) -> io.NodeOutput:
        with named("STAR Load Text Encoder"):
            path = resolve(clip_name, TEXT_ENCODER_FOLDERS)
            kind = check_text_encoder(path)
            # Of the types that the host knows for T5, this one masks nothing.
            types = comfy.sd.CLIPType
            clip = comfy.sd.load_clip(
                ckpt_paths=[str(path)],
                embedding_directory=folder_paths.get_folder_paths("embeddings"),
                clip_type=types.PIXART if kind is T5 else types.STABLE_DIFFUSION,
            )
            return io.NodeOutput(clip)
