"""Good frames made bad, to try a restoration on or to make training pairs."""

import json

import torch
from comfy_api.latest import io

from ..star_core.degradation import PRESETS, Degradation
from .host import Progress, images_from_video, named, seed_input, video_from_images
from .host_features import schema


class StarDegrade(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="STAR_Degrade",
            display_name="STAR Degrade",
            category="STAR/prepare",
            search_aliases=["blur", "noise", "compression", "training data", "downscale"],
            description="Downscales clean frames to a quarter of their width and height and "
            "degrades them, as STAR's training data was made.",
            inputs=[
                io.Image.Input("images", tooltip="Clean frames of one clip, in order."),
                io.Combo.Input(
                    "preset",
                    options=list(PRESETS),
                    default="heavy",
                    tooltip="heavy and light: blur, resizing, noise, JPEG and video codecs as in "
                    "the real world. reference: heavy as it was released, every frame on its own. "
                    "fixed-mild, fixed-heavy: what the results of this pack are judged by.",
                ),
                seed_input(),
            ],
            outputs=[
                io.Image.Output(
                    "degraded",
                    display_name="images",
                    tooltip="The degraded frames, a quarter as wide and high.",
                ),
                io.String.Output(
                    "record",
                    display_name="record",
                    tooltip="Every random value that was drawn, as JSON.",
                ),
            ],
        )

    @classmethod
    def execute(cls, images, preset, seed) -> io.NodeOutput:
        progress = Progress()
        with named("STAR Degrade"):
            degradation = Degradation(PRESETS[preset], len(images), seed)
            small = []
            for frame in degradation.apply(video_from_images(images)[:, :3]):
                small.append(frame)
                progress(len(small), len(images))
        return io.NodeOutput(images_from_video(torch.stack(small)), json.dumps(degradation.record))
