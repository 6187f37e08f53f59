"""What the model is told: text, and the low-quality video."""

from comfy_api.latest import io

from ..star_core.degradation.estimate import estimate
from ..star_core.degradation.plot import plot
from ..star_core.degradation.recommend import recommend
from ..star_core.text.prompts import DEFAULT_PROMPT, NEGATIVE_PROMPT, POSITIVE_PROMPT
from .host import (
    DegradationType,
    as_the_model_says,
    degradation_input,
    named,
    preset_input,
    report_ui,
    size_inputs,
    strength_input,
    tile_inputs,
    tile_of,
    told,
    video_from_images,
)
from .host_conditioning import Prompts, low_quality_latent, prompts_for, target_size, with_hint
from .host_features import advanced, schema
from .host_model import star_of


class StarAnalyzeDegradation(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="STAR_AnalyzeDegradation",
            display_name="STAR Analyze Degradation",
            category="STAR/conditioning",
            search_aliases=["blur", "noise level", "compression", "video quality", "auto settings"],
            description="Measures blur, noise and compression of a clip and recommends settings. "
            "Connect `degradation` to the nodes that should follow it; what you set there by hand "
            "comes first.",
            is_output_node=True,
            inputs=[
                io.Image.Input("images", tooltip="The clip as it came, before any resizing."),
                io.Model.Input("model", tooltip="The STAR model to recommend settings for."),
                io.Float.Input(
                    "scale",
                    default=4.0,
                    min=1.0,
                    max=8.0,
                    step=0.01,
                    tooltip="How much larger the result is to be, as in STAR Conditioning.",
                ),
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
                    tooltip="The published model that fits the clip: light_deg or heavy_deg.",
                ),
                io.String.Output(
                    "report",
                    display_name="report",
                    tooltip="The figures and the recommended settings in words.",
                ),
                io.Image.Output("plot", display_name="plot", tooltip="The figures as bars."),
            ],
        )

    @classmethod
    def execute(cls, images, model, scale) -> io.NodeOutput:
        with named("STAR Analyze Degradation"):
            found = estimate(video_from_images(images)[:, :3])
            settings = recommend(found, star_of(model).sampling, scale=scale)
        report, bars = f"{found}\n{settings}", plot(found).movedim(0, -1)[None]
        shown = report_ui(report, bars)
        return io.NodeOutput(settings, settings.cfg, settings.checkpoint, report, bars, ui=shown)


class StarTextEncode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="STAR_TextEncode",
            display_name="STAR Text Encode",
            category="STAR/conditioning",
            search_aliases=["prompt", "CLIP text encode", "positive", "negative"],
            description="Prompts as STAR reads them: 77 tokens, and parentheses are just "
            "parentheses. A model with learned prompts, such as tiny, takes no text.",
            inputs=[
                io.Model.Input("model", tooltip="The STAR model that the text is for."),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="CLIP from STAR Load Model, or OpenCLIP ViT-H-14 from Load CLIP. A "
                    "model with learned prompts needs none.",
                ),
                degradation_input("its words are added to the prompts."),
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
                    tooltip="What makes the video good; added to the prompt. The words are STAR's "
                    "own.",
                ),
                io.String.Input(
                    "negative_prompt",
                    default=NEGATIVE_PROMPT,
                    multiline=True,
                    tooltip="What the video must not look like. The words are STAR's own.",
                ),
                preset_input(),
            ],
            outputs=[
                io.Conditioning.Output(
                    "positive",
                    display_name="positive",
                    tooltip="What the video shows, for STAR Conditioning.",
                ),
                io.Conditioning.Output(
                    "negative",
                    display_name="negative",
                    tooltip="What it must not look like, for STAR Conditioning.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls, model, prompt, quality_words, negative_prompt, preset, clip=None, degradation=None
    ) -> io.NodeOutput:
        with named("STAR Text Encode"):
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
            description="Enlarges and encodes the low-quality video and hands it to the model, "
            "with both prompts. Sample the LATENT with these two conditionings.",
            inputs=[
                io.Conditioning.Input("positive", tooltip="positive from STAR Text Encode."),
                io.Conditioning.Input("negative", tooltip="negative from STAR Text Encode."),
                io.Model.Input("model", tooltip="The STAR model, for the sizes that it takes."),
                io.Vae.Input("vae", tooltip="VAE from STAR Load Model."),
                io.Image.Input("images", tooltip="Frames of one clip, in order."),
                degradation_input(
                    "its strength multiplies this one, and a clip that is blurred far below its "
                    "size is made smaller first. The size asked for stays."
                ),
                *size_inputs(),
                strength_input(),
                advanced(
                    as_the_model_says(
                        io.Combo,
                        "upsampling",
                        options=["bilinear", "bicubic"],
                        tooltip="How frames are enlarged before they are encoded.",
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
                    tooltip="The video in latents, for the sampler. It remembers the size asked "
                    "for.",
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
        with named("STAR Conditioning"):
            latent = low_quality_latent(
                model,
                vae,
                images,
                target_size(images, scale, width, height),
                shrink=degradation.shrink if degradation else 1.0,
                tile=tile_of(tile_size, tile_overlap),
                **told(upsampling=upsampling),
            )
            strength *= degradation.strength if degradation else 1.0
            prompts = with_hint(Prompts(positive, negative), latent, strength)
        return io.NodeOutput(*prompts, latent)
