"""From file to file: finds and opens everything, refuses what cannot work, restores, writes."""

import math
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from .backbones import LatentFormat
from .behaviour import Behaviour
from .canvas import Canvas, Part, Region, cut
from .checkpoints import FileInfo, StarModel, describe, load_model
from .degradation.estimate import Degradation, estimate, spread
from .downloads import PUBLISHED
from .geometry import output_size
from .model_files import find_published, find_text_encoder, find_vae
from .models.encoder import UNetConfig
from .pipeline import Progress, Settings, restore
from .text import (
    DEFAULT_PROMPT,
    NEGATIVE_PROMPT,
    POSITIVE_PROMPT,
    join_prompt,
    load_text_encoder,
)
from .vae import VideoVAE, load_vae
from .video_io import VideoSink, VideoSource, open_sink, open_stills, open_video

WEIGHTS = Path(__file__).with_name("weights")
BUILT_IN = {"tiny": (WEIGHTS / "tiny.safetensors", WEIGHTS / "tiny_vae.safetensors")}
PUBLISHED_MODELS = [name for name, file in PUBLISHED.items() if file.folder == "diffusion_models"]


@dataclass(frozen=True, kw_only=True)
class ModelFiles:
    """Where a model lies and what it needs; text_encoder is None for one with learned prompts."""

    model: Path
    vae: Path
    text_encoder: Path | None
    info: FileInfo


@dataclass(frozen=True, kw_only=True)
class Model:
    """Everything that restores: network, VAE, embedded prompts (1 l d)."""

    star: StarModel
    vae: VideoVAE
    positive: Tensor
    negative: Tensor


def find_model(
    name: str,
    *,
    vae: str | None = None,
    text_encoder: str | None = None,
    models_dir: str | None = None,
) -> ModelFiles:
    """The files of a model: built in, published (`light_deg`, `heavy_deg`) or named by its file.

    Nothing is loaded. A published model, and a `vae` and `text_encoder` that are not given, are
    sought, see `model_files`. ValueError if the model is no STAR network, or if a file is missing.
    """
    path, built_in_vae = BUILT_IN.get(name, (Path(name), None))
    if name in PUBLISHED_MODELS and not path.exists():
        path = find_published(name, models_dir=models_dir)
    info = describe(path)
    if info.config is None:
        raise ValueError(
            f"{path} seems to be a {info.title}: --model takes a STAR network or "
            f"{', '.join((*BUILT_IN, *PUBLISHED_MODELS))}"
            + (f" ({info.problems})" if info.problems else "")
        )
    places = {"model": path, "models_dir": models_dir}
    vae_path = built_in_vae if vae is None and built_in_vae else find_vae(vae, **places)
    if not info.prompts:
        width = info.config["context_dim"]
        text_path = find_text_encoder(text_encoder, width=width, **places)
    elif text_encoder is not None:
        raise ValueError(
            f"the model {name} has learned prompts and no text encoder: leave out --text-encoder"
        )
    else:
        text_path = None
    return ModelFiles(model=path, vae=vae_path, text_encoder=text_path, info=info)


def load(
    files: ModelFiles,
    *,
    prompt: str | None = None,
    positive: str | None = None,
    negative: str | None = None,
    behaviour: Behaviour,
    device: torch.device | str,
    dtype: torch.dtype,
) -> Model:
    """Load a model and encode its prompts, on `device`; the rest waits on the CPU.

    prompt: what the video shows. positive, negative: what makes it good or bad. None: STAR's.
    ValueError for prompts to a model that takes none, and for a VAE that does not fit.
    """
    if files.text_encoder is None and (prompt, positive, negative) != (None, None, None):
        raise ValueError(
            f"{files.model.name} has learned prompts and takes no text: leave out --prompt, "
            "--positive and --negative"
        )
    star = load_model(files.model, dtype=dtype)
    vae = load_vae(files.vae, dtype=dtype)
    check_vae(vae, star.config, star.latents)
    if star.prompts is not None:
        return Model(star=star, vae=vae, **star.prompts._asdict())
    assert files.text_encoder is not None
    encoder = load_text_encoder(
        files.text_encoder, width=star.config.context_dim, device=device, dtype=dtype
    )
    caption = join_prompt(
        DEFAULT_PROMPT if prompt is None else prompt,
        POSITIVE_PROMPT if positive is None else positive,
        behaviour.prompt_separator,
    )
    bad = NEGATIVE_PROMPT if negative is None else negative
    return Model(star=star, vae=vae, positive=encoder.encode(caption), negative=encoder.encode(bad))


