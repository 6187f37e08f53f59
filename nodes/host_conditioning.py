"""Converts the low-quality video and the prompts to the host's LATENT and CONDITIONING."""

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
from .host_features import check_host
from .host_latent import clip_latent
from .host_model import HINT, STRENGTH, star_of
from .host_vae import star_vae

Conditioning = list[list[Any]]

T5_PADDING, T5_END = 0, 1  # token ids


class Prompts(NamedTuple):
    """CONDITIONING of the positive and the negative prompt."""

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
    """Returns the model's learned prompts or, if it has none, the encoded texts.

    quality: text added to the prompt. preset: name of the learned prompts; models without any
    accept only the default. degradation: its words are added to the texts.

    Texts are encoded as in training: with a fixed number of tokens, without a mask, and without a
    meaning of parentheses. A text equal to the default of the published models is replaced by the
    default of this model. ValueError if the text encoder is missing or does not fit the model.
    """
    if star.prompts is not None:
        return Prompts(*([[learned.float(), {}]] for learned in star.prompts.of(preset)))
    check_preset(preset, (FAITHFUL,))
    if clip is None:
        raise ValueError("this model needs a text encoder: connect CLIP from STAR Load Model")

    if degradation is not None:
        quality = join_prompt(degradation.positive, quality, ", ")
        negative = join_prompt(degradation.negative, negative, ", ")

    def encode(text: str) -> Conditioning:
        tokens = clip.tokenize(text, disable_weights=True)
        # The host continues long prompts in further blocks of 77; STAR was trained with one.
        return clip.encode_from_tokens_scheduled({k: v[:1] for k, v in tokens.items()})

    defaults = backbone_of(star.config).prompts
    if (prompt, quality, negative) != (defaults.prompt, defaults.positive, defaults.negative):
        prompt = defaults.prompt if prompt == STAR_PROMPTS.prompt else prompt
        quality = defaults.positive if quality == STAR_PROMPTS.positive else quality
    bad = defaults.negative if negative in (STAR_PROMPTS.negative, "") else negative
    if isinstance(star.config, CogVideoXConfig):
        length = star.config.context_length

        def encode(text: str) -> Conditioning:
            return t5_conditioning(clip, text, length)

    caption = join_prompt(prompt, quality, DEFAULT.prompt_separator)
    positive = encode(caption)
    zeros = [[torch.zeros_like(embedding), values] for embedding, values in positive]
    prompts = Prompts(positive, zeros if bad is None else encode(bad))
    width = prompts.positive[0][0].shape[-1]
    if width != star.config.context_dim:
        raise ValueError(
            f"this CLIP gives embeddings of width {width}, but the model needs "
            f"{star.config.context_dim}: connect CLIP from STAR Load Model with text_encoder auto"
        )
    return prompts


def t5_conditioning(clip: comfy.sd.CLIP, text: str, length: int) -> Conditioning:
    """Encodes a prompt for CogVideoX: `length` tokens, whose padding is not masked.

    ValueError for a text encoder that is not T5 or that masks the padding.
    """
    check_host(clip, "cond_stage_model")
    tokens = clip.tokenize(text, disable_weights=True)
    masked = getattr(getattr(clip.cond_stage_model, "t5xxl", None), "enable_attention_masks", True)
    if set(tokens) != {"t5xxl"} or masked:
        raise ValueError(
            "this model needs the text encoder t5-v1_1-xxl without a mask: connect CLIP from STAR "
            "Load Model, or Load CLIP with type cogvideox, in older ComfyUI pixart"
        )
    ids = [pair[0] for block in tokens["t5xxl"] for pair in block]
    ids = [token for token in ids if token not in (T5_PADDING, T5_END)][: length - 1] + [T5_END]
    ids += [T5_PADDING] * (length - len(ids))
    embedding = clip.encode_from_tokens({"t5xxl": [[(token, 1.0) for token in ids]]})
    return [[embedding, {}]]


def target_size(images: Tensor, scale: float, width: int, height: int) -> tuple[int, int]:
    """Returns (width, height) of the result for images (f h w c).

    scale: used where width and height are 0. If only one of them is 0, it follows the other.
    """
    _, rows, columns, _ = images.shape
    return size_of(columns, rows, scale, width, height)


def size_of(columns: int, rows: int, scale: float, width: int, height: int) -> tuple[int, int]:
    """Returns (width, height) of the result for frames of that many columns and rows.

    scale: used where width and height are 0. If only one of them is 0, it follows the other.
    """
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
    """Returns the LATENT of images (f h w c), enlarged to `size` and padded for the network.

    It stores size and padding for STAR VAE Decode. size: (width, height). upsampling: bilinear or
    bicubic, None for the model's default. shrink: factor from 1 by which frames are downscaled
    first. ValueError for another upsampling or a VAE that does not fit the model.
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
    """Returns the prompts with the low-quality video and the strength of the restoration added."""
    values = {HINT: latent["samples"], STRENGTH: strength}
    return Prompts(*(node_helpers.conditioning_set_values(prompt, values) for prompt in prompts))
