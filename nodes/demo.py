"""A node with the bundled clip, so that workflows run without a file of the user's."""

import torch
from comfy_api.latest import io

from ..star_core.demo import DATA, DEGRADED, GROUND_TRUTH, SHOT
from ..star_core.video_io import open_video
from .host import images_from_video, node_errors
from .host_features import schema

CLIPS = {"degraded": DEGRADED, "clean": GROUND_TRUTH}


class StarDemoClip(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="STAR_DemoClip",
            display_name="STAR Demo Clip",
            category="STAR/prepare",
            search_aliases=["test video", "example", "sample clip"],
            description="Loads the bundled clip of 24 frames: degraded (160x88, with blur, noise "
            "and JPEG artefacts) or clean (640x352). Nothing is downloaded.",
            inputs=[
                io.Combo.Input(
                    "clip",
                    options=list(CLIPS),
                    default="degraded",
                    tooltip="degraded is the clip to restore. clean is its original, to be "
                    "degraded or to measure a result against.",
                ),
                io.Int.Input(
                    "start",
                    default=0,
                    min=0,
                    max=len(SHOT) - 1,
                    tooltip="Index of the first frame, counted from 0.",
                ),
                io.Int.Input(
                    "frames",
                    default=8,
                    min=1,
                    max=len(SHOT),
                    tooltip="Number of frames; fewer if the clip ends before. Fewer frames run "
                    "faster.",
                ),
            ],
            outputs=[
                io.Image.Output("images", display_name="images", tooltip="Frames of the clip."),
                io.Float.Output(
                    "fps", display_name="fps", tooltip="Frames per second, for Create Video."
                ),
            ],
        )

    @classmethod
    def execute(cls, clip: str, start: int, frames: int) -> io.NodeOutput:
        with node_errors("STAR Demo Clip"):
            if clip not in CLIPS:
                raise ValueError(f"there is no clip {clip!r}: choose {' or '.join(CLIPS)}")
            span = start, min(start + frames, len(SHOT))
            video = open_video(DATA / CLIPS[clip], frames=span)
            images = images_from_video(torch.stack(list(video)))
        return io.NodeOutput(images, float(video.info.fps))
