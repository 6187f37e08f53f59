"""Nodes that encode and decode with the VAE, and one that restores the input's colours."""

import comfy.model_management as mm
import torch
from comfy_api.latest import io

from ..star_core.color_fix import COLOR_FIXES, fix_colors
from ..star_core.diffusion.noise import FrameNoise
from .host import (
    Progress,
    model_default,
    node_errors,
    overrides,
    seed_input,
    strength_input,
    tile_inputs,
    tile_of,
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
            description="Encodes a clip frame by frame. Frames are padded to a size that the "
            "network accepts; STAR VAE Decode removes the padding.",
            inputs=[
                io.Image.Input("images", tooltip="Frames of one clip, in order."),
                io.Vae.Input("vae", tooltip="VAE from STAR Load Model."),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="MODEL from STAR Load Model. Frames are padded for this model as in "
                    "STAR Conditioning; without it, to a size that every STAR model accepts.",
                ),
                *tile_inputs(),
                advanced(
                    io.Combo.Input(
                        "posterior",
                        options=list(POSTERIORS),
                        default="mean",
                        tooltip="mean takes the mean of the VAE's posterior, sample draws from "
                        "it, as the original STAR does.",
                    )
                ),
                advanced(
                    seed_input(
                        0, control=False, tooltip="Seed of the sample; mean does not use it."
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
        with node_errors("STAR VAE Encode"):
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
            description="Decodes a clip a few frames at a time and crops it to the size set in "
            "STAR Conditioning.",
            inputs=[
                io.Latent.Input(
                    "samples", tooltip="Latents of a clip, from a sampler or STAR VAE Encode."
                ),
                io.Vae.Input("vae", tooltip="VAE from STAR Load Model."),
                *tile_inputs(),
                advanced(
                    model_default(
                        io.Int,
                        "window",
                        max=128,
                        tooltip="Number of frames decoded together. More frames need more memory.",
                    )
                ),
                advanced(
                    io.Int.Input(
                        "window_overlap",
                        default=1,
                        min=0,
                        max=127,
                        tooltip="Number of frames that neighbouring windows share and blend. The "
                        "original STAR uses 0.",
                    )
                ),
            ],
            outputs=[
                io.Image.Output(
                    "images",
                    display_name="images",
                    tooltip="The restored frames in the requested size.",
                )
            ],
        )

    @classmethod
    def execute(
        cls, samples, vae, tile_size, tile_overlap, window, window_overlap
    ) -> io.NodeOutput:
        with node_errors("STAR VAE Decode"):
            images = decode_video(
                vae,
                samples["samples"],
                overlap=window_overlap,
                **overrides(window=window),
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
            description="Gives the restored frames the colours of the input.",
            inputs=[
                io.Image.Input("images", tooltip="Restored frames from STAR VAE Decode."),
                io.Image.Input(
                    "reference", tooltip="The same frames before the restoration, of any size."
                ),
                io.Combo.Input(
                    "method",
                    options=list(COLOR_FIXES),
                    default="adain",
                    tooltip="adain matches mean and contrast of each colour channel, wavelet "
                    "copies the low frequencies, none changes nothing.",
                ),
                strength_input("0 leaves the frames unchanged, 1 corrects them fully."),
                io.Float.Input(
                    "smoothing",
                    default=2.0,
                    min=0.0,
                    max=16.0,
                    step=0.5,
                    tooltip="Number of frames over which the reference's statistics are averaged, "
                    "so that its noise does not make the brightness fluctuate. Cuts and flashes "
                    "are kept. 0 treats each frame alone, as the original STAR does.",
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
        with node_errors("STAR Color Fix"):
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
