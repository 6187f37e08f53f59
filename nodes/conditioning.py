"""What the model is told: text, and the low-quality video."""

from comfy_api.latest import io

from ..star_core.checkpoints import FAITHFUL
from ..star_core.degradation.estimate import estimate, plot
from ..star_core.degradation.recommend import recommend
from ..star_core.text import DEFAULT_PROMPT, NEGATIVE_PROMPT, POSITIVE_PROMPT, join_prompt
from .host import (
    DegradationType,
    named,
    preset_input,
    report_ui,
    size_inputs,
    tile_inputs,
    tile_of,
    video_from_images,
)
from .host_conditioning import (
    Prompts,
    low_quality_latent,
    prompts_for,
    target_size,
    with_hint,
)
from .host_model import star_of

UPSAMPLINGS = {"model": None, "bilinear": "bilinear", "bicubic": "bicubic"}


class StarAnalyzeDegradation(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="STAR_AnalyzeDegradation",
            display_name="STAR Analyze Degradation",
            category="STAR",
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
                    "STAR Guidance, STAR Scheduler or STAR Restore.",
                ),
                io.Float.Output(
                    "cfg", display_name="cfg", tooltip="The recommended guidance scale."
                ),
                io.String.Output(
                    "checkpoint", display_name="checkpoint", tooltip="light_deg or heavy_deg."
                ),
                io.String.Output(
                    "report", display_name="report", tooltip="Figures and settings in words."
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
                preset_input(),
                DegradationType.Input(
                    "degradation",
                    optional=True,
                    tooltip="Of STAR Analyze Degradation: its words are added to the prompts.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(
                    "positive", display_name="positive", tooltip="For STAR Conditioning."
                ),
                io.Conditioning.Output(
                    "negative", display_name="negative", tooltip="For STAR Conditioning."
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        model,
        prompt,
        quality_words,
        negative_prompt,
        clip=None,
        preset=FAITHFUL,
        degradation=None,
    ) -> io.NodeOutput:
        with named("STAR Text Encode"):
            star = star_of(model)
            if degradation is not None:
                quality_words = join_prompt(degradation.positive, quality_words, ", ")
                negative_prompt = join_prompt(degradation.negative, negative_prompt, ", ")
            prompts = prompts_for(star, clip, prompt, quality_words, negative_prompt, preset)
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
                *size_inputs(),
                io.Combo.Input(
                    "upsampling",
                    options=list(UPSAMPLINGS),
                    default="model",
                    tooltip="How frames are enlarged before they are encoded. model: as the "
                    "model was trained.",
                ),
                *tile_inputs(),
                DegradationType.Input(
                    "degradation",
                    optional=True,
                    tooltip="Of STAR Analyze Degradation: a clip that is blurred far below its "
                    "size is made smaller first. The size asked for stays.",
                ),
            ],
            outputs=[
                io.Conditioning.Output("positive_out", display_name="positive"),
                io.Conditioning.Output("negative_out", display_name="negative"),
                io.Latent.Output(
                    "latent",
                    display_name="latent",
                    tooltip="The video in latents; it remembers the size asked for.",
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
        degradation=None,
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
                shrink=degradation.shrink if degradation else 1.0,
                tile=tile_of(tile_size, tile_overlap),
            )
            prompts = with_hint(Prompts(positive, negative), latent)
        return io.NodeOutput(*prompts, latent)
