"""The VAE with spatial tiles and temporal windows, and colours as the input had them."""

import comfy.model_management as mm
import torch
from comfy_api.latest import io

from ..star_core.color_fix import COLOR_FIXES, fix_colors
from ..star_core.diffusion.noise import FrameNoise
from .host import (
    Progress,
    as_the_model_says,
    named,
    tile_inputs,
    tile_of,
    told,
    video_from_images,
)
from .host_features import advanced, schema
from .host_latent import MOST_LEVELS, clip_latent, padding_of
from .host_model import star_of
from .host_vae import decode_video, star_vae

POSTERIORS = ("mean", "sample")


class StarVAEEncode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="STAR_VAEEncode",
            display_name="STAR VAE Encode",
            category="STAR/vae",
            search_aliases=["encode video", "tiled VAE encode", "latent"],
            description="Encodes a clip frame by frame. Frames are padded to what the network "
            "takes; STAR VAE Decode crops them again.",
            inputs=[
                io.Image.Input("images", tooltip="Frames of one clip, in order."),
                io.Vae.Input("vae", tooltip="VAE from STAR Load Model."),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="MODEL from STAR Load Model: pads to the size that STAR Conditioning "
                    "gives for it. Without it to one that every STAR model takes.",
                ),
                *tile_inputs(),
                advanced(
                    io.Combo.Input(
                        "posterior",
                        options=list(POSTERIORS),
                        default="mean",
                        tooltip="Mean of the VAE's posterior, or a sample of it as in the "
                        "original.",
                    )
                ),
                advanced(
                    io.Int.Input(
                        "seed",
                        default=0,
                        min=0,
                        max=2**64 - 1,
                        control_after_generate=False,
                        tooltip="Noise of the sample; the mean has none.",
                    )
                ),
            ],
            outputs=[
                io.Latent.Output("latent", display_name="latent", tooltip="Latents of the clip.")
            ],
        )

    @classmethod
    def execute(
        cls, images, vae, tile_size, tile_overlap, posterior, seed, model=None
    ) -> io.NodeOutput:
        with named("STAR VAE Encode"):
            if posterior not in POSTERIORS:
                raise ValueError(f"posterior is {posterior!r}: use {' or '.join(POSTERIORS)}")
            latent = clip_latent(
                vae,
                images,
                levels=star_of(model).config.downsamplings if model else MOST_LEVELS,
                noise=FrameNoise(seed) if posterior == "sample" else None,
                tile=tile_of(tile_size, tile_overlap),
            )
        return io.NodeOutput(latent)


class StarVAEDecode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="STAR_VAEDecode",
            display_name="STAR VAE Decode",
            category="STAR/vae",
            search_aliases=["decode video", "tiled VAE decode"],
            description="Decodes a clip a few frames at a time and crops it to the size that was "
            "asked for.",
            inputs=[
                io.Latent.Input(
                    "samples", tooltip="Latents of a clip, from a sampler or STAR VAE Encode."
                ),
                io.Vae.Input("vae", tooltip="VAE from STAR Load Model."),
                *tile_inputs(),
                advanced(
                    as_the_model_says(
                        io.Int,
                        "window",
                        max=128,
                        tooltip="Frames decoded together. More take more memory.",
                    )
                ),
                advanced(
                    io.Int.Input(
                        "window_overlap",
                        default=1,
                        min=0,
                        max=127,
                        tooltip="Frames that neighbouring windows share and blend, 0 as in the "
                        "original.",
                    )
                ),
            ],
            outputs=[
                io.Image.Output(
                    "images",
                    display_name="images",
                    tooltip="The restored frames, in the size asked for.",
                )
            ],
        )

    @classmethod
    def execute(
        cls, samples, vae, tile_size, tile_overlap, window, window_overlap
    ) -> io.NodeOutput:
        with named("STAR VAE Decode"):
            images = decode_video(
                vae,
                samples["samples"],
                overlap=window_overlap,
                **told(window=window),
                tile=tile_of(tile_size, tile_overlap),
                padding=padding_of(samples, star_vae(vae).video_vae.factor),
                frames=samples.get("star_frames"),
                on_step=Progress(),
            )
        return io.NodeOutput(images)


class StarColorFix(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="STAR_ColorFix",
            display_name="STAR Color Fix",
            category="STAR/restore",
            search_aliases=["color match", "color transfer", "AdaIN", "wavelet"],
            description="Gives restored frames the colours of the input.",
            inputs=[
                io.Image.Input("images", tooltip="Restored frames from STAR VAE Decode."),
                io.Image.Input(
                    "reference", tooltip="The same frames before the restoration, in any size."
                ),
                io.Combo.Input(
                    "method",
                    options=list(COLOR_FIXES),
                    default="adain",
                    tooltip="adain: mean and contrast of every colour. wavelet: all coarse "
                    "colours, place by place. none: as they are.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="0 leaves the frames as they are.",
                ),
                io.Float.Input(
                    "smoothing",
                    default=2.0,
                    min=0.0,
                    max=16.0,
                    step=0.5,
                    tooltip="Frames over which the reference's statistics are averaged, so that "
                    "its noise does not make the result pump. Cuts and flashes stay. 0 takes each "
                    "frame alone, as STAR does.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    "fixed",
                    display_name="images",
                    tooltip="The restored frames with the input's colours.",
                )
            ],
        )

    @classmethod
    def execute(cls, images, reference, method, strength, smoothing) -> io.NodeOutput:
        with named("STAR Color Fix"):
            frames = fix_colors(
                video_from_images(images),
                video_from_images(reference),
                method=method,
                strength=strength,
                smoothing=smoothing,
            )
            fixed = torch.empty(images.shape, device=mm.intermediate_device())
            progress = Progress()
            for i, frame in enumerate(frames):
                fixed[i] = frame.movedim(0, -1)
                progress(i + 1, len(fixed))
        return io.NodeOutput(fixed)
