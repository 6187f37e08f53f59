"""The VAE with spatial tiles and temporal windows, and colours as the input had them."""

from typing import Any

import comfy.model_management as mm
import torch
from comfy_api.latest import io

from ..star_core.color_fix import COLOR_FIXES, fix_colors
from ..star_core.geometry import Padding, minimal_padding, pad
from ..star_core.noise import FrameNoise
from .host import Progress, named, tile_inputs, tile_of, video_from_images
from .host_model import star_of
from .host_vae import decode_video, encode_video, star_vae

POSTERIORS = ("mean", "sample")


class StarVAEEncode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="STAR_VAEEncode",
            display_name="STAR VAE Encode",
            category="STAR",
            description="Encodes a clip frame by frame. Frames are padded to what the network "
            "takes; STAR VAE Decode crops them again.",
            inputs=[
                io.Image.Input("images", tooltip="Frames of one clip, in order."),
                io.Vae.Input("vae", tooltip="The VAE of STAR Load VAE."),
                *tile_inputs(),
                io.Combo.Input(
                    "posterior",
                    options=list(POSTERIORS),
                    default="mean",
                    tooltip="Mean of the VAE's posterior, or a sample of it as in the reference.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**64 - 1,
                    control_after_generate=False,
                    tooltip="Noise of the sample; the mean has none.",
                ),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="Pads to the size that STAR Conditioning gives for this model. "
                    "Without it to one that every STAR model takes.",
                ),
            ],
            outputs=[io.Latent.Output("latent", tooltip="Latents of the clip.")],
        )

    @classmethod
    def execute(
        cls, images, vae, tile_size, tile_overlap, posterior, seed, model=None
    ) -> io.NodeOutput:
        with named("STAR VAE Encode"):
            if posterior not in POSTERIORS:
                raise ValueError(f"posterior is {posterior!r}: use {' or '.join(POSTERIORS)}")
            _, height, width, _ = images.shape
            # A network with fewer down-samplings takes sizes for the published ones' 3 as well.
            levels = star_of(model).config.downsamplings if model else 3
            factor = star_vae(vae).video_vae.factor
            padding = minimal_padding(height, width, vae_factor=factor, levels=levels)
            latents = encode_video(
                vae,
                video_from_images(images),
                lambda frame: pad(frame[:3] * 2 - 1, padding, "replicate"),
                noise=FrameNoise(seed) if posterior == "sample" else None,
                tile=tile_of(tile_size, tile_overlap),
                on_step=Progress(),
            )
        return io.NodeOutput(
            {
                "samples": latents,
                "star_size": (width, height),
                "star_padding": padding,
                "star_frames": len(images),
            }
        )


class StarVAEDecode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="STAR_VAEDecode",
            display_name="STAR VAE Decode",
            category="STAR",
            description="Decodes a clip a few frames at a time and crops it to the size that was "
            "asked for.",
            inputs=[
                io.Latent.Input("samples", tooltip="Latents of a clip."),
                io.Vae.Input("vae", tooltip="The VAE of STAR Load VAE."),
                *tile_inputs(),
                io.Int.Input(
                    "window",
                    default=0,
                    min=0,
                    max=128,
                    tooltip="Frames decoded together, 0 for the VAE's own number. More take more "
                    "memory.",
                ),
                io.Int.Input(
                    "window_overlap",
                    default=1,
                    min=0,
                    max=127,
                    tooltip="Frames that neighbouring windows share and blend, 0 as in the "
                    "reference.",
                ),
            ],
            outputs=[io.Image.Output("images", tooltip="The frames.")],
        )

    @classmethod
    def execute(
        cls, samples, vae, tile_size, tile_overlap, window, window_overlap
    ) -> io.NodeOutput:
        with named("STAR VAE Decode"):
            images = decode_video(
                vae,
                samples["samples"],
                window=window or None,
                overlap=window_overlap,
                tile=tile_of(tile_size, tile_overlap),
                padding=_padding(samples, star_vae(vae).video_vae.factor),
                frames=samples.get("star_frames"),
                on_step=Progress(),
            )
        return io.NodeOutput(images)


def _padding(latent: dict[str, Any], factor: int) -> Padding | None:
    """What to crop, None for a LATENT that remembers nothing."""
    if "star_padding" not in latent:
        return None
    left, right, top, bottom = padding = Padding(*latent["star_padding"])
    width, height = latent["star_size"]
    padded = (height + top + bottom, width + left + right)
    given = tuple(side * factor for side in latent["samples"].shape[-2:])
    if given != padded:
        raise ValueError(
            f"the latents are those of {given[1]}x{given[0]} pixels, but were encoded at "
            f"{padded[1]}x{padded[0]}: resize frames instead of latents, or decode with the "
            "host's VAE Decode, which does not crop"
        )
    return padding


class StarColorFix(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="STAR_ColorFix",
            display_name="STAR Color Fix",
            category="STAR",
            description="Gives restored frames the colours of the input.",
            inputs=[
                io.Image.Input("images", tooltip="Restored frames."),
                io.Image.Input(
                    "reference", tooltip="The same frames before, in any size, as many."
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
            outputs=[io.Image.Output("fixed", display_name="images", tooltip="The frames.")],
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
