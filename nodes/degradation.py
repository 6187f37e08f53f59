"""A node that degrades clean frames, to test a restoration or to make training pairs."""

import json

import torch
from comfy_api.latest import io

from ..star_core.degradation import PRESETS, Degradation
from .host import Progress, images_from_video, node_errors, seed_input, video_from_images
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
            "degrades them in the way STAR's training data was made.",
            inputs=[
                io.Image.Input("images", tooltip="Clean frames of one clip, in order."),
                io.Combo.Input(
                    "preset",
                    options=list(PRESETS),
                    default="heavy",
                    tooltip="heavy and light apply random blur, resizing, noise, JPEG and video "
                    "codecs. reference is heavy as STAR released it, with each frame degraded "
                    "independently. fixed-mild and fixed-heavy are the recipes of this pack's "
                    "benchmarks.",
                ),
                seed_input(),
            ],
            outputs=[
                io.Image.Output(
                    "degraded",
                    display_name="images",
                    tooltip="The degraded frames, a quarter of the width and height.",
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
        with node_errors("STAR Degrade"):
            degradation = Degradation(PRESETS[preset], len(images), seed)
            degraded = []
            for frame in degradation.apply(video_from_images(images)[:, :3]):
                degraded.append(frame)
                progress(len(degraded), len(images))
        degraded = images_from_video(torch.stack(degraded))
        return io.NodeOutput(degraded, json.dumps(degradation.record))
