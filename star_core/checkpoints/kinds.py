"""Identifies checkpoints by the names of their tensors."""

import re
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class FileKind:
    """A kind of checkpoint, whose keys match all of its patterns.

    name: an identifier that never changes. title: the description in messages. patterns: regular
    expressions, each of which some key matches. advice: what to do with such a file, "" for a kind
    that can be loaded.
    """

    name: str
    title: str
    patterns: tuple[str, ...]
    advice: str = ""

    def matches(self, keys: str) -> bool:
        """Tests whether a checkpoint with these keys, one per line, is of this kind."""
        return all(re.search(pattern, keys, re.MULTILINE) for pattern in self.patterns)


STAR_I2VGENXL = FileKind(
    name="star-i2vgenxl",
    title="STAR network on I2VGen-XL (UNet and ControlNet)",
    patterns=(r"^VideoControlNet\.", r"\.local1\.conv1\.weight$"),
)
STAR_COGVIDEOX = FileKind(
    name="star-cogvideox",
    title="STAR network on CogVideoX",
    patterns=(
        r"(\bmixins\.patch_embed\.proj_sr|^transformer_blocks\.0\.spa_local\.conv1)\.weight$",
    ),
)
VENHANCER = FileKind(
    name="venhancer",
    title="VEnhancer or another ControlNet video UNet without STAR's LIEM gates",
    patterns=(r"^VideoControlNet\.", r"\.temopral_conv\."),
    advice="STAR's own files are light_deg.pt and heavy_deg.pt",
)
VIDEO_UNET = FileKind(
    name="i2vgenxl-unet",
    title="video UNet of the I2VGen-XL family without a ControlNet",
    patterns=(r"^input_blocks\.", r"\.temopral_conv\."),
    advice="STAR's own files are light_deg.pt and heavy_deg.pt",
)
VAE_DIFFUSERS = FileKind(
    name="vae-temporal-diffusers",
    title="video VAE with temporal decoder, as Stable Video Diffusion's, diffusers' naming",
    patterns=(r"^decoder\.time_conv_out\.weight$",),
)
VAE_PATCH = FileKind(
    name="vae-patch",
    title="VAE of this project's built-in model",
    patterns=(r"^encoder\.linear\.weight$", r"^decoder\.linear\.weight$"),
)
VAE_SVD = FileKind(
    name="vae-temporal-svd",
    title="video VAE with temporal decoder, as Stable Video Diffusion's, SVD's naming",
    patterns=(r"^(first_stage_model\.)?decoder\.conv_out\.time_mix_conv\.weight$",),
)
SVD = FileKind(
    name="svd",
    title="full Stable Video Diffusion checkpoint (its VAE can be used)",
    patterns=(r"^model\.diffusion_model\.", *VAE_SVD.patterns),
)
STABLE_DIFFUSION_2 = FileKind(
    name="stable-diffusion-2",
    title="full Stable Diffusion 2 checkpoint (its text encoder can be used)",
    patterns=(
        r"^model\.diffusion_model\.",
        r"^cond_stage_model\.model\.transformer\.resblocks\.0\.attn\.in_proj_weight$",
    ),
)
VAE_COGVIDEOX = FileKind(
    name="vae-cogvideox",
    title="CogVideoX 3D VAE",
    patterns=(r"\bdecoder\.mid(_block|)\.(resnets\.0|block_1)\.conv1\.conv\.weight$",),
)
T5 = FileKind(
    name="t5",
    title="T5 text encoder",
    patterns=(r"\bblock\.0\.layer\.0\.SelfAttention\.q\.weight$",),
)
CLIP_OPEN_CLIP = FileKind(
    name="clip-open_clip",
    title="CLIP text encoder, open_clip's naming",
    patterns=(r"^(?!.*visual\.).*\btransformer\.resblocks\.0\.attn\.in_proj_weight$",),
)
CLIP_TRANSFORMERS = FileKind(
    name="clip-transformers",
    title="CLIP text encoder, transformers' naming",
    patterns=(
        r"^(?!.*vision_model\.).*\bencoder\.layers\.0\.self_attn\.q_proj\.weight$",
        r"\btoken_embedding\.weight$",
    ),
)

# The first that matches counts, so specific kinds precede the general kinds that match them too.
KNOWN_FILES = (
    FileKind(
        name="lora",
        title="LoRA (low-rank changes to some other model)",
        patterns=(r"[._]lora[._]?(down|up|A|B)\b",),
        advice="it changes the model that it was made for and cannot be used alone",
    ),
    STAR_I2VGENXL,
    VENHANCER,
    VIDEO_UNET,
    STAR_COGVIDEOX,
    FileKind(
        name="cogvideox-sat",
        title="CogVideoX transformer in SAT's naming, without STAR's changes",
        patterns=(r"\bmixins\.patch_embed\.proj\.weight$",),
        advice="STAR's own file has a layer `proj_sr` with 32 input channels",
    ),
    FileKind(
        name="cogvideox-diffusers",
        title="CogVideoX transformer in diffusers' naming",
        patterns=(r"^patch_embed\.text_proj\.weight$", r"^transformer_blocks\.0\.norm1\.linear\."),
        advice="it lacks STAR's gates (`spa_local`, `temp_local`) and additional input channels",
    ),
    SVD,
    STABLE_DIFFUSION_2,
    FileKind(
        name="stable-diffusion",
        title="full Stable Diffusion checkpoint",
        patterns=(r"^model\.diffusion_model\.",),
        advice="STAR can use neither its UNet nor its VAE",
    ),
    VAE_DIFFUSERS,
    VAE_PATCH,
    VAE_SVD,
    VAE_COGVIDEOX,
    FileKind(
        name="vae-image",
        title="image VAE without temporal decoder",
        patterns=(r"\bdecoder\.mid(_block\.resnets\.0|\.block_1)\.conv1\.weight$",),
        advice="STAR decodes with Stable Video Diffusion's VAE",
    ),
    CLIP_OPEN_CLIP,
    CLIP_TRANSFORMERS,
    FileKind(
        name="clip-vision",
        title="CLIP image encoder",
        patterns=(r"\b(visual\.transformer\.resblocks|vision_model\.encoder\.layers)\.0\.",),
        advice="STAR needs the text encoder",
    ),
    T5,
    FileKind(
        name="diffusers-unet",
        title="UNet in diffusers' naming",
        patterns=(r"^down_blocks\.0\.", r"^up_blocks\.0\.", r"^conv_in\.weight$"),
        advice="STAR's own files are light_deg.pt and heavy_deg.pt",
    ),
)

UNKNOWN = FileKind(name="unknown", title="checkpoint of an unknown kind", patterns=())


def identify(keys: Iterable[str]) -> FileKind:
    """Returns the kind of a checkpoint with these keys, `UNKNOWN` if no known kind matches."""
    lines = "\n".join(keys)
    return next((kind for kind in KNOWN_FILES if kind.matches(lines)), UNKNOWN)
