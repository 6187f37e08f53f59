"""The whole method: enlarge, pad, encode, noise, denoise in windows, decode, crop, fix colours.

Here a clip is restored shot by shot; `shot_run` holds the steps of one.
"""

import logging
from collections.abc import Generator, Iterable, Sequence
from contextlib import ExitStack, closing
from itertools import pairwise

import torch
from torch import Tensor

from .backbones import NetworkConfig
from .background import ahead
from .diffusion.noise import FrameNoise, ReferenceNoise
from .diffusion.samplers import refuse_crashes
from .memory import DevicePlacement
from .progress import Counter, Progress
from .resume import Work
from .settings import Execution, Settings
from .shot_run import Frames, PerFrameRestorer, PerWindowRestorer, ShotJob, ShotRestorer
from .star_checkpoint import StarModel
from .vae.cogvideox import CausalVideoVAE
from .vae.frame_vae import VideoVAE
from .windows.canvas import Canvas

_LOG = logging.getLogger(__name__)
MANY_TOKENS = 50_000

__all__ = ["Execution", "Frames", "Settings", "ShotJob", "placement_of", "restore", "store_latents"]


@torch.inference_mode()
def restore(
    frames: Iterable[Tensor],
    model: StarModel,
    vae: VideoVAE | CausalVideoVAE,
    shots: Sequence[ShotJob],
    canvas: Canvas,
    *,
    work: Work | None = None,
    placement: DevicePlacement | None = None,
    on_progress: Progress | None = None,
) -> Generator[Tensor, None, None]:
    """Restores a clip; yields the wanted frames (c h w) in [0, 1] on the CPU, one by one.

    frames: those that the shots need, (c h w) in [0, 1], iterable twice; alpha (c = 4) is enlarged.
    A thread reads them. shots: in order, of one behaviour and device. work: what it has is not done
    again, and what is done is kept in it. placement: where modules work, and stay afterwards; None
    for the shots' device, which they leave in the end.
    on_progress(stage, done, total) is called often, from 0 done, in the stages encode, denoise and
    decode, which take turns in a long clip; an exception from it ends the run.
    """
    for shot in shots:
        _refuse_crashes(shot)
    _warn_of_long_attention(shots, model.config, canvas, vae.factor)
    count = Counter(_totals(shots), on_progress)
    start = shots[0].span.needed.start
    with ExitStack() as stack:
        to_encode, for_colors = (stack.enter_context(closing(ahead(frames))) for _ in range(2))
        to_encode = Frames(to_encode, start, held=_read_again(shots))
        for_colors = Frames(for_colors, start)
        placement = placement or stack.enter_context(placement_of(shots[0].execution))
        for number, shot in enumerate(shots):
            restorer = _restorer(number, shot, model, vae, canvas, work, placement, count)
            yield from restorer.frames(to_encode, for_colors)


@torch.inference_mode()
def store_latents(
    frames: Iterable[Tensor],
    model: StarModel,
    vae: VideoVAE | CausalVideoVAE,
    shots: Sequence[ShotJob],
    number: int,
    canvas: Canvas,
    *,
    work: Work,
    on_progress: Progress | None = None,
) -> None:
    """Does of one shot what `restore` then finds in `work`: everything but decoding.

    frames: those that this shot needs. Others as in `restore`.
    """
    shot = shots[number]
    _refuse_crashes(shot)
    count = Counter(_totals([shot]), on_progress)
    with closing(ahead(frames)) as coming, placement_of(shot.execution) as placement:
        to_encode = Frames(coming, shot.span.needed.start, held=_read_again([shot]))
        restorer = _restorer(number, shot, model, vae, canvas, work, placement, count)
        for _ in restorer.restore_latents(to_encode) if shot.settings.strength else ():
            pass


def _read_again(shots: Sequence[ShotJob]) -> int:
    """The most frames that two shots need, or two pieces of one."""
    parts = [shot.span for shot in shots]
    between = [a.needed.stop - b.needed.start for a, b in pairwise(parts)]
    return max([0, *between, *(group.shared for span in parts for group in span.groups)])


def placement_of(execution: Execution) -> DevicePlacement:
    """Returns where the modules of a run work."""
    return DevicePlacement(execution.device, one_at_a_time=execution.slicing.offload)


def _restorer(
    number: int,
    shot: ShotJob,
    model: StarModel,
    vae: VideoVAE | CausalVideoVAE,
    canvas: Canvas,
    work: Work | None,
    placement: DevicePlacement,
    count: Counter,
) -> ShotRestorer:
    # Most of a run is the same for either VAE; how frames become latents and back is not.
    kind: type[ShotRestorer] = PerWindowRestorer if vae.latent_frames > 1 else PerFrameRestorer
    return kind(
        name=f"{number:04}",
        shot=shot,
        model=model,
        vae=vae,
        canvas=canvas,
        noise=_noise(shot.settings, canvas, vae.factor),
        limits=placement.limits(
            vae_tile=shot.settings.tile,
            latent_tile=shot.settings.latent_tile,
            slicing=shot.execution.slicing,
            vae_factor=vae.factor,
            downsamplings=model.config.downsamplings,
        ),
        placement=placement,
        work=work,
        count=count,
    )


def _totals(shots: Sequence[ShotJob]) -> dict[str, int]:
    """Returns the totals of the stages: frames to encode, windows to denoise, frames to decode."""
    looked_at = [shot for shot in shots if shot.settings.strength]
    windows = [sum(len(group.windows) for group in shot.span.groups) for shot in looked_at]
    return {
        "encode": sum(len(shot.span.needed) for shot in looked_at),
        "denoise": sum(
            shot.settings.evaluations * n for shot, n in zip(looked_at, windows, strict=True)
        ),
        "decode": sum(len(shot.span.requested) for shot in shots),
    }


def _refuse_crashes(shot: ShotJob) -> None:
    settings = shot.settings
    if settings.behaviour.refuses_crashes and settings.strength and settings.evaluations:
        refuse_crashes(
            frames=len(shot.span.needed),
            chunk_length=settings.chunk.length,
            sampler=settings.sampling.sampler,
            evaluations=len(settings.sigmas) - 1,
        )


def _warn_of_long_attention(
    shots: Sequence[ShotJob], config: NetworkConfig, canvas: Canvas, factor: int
) -> None:
    """Logs a warning if the network attends to more than `MANY_TOKENS` at once."""
    height, width = (side // factor for side in canvas.view_size)
    tokens = 0
    for shot in shots:
        settings = shot.settings
        if not (settings.strength and settings.evaluations) or settings.shortcuts.attention_window:
            continue
        tile = settings.latent_tile
        tile = tile and tile.in_latents(factor, step=2**config.downsamplings)
        rows, columns = config.tiles((height, width), tile)
        frames = max(len(window) for group in shot.span.groups for window in group.windows)
        sides = max(map(len, rows)), max(map(len, columns))
        tokens = max(tokens, config.attention_tokens(frames, *sides))
    if tokens > MANY_TOKENS:
        _LOG.warning(
            "attention over %d tokens at once, whose time grows with their square: smaller tiles "
            "of the network are faster (--latent-tile, STAR Tiles)",
            tokens,
        )


def _noise(settings: Settings, canvas: Canvas, factor: int) -> FrameNoise | ReferenceNoise:
    if settings.behaviour.noise == "reference":
        return ReferenceNoise(settings.seed)
    height, width = (side // factor for side in canvas.padded)
    y, x = (span.start // factor for span in canvas.view)
    return FrameNoise(settings.seed, canvas=(height, width), origin=(y, x))
