"""Good frames made bad, to try a restoration on or to make training pairs."""

import json

import torch
from comfy_api.latest import io

from ..star_core.degradation import PRESETS, Degradation
from .host import Progress, images_from_video, named, video_from_images


class StarDegrade(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="STAR_Degrade",
            display_name="STAR Degrade",
            category="STAR",
            description="Makes clean frames small and bad, a quarter of their width and height, "
            "as STAR's training data was made.",
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
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**64 - 1,
                    control_after_generate=True,
                    tooltip="Same seed, same degradation.",
                ),
            ],
            outputs=[
                io.Image.Output("degraded", display_name="images", tooltip="The bad frames."),
                io.String.Output(
                    "record", display_name="record", tooltip="What was drawn, as JSON."
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
