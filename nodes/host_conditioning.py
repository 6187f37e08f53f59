"""The low-quality video and the prompts as the host's LATENT and CONDITIONING."""

from typing import Any, NamedTuple

import comfy.sd
import node_helpers
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ..star_core.backbones import CogVideoXConfig, backbone_of
from ..star_core.degradation.recommend import Recommendation
from ..star_core.model import check_vae
from ..star_core.parity import DEFAULT
from ..star_core.star_checkpoint import FAITHFUL, ModelFile, check_preset
from ..star_core.text.prompts import STAR_PROMPTS, join_prompt
from ..star_core.windows.geometry import output_size, shrunk, upsample
from ..star_core.windows.tiling import Tile
from .host_latent import clip_latent
from .host_model import HINT, STRENGTH, star_of
from .host_vae import star_vae

Conditioning = list[list[Any]]

T5_PADDING, T5_END = 0, 1  # tokens


class Prompts(NamedTuple):
    """CONDITIONING of what the video is and of what it must not look like."""

    positive: Conditioning
    negative: Conditioning


def prompts_for(
    star: ModelFile,
    clip: comfy.sd.CLIP | None,
    prompt: str,
    quality: str,
    negative: str,
    preset: str = FAITHFUL,
    degradation: Recommendation | None = None,
) -> Prompts:
    """The model's learned prompts, or text as STAR reads it, if the model has none.

    preset: of learned prompts; other models have nothing but the first. degradation: its words are
    added to the texts.

    As many tokens as it was trained with, parentheses are no weights, nothing is masked. Where a
    text is the default of the published models, the model's own is meant. ValueError if a text
    encoder is missing or another model's.
    """
    if star.prompts is not None:
        return Prompts(*([[learned.float(), {}]] for learned in star.prompts.of(preset)))
    check_preset(preset, (FAITHFUL,))
    if clip is None:
        raise ValueError("this model needs a text encoder: connect the CLIP of STAR Load Model")

    if degradation is not None:
        quality = join_prompt(degradation.positive, quality, ", ")
        negative = join_prompt(degradation.negative, negative, ", ")

    def encode(text: str) -> Conditioning:
        tokens = clip.tokenize(text, disable_weights=True)
        # The host continues long prompts in further blocks of 77; STAR was trained with one.
        return clip.encode_from_tokens_scheduled({k: v[:1] for k, v in tokens.items()})

    usual = backbone_of(star.config).prompts
    if (prompt, quality, negative) != (usual.prompt, usual.positive, usual.negative):
        prompt = usual.prompt if prompt == STAR_PROMPTS.prompt else prompt
        quality = usual.positive if quality == STAR_PROMPTS.positive else quality
    bad = usual.negative if negative in (STAR_PROMPTS.negative, "") else negative
    if isinstance(star.config, CogVideoXConfig):
        length = star.config.context_length

        def encode(text: str) -> Conditioning:
            return t5_conditioning(clip, text, length)

    caption = join_prompt(prompt, quality, DEFAULT.prompt_separator)
    good = encode(caption)
    nothing = [[torch.zeros_like(embedding), values] for embedding, values in good]
    prompts = Prompts(good, nothing if bad is None else encode(bad))
    width = prompts.positive[0][0].shape[-1]
    if width != star.config.context_dim:
        raise ValueError(
            f"this CLIP gives embeddings of width {width}, the model takes "
            f"{star.config.context_dim}: connect the CLIP of STAR Load Model with "
            "text_encoder auto"
        )
    return prompts


def t5_conditioning(clip: comfy.sd.CLIP, text: str, length: int) -> Conditioning:
    """A prompt as CogVideoX reads it: `length` tokens with padding that takes part.

    ValueError for a text encoder that is no T5, or one that masks padding.
    """
    tokens = clip.tokenize(text, disable_weights=True)
    masked = getattr(getattr(clip.cond_stage_model, "t5xxl", None), "enable_attention_masks", True)
    if set(tokens) != {"t5xxl"} or masked:
        raise ValueError(
            "this model takes the text encoder t5-v1_1-xxl without a mask: connect the CLIP of "
            "STAR Load Model, or Load CLIP with type cogvideox, in older ComfyUI pixart"
        )
    ids = [pair[0] for block in tokens["t5xxl"] for pair in block]
    ids = [token for token in ids if token not in (T5_PADDING, T5_END)][: length - 1] + [T5_END]
    ids += [T5_PADDING] * (length - len(ids))
    embedding = clip.encode_from_tokens({"t5xxl": [[(token, 1.0) for token in ids]]})
    return [[embedding, {}]]


def target_size(images: Tensor, scale: float, width: int, height: int) -> tuple[int, int]:
    """(width, height) of the result: as given, or by scale; one side of 0 follows the other."""
    _, rows, columns, _ = images.shape
    return size_of(columns, rows, scale, width, height)


def size_of(columns: int, rows: int, scale: float, width: int, height: int) -> tuple[int, int]:
    """The same of frames of that many columns and rows."""
    if not (width or height):
        return output_size(columns, rows, scale)
    size = (width or round(columns * height / rows), height or round(rows * width / columns))
    return output_size(columns, rows, out_size=size)


def low_quality_latent(
    model: ModelPatcher,
    vae: comfy.sd.VAE,
    images: Tensor,
    size: tuple[int, int],
    *,
    upsampling: str | None = None,
    tile: Tile | None = None,
    shrink: float = 1.0,
) -> dict[str, Any]:
    """LATENT of images (f h w c), enlarged to `size` and padded to what the network takes.

    It remembers size and padding for STAR VAE Decode. upsampling: bilinear or bicubic, None as the
    model file says. shrink: how much smaller frames are made first, from 1.
    """
    star = star_of(model)
    check_vae(star_vae(vae).video_vae, star.config, star.latents)
    mode: Any = upsampling or star.sampling.upsample
    if mode not in ("bilinear", "bicubic"):
        raise ValueError(f"unknown upsampling {mode!r}: use bilinear or bicubic")

    def enlarge(frame: Tensor) -> Tensor:
        return upsample(shrunk(frame, shrink), size, mode).clamp(0, 1)

    return clip_latent(
        vae, images, size=size, enlarge=enlarge, levels=star.config.downsamplings, tile=tile
    )


def with_hint(prompts: Prompts, latent: dict[str, Any], strength: float = 1.0) -> Prompts:
    """The prompts together with the low-quality video, and how far the result may go from it."""
    values = {HINT: latent["samples"], STRENGTH: strength}
    return Prompts(*(node_helpers.conditioning_set_values(prompt, values) for prompt in prompts))
