"""Nodes that prepare the conditioning: text, degradation, and the low-quality video."""

from comfy_api.latest import io

from ..star_core.degradation.estimate import estimate
from ..star_core.degradation.plot import plot
from ..star_core.degradation.recommend import recommend
from ..star_core.text.prompts import DEFAULT_PROMPT, NEGATIVE_PROMPT, POSITIVE_PROMPT
from .host import (
    DegradationType,
    degradation_input,
    model_default,
    node_errors,
    overrides,
    preset_input,
    report_ui,
    scale_input,
    size_inputs,
    strength_input,
    tile_inputs,
    tile_of,
    video_from_images,
)
from .host_conditioning import Prompts, low_quality_latent, prompts_for, target_size, with_hint
from .host_features import advanced, schema
from .host_model import sampling_defaults, star_of


class StarAnalyzeDegradation(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="STAR_AnalyzeDegradation",
            display_name="STAR Analyze Degradation",
            category="STAR/conditioning",
            search_aliases=["blur", "noise level", "compression", "video quality", "auto settings"],
            description="Measures blur, noise and compression of a clip and recommends settings. "
            "Connect the output degradation to the nodes that should use them. A value that you "
            "set in such a node takes precedence.",
            is_output_node=True,
            inputs=[
                io.Image.Input(
                    "images", tooltip="Frames of the original clip, before any resizing."
                ),
                io.Model.Input(
                    "model", tooltip="MODEL from STAR Load Model. The settings are for this model."
                ),
                scale_input(),
            ],
            outputs=[
                DegradationType.Output(
                    "degradation",
                    display_name="degradation",
                    tooltip="The recommended settings, for STAR Text Encode, STAR Conditioning, "
                    "STAR Sampling or STAR Restore.",
                ),
                io.Float.Output(
                    "cfg",
                    display_name="cfg",
                    tooltip="The recommended guidance scale, for CFGGuider.",
                ),
                io.String.Output(
                    "checkpoint",
                    display_name="checkpoint",
                    tooltip="The published model that suits the clip: light_deg or heavy_deg.",
                ),
                io.String.Output(
                    "report",
                    display_name="report",
                    tooltip="The measurements and the recommended settings as text.",
                ),
                io.Image.Output(
                    "plot", display_name="plot", tooltip="The measurements as a bar chart."
                ),
            ],
        )

    @classmethod
    def execute(cls, images, model, scale) -> io.NodeOutput:
        with node_errors("STAR Analyze Degradation"):
            measured = estimate(video_from_images(images)[:, :3])
            settings = recommend(measured, sampling_defaults(model), scale=scale)
        report, bars = f"{measured}\n{settings}", plot(measured).movedim(0, -1)[None]
        outputs = settings, settings.cfg, settings.checkpoint, report, bars
        return io.NodeOutput(*outputs, ui=report_ui(report, bars))


class StarTextEncode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="STAR_TextEncode",
            display_name="STAR Text Encode",
            category="STAR/conditioning",
            search_aliases=["prompt", "CLIP text encode", "positive", "negative"],
            description="Encodes the prompts as STAR expects them: 77 tokens, and parentheses "
            "have no special meaning. Models with learned prompts, such as tiny, need no text.",
            inputs=[
                io.Model.Input("model", tooltip="MODEL from STAR Load Model."),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="CLIP from STAR Load Model, or OpenCLIP ViT-H-14 from Load CLIP. "
                    "Models with learned prompts need none.",
                ),
                degradation_input("Its words are added to the prompts."),
                io.String.Input(
                    "prompt",
                    default=DEFAULT_PROMPT,
                    multiline=True,
                    tooltip="Description of what the video shows.",
                ),
                io.String.Input(
                    "quality_words",
                    default=POSITIVE_PROMPT,
                    multiline=True,
                    tooltip="Description of good image quality, added to the prompt. The default "
                    "is STAR's own text.",
                ),
                io.String.Input(
                    "negative_prompt",
                    default=NEGATIVE_PROMPT,
                    multiline=True,
                    tooltip="Description of what to avoid. The default is STAR's own text.",
                ),
                preset_input(),
            ],
            outputs=[
                io.Conditioning.Output(
                    "positive",
                    display_name="positive",
                    tooltip="The positive prompt, for STAR Conditioning.",
                ),
                io.Conditioning.Output(
                    "negative",
                    display_name="negative",
                    tooltip="The negative prompt, for STAR Conditioning.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls, model, prompt, quality_words, negative_prompt, preset, clip=None, degradation=None
    ) -> io.NodeOutput:
        with node_errors("STAR Text Encode"):
            prompts = prompts_for(
                star_of(model), clip, prompt, quality_words, negative_prompt, preset, degradation
            )
        return io.NodeOutput(*prompts)


class StarConditioning(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="STAR_Conditioning",
            display_name="STAR Conditioning",
            category="STAR/conditioning",
            search_aliases=["upscale video", "ControlNet", "low quality video", "strength"],
            description="Enlarges and encodes the low-quality video and adds it to both prompts. "
            "Sample the output LATENT with the two output conditionings.",
            inputs=[
                io.Conditioning.Input("positive", tooltip="positive from STAR Text Encode."),
                io.Conditioning.Input("negative", tooltip="negative from STAR Text Encode."),
                io.Model.Input(
                    "model", tooltip="MODEL from STAR Load Model. Frames are padded for this model."
                ),
                io.Vae.Input("vae", tooltip="VAE from STAR Load Model."),
                io.Image.Input("images", tooltip="Frames of one clip, in order."),
                degradation_input(
                    "Its strength is multiplied with this node's. A clip with much less detail "
                    "than its size allows is downscaled first; the size of the result stays the "
                    "same."
                ),
                *size_inputs(),
                strength_input(),
                advanced(
                    model_default(
                        io.Combo,
                        "upsampling",
                        options=["bilinear", "bicubic"],
                        tooltip="Interpolation that enlarges the frames before they are encoded.",
                    )
                ),
                *map(advanced, tile_inputs()),
            ],
            outputs=[
                io.Conditioning.Output(
                    "positive_out",
                    display_name="positive",
                    tooltip="The positive prompt with the video, for a guider or KSampler.",
                ),
                io.Conditioning.Output(
                    "negative_out",
                    display_name="negative",
                    tooltip="The negative prompt with the video, for a guider or KSampler.",
                ),
                io.Latent.Output(
                    "latent",
                    display_name="latent",
                    tooltip="The encoded video, for the sampler. It stores the size of the result.",
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
        strength,
        upsampling,
        tile_size,
        tile_overlap,
        degradation=None,
    ) -> io.NodeOutput:
        with node_errors("STAR Conditioning"):
            latent = low_quality_latent(
                model,
                vae,
                images,
                target_size(images, scale, width, height),
                shrink=degradation.shrink if degradation else 1.0,
                tile=tile_of(tile_size, tile_overlap),
                **overrides(upsampling=upsampling),
            )
            strength *= degradation.strength if degradation else 1.0
            prompts = with_hint(Prompts(positive, negative), latent, strength)
        return io.NodeOutput(*prompts, latent)