def check_vae(vae: VideoVAE, config: UNetConfig, latents: LatentFormat) -> None:
    """ValueError unless the latents of a VAE are those that a model was trained on."""
    found, wanted = (vae.latent_channels, vae.scaling_factor), (config.in_dim, latents.scale)
    if found != wanted:
        raise ValueError(
            f"this VAE makes latents of {found[0]} channels with scale {found[1]:g}, the model "
            f"takes {wanted[0]} with {wanted[1]:g}: choose the VAE that belongs to the model"
        )


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is to be restored into what.

    scale or out_size (width, height): exactly one. frames: (A, B) for frames A to B-1, B None for
    the end. crop: (width, height, x, y) in displayed pixels of the source. stills: the source is a
    folder of unrelated pictures, the result a folder of as many. Others as in `video_io`.
    """

    source: Path
    out: Path
    scale: float | None = None
    out_size: tuple[int, int] | None = None
    frames: tuple[int, int | None] | None = None
    crop: tuple[int, int, int, int] | None = None
    stills: bool = False
    deinterlace: Literal["auto", "off"] = "auto"
    codec: str | None = None
    overwrite: bool = False


@dataclass(frozen=True, kw_only=True)
class Clip:
    """A clip ready to be restored: all that can be checked beforehand is checked.

    source: frames that `part` needs. box: rows and columns of them that are looked at, None for
    all. size: (width, height) of the whole enlarged frame, region: what comes out of it.
    """

    source: VideoSource
    sink: VideoSink
    part: Part
    box: Region | None
    size: tuple[int, int]
    region: Region | None

    def __iter__(self) -> Iterator[Tensor]:
        return (frame if self.box is None else cut(frame, self.box) for frame in self.source)


def measure(job: Job) -> tuple[Degradation, float]:
    """What the whole input has suffered, whatever part of it is wanted, and how much it grows.

    ValueError for stills, and for frames that are too small to be measured.
    """
    if job.stills:
        raise ValueError("stills may have suffered differently: leave out --auto or --stills")
    info = open_video(job.source, deinterlace=job.deinterlace).info
    frames = [
        next(iter(open_video(job.source, frames=(i, i + 1), deinterlace=job.deinterlace)))[:3]
        for i in spread(info.frame_count)
    ]
    width, height = output_size(info.width, info.height, job.scale, job.out_size)
    return estimate(torch.stack(frames)), min(width / info.width, height / info.height)


def upscale(
    job: Job,
    settings: Settings,
    get_model: Callable[[], Model],
    *,
    on_progress: Progress | None = None,
    on_frame: Callable[[Tensor], None] | None = None,
) -> dict[str, object]:
    """Do a job; get_model is called once everything else is known to be in order.

    on_progress: see `restore`. on_frame: is given each restored frame (c h w) in [0, 1]. An
    exception from either ends the job, and nothing is left behind. Returns frames, width, height
    and fps of the result. ValueError for whatever a user can mend.
    """
    with _clips(job, settings) as clips:
        model = get_model()
        for clip in clips:
            canvas = Canvas.of(
                clip.size,
                clip.region,
                vae_factor=model.vae.factor,
                levels=model.star.config.downsamplings,
                behaviour=settings.behaviour,
            )
            frames = restore(
                clip,
                model.star,
                model.vae,
                model.positive,
                model.negative,
                settings,
                canvas,
                clip.part,
                on_progress=on_progress,
            )
            with clip.sink as sink:
                for frame in frames:
                    sink.write(frame)
                    if on_frame:
                        on_frame(frame)
    first = clips[0]
    width, height = first.size if first.region is None else map(len, first.region[::-1])
    return {
        "frames": sum(len(clip.part.wanted) for clip in clips),
        "width": width,
        "height": height,
        "fps": None if job.stills else float(first.source.info.fps),
    }


@contextmanager
def _clips(job: Job, settings: Settings) -> Iterator[list[Clip]]:
    """Opens a job's clips; a folder of stills gets all of its results at the end, or none."""
    if not job.stills:
        source = open_video(job.source, deinterlace=job.deinterlace)
        yield [_clip(source, job.out, job, settings)]
        return
    if job.frames is not None:
        raise ValueError("stills are clips of one frame: leave out --frames")
    stills = open_stills(job.source)
    names = [f"{still.path.stem}.png" for still in stills]
    if double := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"{job.source} has two pictures that would become {double.pop()}: rename")
    if job.out.suffix and not job.out.is_dir():
        raise ValueError(f"{job.out.name}: stills go into a folder, name one without extension")
    existing = [name for name in names if (job.out / name).exists()]
    if existing and not job.overwrite:
        raise ValueError(
            f"{job.out / existing[0]} exists already: choose another folder, or allow overwriting"
        )
    folder = job.out.absolute().parent / f".star-{secrets.token_hex(8)}"
    folder.mkdir()
    try:
        yield [
            _clip(still, folder / name, job, settings)
            for still, name in zip(stills, names, strict=True)
        ]
        job.out.mkdir(exist_ok=True)
        for name in names:
            os.replace(folder / name, job.out / name)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _clip(source: VideoSource, out: Path, job: Job, settings: Settings) -> Clip:
    info, behaviour = source.info, settings.behaviour
    total = info.frame_count
    wanted = range(total)
    if job.frames is not None:
        wanted = range(job.frames[0], total if job.frames[1] is None else job.frames[1])
    box = _box(job.crop, info.width, info.height)
    size = output_size(info.width, info.height, job.scale, job.out_size)
    if max(size) > 2**15:
        raise ValueError(
            f"the result would be {size[0]}x{size[1]}: at most {2**15} pixels a side are possible"
        )
    scales = (job.scale, job.scale) if job.scale else (size[0] / info.width, size[1] / info.height)
    region = box and _enlarged(box, scales, size)

    def part_of(total: int, wanted: range | None = None) -> Part:
        return Part.of(
            total,
            wanted,
            chunk=settings.chunk,
            decode_window=settings.sampling.decode_window,
            behaviour=behaviour,
        )

    def frames_of(frames: range) -> VideoSource:
        if frames == range(total):
            return source
        return open_video(
            job.source, frames=(frames.start, frames.stop), deinterlace=job.deinterlace
        )

    part = part_of(total, wanted)
    cut_source = frames_of(wanted)
    if behaviour.previews == "alone":
        part = part_of(len(wanted))
        if region:
            size, region = (len(region[1]), len(region[0])), None
        looked_at = cut_source
    else:
        box, looked_at = None, frames_of(part.needed)
    width, height = size if region is None else map(len, region[::-1])
    sink = open_sink(
        out,
        width=width,
        height=height,
        source=cut_source,
        codec=job.codec,
        overwrite=job.overwrite,
        alpha=info.has_alpha,
        rounding=behaviour.rounding,
        dither_seed=settings.seed,
    )
    return Clip(source=looked_at, sink=sink, part=part, box=box, size=size, region=region)


def _box(crop: tuple[int, int, int, int] | None, width: int, height: int) -> Region | None:
    if crop is None:
        return None
    w, h, x, y = crop
    if min(w, h) < 1 or min(x, y) < 0 or x + w > width or y + h > height:
        raise ValueError(
            f"crop {w}x{h}+{x}+{y} is not inside the frame, which is displayed as {width}x{height}"
        )
    return range(y, y + h), range(x, x + w)


def _enlarged(box: Region, scales: tuple[float, float], size: tuple[int, int]) -> Region:
    """The box on the enlarged frame (width, height): corner and sides rounded as its size is."""
    parts = []
    for part, scale, limit in zip(box, scales[::-1], size[::-1], strict=True):
        length = math.floor(len(part) * scale + 0.5)
        start = min(math.floor(part.start * scale + 0.5), limit - length)
        parts.append(range(start, start + length))
    return parts[0], parts[1]
