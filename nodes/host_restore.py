"""The chain of nodes as one function: encode, sample, decode, fix colours."""

from typing import Any

import comfy.model_management as mm
import comfy.sample
import comfy.utils
import latent_preview
import torch
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP, VAE
from comfy_api.latest import ui
from torch import Tensor

from ..star_core.color_fix import fix_colors
from ..star_core.degradation.recommend import Recommendation
from ..star_core.pipeline import Settings
from ..star_core.text.prompts import NEGATIVE_PROMPT, POSITIVE_PROMPT
from ..star_core.windows.geometry import upsample
from .host import Progress, tile_of, video_from_images
from .host_conditioning import Prompts, low_quality_latent, prompts_for, with_hint
from .host_model import star_of
from .host_sampling import (
    FrameNoiseSource,
    chunk_of,
    finite_sigmas,
    patch_chunks,
    patch_guidance,
    sampling_of,
    star_sampler,
)
from .host_vae import decode_video


def settings_for(
    model: ModelPatcher,
    clip: CLIP | None,
    degradation: Recommendation | None,
    *,
    prompt: str,
    preset: str,
    seed: int,
    strength: float,
    steps: int,
    cfg: float,
    noise_level: int,
    color_fix: str,
    chunk_frames: int,
    chunk_overlap: int,
    tile_size: int,
    tile_overlap: int,
) -> tuple[Settings, Prompts]:
    """Returns settings and prompts for the inputs, of the same names, of a node that restores."""
    star = star_of(model)
    settings = Settings(
        sampling=sampling_of(
            model, degradation, steps=steps, cfg=cfg, noise_level=noise_level, color_fix=color_fix
        ),
        strength=strength * (degradation.strength if degradation else 1.0),
        shrink=degradation.shrink if degradation else 1.0,
        seed=seed,
        chunk=chunk_of(star, chunk_frames, chunk_overlap),
        tile=tile_of(tile_size, tile_overlap),
    )
    texts = (prompt, POSITIVE_PROMPT, NEGATIVE_PROMPT)
    return settings, prompts_for(star, clip, *texts, preset, degradation)


def restore_images(
    model: ModelPatcher,
    vae: VAE,
    images: Tensor,
    size: tuple[int, int],
    prompts: Prompts,
    settings: Settings,
    *,
    stills: bool = False,
) -> Tensor:
    """Restores an IMAGE (f h w c) of one clip at `size` (width, height); alpha is enlarged.

    It does the same as `pipeline.restore` in its default behaviour, with the host's sampling.
    stills: treat each picture as a clip of its own.
    """
    if stills and len(images) > 1:
        pictures = images.split(1)
        return torch.cat(
            [restore_images(model, vae, each, size, prompts, settings) for each in pictures]
        )
    frames, sampling = video_from_images(images), settings.sampling

    def enlarge(frame: Tensor, mode: Any = "bicubic") -> Tensor:
        return upsample(frame, size, mode).clamp(0, 1)

    latent = decoded = None
    if settings.strength:
        latent = low_quality_latent(
            model, vae, images, size, tile=settings.tile, shrink=settings.shrink
        )
        decoded = _decoded(vae, _sampled(model, latent, prompts, settings), latent, settings)
    unchanged = None
    if latent and settings.strength < 1:
        unchanged = _decoded(vae, latent["samples"], latent, settings)
    restored = torch.empty(
        (*images.shape[:1], *size[::-1], images.shape[-1]), device=mm.intermediate_device()
    )
    progress = Progress()

    def fixed(decoded: Tensor, i: int) -> Tensor:
        reference = enlarge(frames[i, :3], sampling.upsample)[None]
        return next(fix_colors(decoded[i : i + 1], reference, method=sampling.color_fix))

    for i, source in enumerate(frames):
        frame = enlarge(source)
        if decoded is not None:
            result = fixed(decoded, i)
            if unchanged is not None:
                # At strength 0 no change by the VAE may remain.
                lost = frame[:3] - fixed(unchanged, i)
                result = (result + (1 - settings.strength) * lost).clamp(0, 1)
            frame = torch.cat([result, frame[3:]])
        restored[i] = frame.movedim(0, -1)
        progress(i + 1, len(frames))
    return restored


def _sampled(
    model: ModelPatcher, latent: dict[str, Any], prompts: Prompts, settings: Settings
) -> Tensor:
    sampling = settings.sampling
    model = patch_guidance(model, sampling.cfg_rescale)
    model = patch_chunks(model, settings.chunk, settings.behaviour.merge)
    sigmas = finite_sigmas(sampling)
    return comfy.sample.sample_custom(
        model,
        FrameNoiseSource(settings.seed).generate_noise(latent),
        sampling.cfg,
        star_sampler(sampling.sampler, "frame"),
        sigmas,
        *with_hint(prompts, latent, settings.strength),
        latent["samples"],
        callback=latent_preview.prepare_callback(model, len(sigmas) - 1),
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=settings.seed,
    )


def _decoded(vae: VAE, latents: Tensor, latent: dict[str, Any], settings: Settings) -> Tensor:
    """Frames (f c h w) in [0, 1]."""
    images = decode_video(
        vae,
        latents,
        overlap=settings.behaviour.decode_overlap,
        window=settings.sampling.decode_window,
        tile=settings.tile,
        padding=latent["star_padding"],
        on_step=Progress(),
    )
    return video_from_images(images)


def compared(before: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
    """Returns an IMAGE of the middle frame, half before and half after, and one of all frames.

    The second has before and after side by side. before: (f h w c), enlarged to the size of
    `after`. ValueError unless both have the same number of frames.
    """
    if len(before) != len(after):
        raise ValueError(
            f"there are {len(before)} frames before and {len(after)} after: connect the same frames"
        )
    height, width = after.shape[1:3]
    frames = torch.empty((len(after), height, 2 * width, 3), device=mm.intermediate_device())
    for i, (old, new) in enumerate(zip(video_from_images(before), after, strict=True)):
        frames[i, :, :width] = (
            upsample(old[:3], (width, height), "bicubic").clamp(0, 1).movedim(0, -1)
        )
        frames[i, :, width:] = new[..., :3]
    middle, half = frames[len(frames) // 2], width // 2
    picture = torch.cat([middle[:, :half], middle[:, width + half :]], dim=1)
    picture[:, max(half - 1, 0) : half + 1] = 1  # the seam
    return picture[None], frames


def compare_ui(picture: Tensor, side_by_side: Tensor) -> dict[str, Any]:
    """Returns the `ui` of STAR Compare for the two results of `compared`.

    It holds the picture, which every frontend shows, and the middle frame before and after for
    `web/compare.js`.
    """
    middle = side_by_side[len(side_by_side) // 2][None]
    before, after = middle.chunk(2, dim=2)
    # Frontends expect these names for their slider.
    pictures = {"images": picture, "a_images": before, "b_images": after}
    return {name: ui.PreviewImage(image).as_dict()["images"] for name, image in pictures.items()}
