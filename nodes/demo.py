"""The shipped clip, so that workflows run where there is no other."""

import torch
from comfy_api.latest import io

from ..star_core.demo import DATA, DEGRADED, SHOT
from ..star_core.video_io import open_video
from .host import images_from_video, named
from .host_features import schema


class StarDemoClip(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="STAR_DemoClip",
            display_name="STAR Demo Clip",
            category="STAR/prepare",
            search_aliases=["test video", "example", "sample clip"],
            description="The low-quality clip that comes with the pack: 24 frames of 160x88 with "
            "blur, noise and JPEG artefacts. Nothing needs to be downloaded.",
            inputs=[
                io.Int.Input(
                    "start",
                    default=0,
                    min=0,
                    max=len(SHOT) - 1,
                    tooltip="First frame, counted from 0.",
                ),
                io.Int.Input(
                    "frames",
                    default=8,
                    min=1,
                    max=len(SHOT),
                    tooltip="How many frames; fewer where the clip ends. Few run faster.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    "images", display_name="images", tooltip="The frames, to be restored."
                ),
                io.Float.Output(
                    "fps", display_name="fps", tooltip="Frames per second, for Create Video."
                ),
            ],
        )

    @classmethod
    def execute(cls, start: int, frames: int) -> io.NodeOutput:
        with named("STAR Demo Clip"):
            clip = open_video(DATA / DEGRADED, frames=(start, min(start + frames, len(SHOT))))
            images = images_from_video(torch.stack(list(clip)))
        return io.NodeOutput(images, float(clip.info.fps))
