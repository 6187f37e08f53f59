"""What the model is told: text, and the low-quality video."""

from comfy_api.latest import io

from ..star_core.text import DEFAULT_PROMPT, NEGATIVE_PROMPT, POSITIVE_PROMPT
from .host import named, tile_inputs, tile_of
from .host_conditioning import (
    Prompts,
    low_quality_latent,
    prompts_for,
    target_size,
    with_hint,
)
from .host_model import star_of

UPSAMPLINGS = {"model": None, "bilinear": "bilinear", "bicubic": "bicubic"}


class StarTextEncode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="STAR_TextEncode",
            display_name="STAR Text Encode",
            category="STAR",
            description="Prompts as STAR reads them: 77 tokens, and parentheses are just "
            "parentheses. A model with learned prompts, such as tiny, takes no text.",
            inputs=[
                io.Model.Input("model", tooltip="The STAR model that the text is for."),
                io.String.Input(
                    "prompt",
                    default=DEFAULT_PROMPT,
                    multiline=True,
                    tooltip="What the video shows.",
                ),
                io.String.Input(
                    "quality_words",
                    default=POSITIVE_PROMPT,
                    multiline=True,
                    tooltip="What makes it good; added to the prompt. These are STAR's.",
                ),
                io.String.Input(
                    "negative_prompt",
                    default=NEGATIVE_PROMPT,
                    multiline=True,
                    tooltip="What it must not look like. These are STAR's.",
                ),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="OpenCLIP ViT-H-14, of STAR Load Text Encoder or of Load CLIP. A "
                    "model with learned prompts needs none.",
                ),
            ],
            outputs=[
                io.Conditioning.Output("positive", tooltip="For STAR Conditioning."),
                io.Conditioning.Output("negative", tooltip="For STAR Conditioning."),
            ],
        )

    @classmethod
    def execute(cls, model, prompt, quality_words, negative_prompt, clip=None) -> io.NodeOutput:
        with named("STAR Text Encode"):
            star = star_of(model)
            prompts = prompts_for(star, clip, prompt, quality_words, negative_prompt)
        return io.NodeOutput(*prompts)


class StarConditioning(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="STAR_Conditioning",
            display_name="STAR Conditioning",
            category="STAR",
            description="Enlarges and encodes the low-quality video and hands it to the model, "
            "with both prompts. Sample the LATENT with these two conditionings.",
            inputs=[
                io.Conditioning.Input("positive", tooltip="Of STAR Text Encode."),
                io.Conditioning.Input("negative", tooltip="Of STAR Text Encode."),
                io.Model.Input("model", tooltip="The STAR model, for the sizes that it takes."),
                io.Vae.Input("vae", tooltip="The VAE of STAR Load VAE."),
                io.Image.Input("images", tooltip="Frames of one clip, in order."),
                io.Float.Input(
                    "scale",
                    default=4.0,
                    min=1.0,
                    max=8.0,
                    step=0.01,
                    tooltip="How much larger the result is; 1 restores at the same size.",
                ),
                io.Int.Input(
                    "width",
                    default=0,
                    min=0,
                    max=16384,
                    tooltip="Width of the result, instead of scale. 0: follows from the height, "
                    "or from scale.",
                ),
                io.Int.Input(
                    "height",
                    default=0,
                    min=0,
                    max=16384,
                    tooltip="Height of the result, instead of scale. 0: follows from the width, "
                    "or from scale.",
                ),
                io.Combo.Input(
                    "upsampling",
                    options=list(UPSAMPLINGS),
                    default="model",
                    tooltip="How frames are enlarged before they are encoded. model: as the "
                    "model was trained.",
                ),
                *tile_inputs(),
            ],
            outputs=[
                io.Conditioning.Output("positive_out", display_name="positive"),
                io.Conditioning.Output("negative_out", display_name="negative"),
                io.Latent.Output(
                    "latent", tooltip="The video in latents; it remembers the size asked for."
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        positive,
        negative,
        model,
        vae,
        images,
        scale,
        width,
        height,
        upsampling,
        tile_size,
        tile_overlap,
    ) -> io.NodeOutput:
        with named("STAR Conditioning"):
            if upsampling not in UPSAMPLINGS:
                raise ValueError(f"unknown upsampling {upsampling!r}: use {', '.join(UPSAMPLINGS)}")
            latent = low_quality_latent(
                model,
                vae,
                images,
                target_size(images, scale, width, height),
                upsampling=UPSAMPLINGS[upsampling],
                tile=tile_of(tile_size, tile_overlap),
            )
            prompts = with_hint(Prompts(positive, negative), latent)
        return io.NodeOutput(*prompts, latent)
