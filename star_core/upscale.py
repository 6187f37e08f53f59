"""From file to file: finds and opens everything, refuses what cannot work, restores, writes."""

import math
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from .backbones import Precision
from .background import behind
from .degradation.estimate import Degradation, estimate, spread
from .memory import DevicePlacement
from .model import Model, ModelFiles, Prompts
from .pipeline import Execution, Settings, ShotJob, placement_of, restore, store_latents
from .progress import Progress
from .resume import Work, identity_of, tensor_hash, work_folder
from .video_io import (
    WHOLE,
    Excerpt,
    OutputExists,
    VideoInfo,
    VideoSink,
    VideoSource,
    open_sink,
    open_stills,
    open_video,
)
from .windows.canvas import Canvas, FrameSpan, Region, cut, region_of
from .windows.geometry import output_size

# Raise it with every change to the code that changes the latents of a run: work that an earlier
# version has left is then computed again.
NUMERICS = 2


@dataclass(frozen=True, kw_only=True)
class Job:
    """The source and the result of a restoration.

    scale or out_size (width, height): exactly one. excerpt: all of the source that there is, for
    this job. frames and crop are previews of that, and show what the whole job would: (A, B) for
    frames A to B-1, B None for the end, and (width, height, x, y) in displayed pixels. stills: the
    source is a folder of unrelated pictures, the result a folder of as many. keep_work: what a run
    could go on from stays when it is done. Others as in `video_io`.
    """

    source: Path
    out: Path
    excerpt: Excerpt = WHOLE
    scale: float | None = None
    out_size: tuple[int, int] | None = None
    frames: tuple[int, int | None] | None = None
    crop: tuple[int, int, int, int] | None = None
    stills: bool = False
    deinterlace: Literal["auto", "off"] = "auto"
    codec: str | None = None
    overwrite: bool = False
    keep_work: bool = False

    def open(self) -> VideoSource:
        """The video, if it is one."""
        return open_video(self.source, excerpt=self.excerpt, deinterlace=self.deinterlace, hdr=True)


@dataclass(frozen=True, kw_only=True)
class ShotSettings:
    """How frames of the source that belong together are restored.

    frames: from the first to the last of a shot, whichever of them are wanted; None for all.
    """

    settings: Settings
    execution: Execution = Execution()
    frames: range | None = None
    prompts: Prompts = Prompts()


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """A job and everything that it is to be done with.

    dtype, attention, compiled, channels_last: see `model.load`.
    """

    job: Job
    files: ModelFiles
    whole: ShotSettings
    dtype: torch.dtype | None = None
    attention: str = "sdpa"
    compiled: bool = False
    channels_last: bool = False
    get_shots: Callable[[VideoSource], Sequence[ShotSettings]] | None = None

    @property
    def precision(self) -> Precision:
        """The types of the model's parts."""
        return self.files.backbone.precision(self.whole.execution.device, self.dtype)

    @property
    def loading(self) -> dict[str, Any]:
        """Arguments of `load`: where and in which type the model is loaded."""
        behaviour, device = self.whole.settings.behaviour, self.whole.execution.device
        return {"behaviour": behaviour, "device": device, "dtype": self.dtype}

    @property
    def computing(self) -> dict[str, Any]:
        """Arguments of `load`: how the network computes."""
        names = ("attention", "compiled", "channels_last")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, kw_only=True)
class Clip:
    """A clip ready to be restored: all that can be checked beforehand is checked.

    wanted: frames of the source. alone: they are treated as if they were all of it. box: rows and
    columns that are looked at, None for all. size: (width, height) of the whole enlarged frame,
    region: what comes out of it.
    """

    source: VideoSource
    sink: VideoSink
    wanted: range
    alone: bool
    box: Region | None
    size: tuple[int, int]
    region: Region | None

    def segments(
        self, shot_settings: Sequence[ShotSettings]
    ) -> list[tuple[FrameSpan, ShotSettings]]:
        """The segments to compute of each shot that has wanted frames, with the shot's settings."""
        segments = []
        for shot in shot_settings:
            frames = shot.frames or range(self.source.info.frame_count)
            inside = range(max(frames.start, self.wanted.start), min(frames.stop, self.wanted.stop))
            if not inside:
                continue
            if self.alone:
                first = self.wanted.start
                frames = inside = range(inside.start - first, inside.stop - first)
            chunk = shot.settings.chunk
            # counted from the shot's beginning, so that a preview has the same
            step = chunk.segment or len(frames)
            for start in range(frames.start, frames.stop, step):
                segment = range(max(start, inside.start), min(start + step, inside.stop))
                if not segment:
                    continue
                span = FrameSpan.of(
                    frames,
                    segment,
                    chunk=chunk,
                    decode_window=shot.settings.sampling.decode_window,
                    behaviour=shot.settings.behaviour,
                )
                segments.append((span, shot))
        return segments

    def plan(
        self, shot_settings: Sequence[ShotSettings], model: Model
    ) -> tuple[Canvas, list[ShotJob]]:
        """Returns the geometry of the enlarged frame, and what is computed for each shot."""
        canvas = Canvas.of(
            self.size,
            self.region,
            vae_factor=model.vae.factor,
            levels=model.star.config.downsamplings,
            behaviour=shot_settings[0].settings.behaviour,
        )
        shots = []
        for span, shot in self.segments(shot_settings):
            positive, negative = model.embeddings[shot.prompts]
            shots.append(
                ShotJob(
                    span=span,
                    positive=positive,
                    negative=negative,
                    settings=shot.settings,
                    execution=shot.execution,
                    transfer=self.source.info.color.transfer,
                )
            )
        return canvas, shots

    def frames(self, needed: range) -> "CroppedFrames":
        """Some frames, counted as those of the parts are."""
        first = self.wanted.start if self.alone else 0
        return CroppedFrames(
            self.source.cut(range(first + needed.start, first + needed.stop)), self.box
        )


@dataclass(frozen=True)
class CroppedFrames:
    """Frames, or one region of them."""

    source: VideoSource
    box: Region | None

    def __iter__(self) -> Iterator[Tensor]:
        return (frame if self.box is None else cut(frame, self.box) for frame in self.source)


def growth(job: Job, info: VideoInfo) -> float:
    """Returns by how much a source is enlarged, the lesser of its sides."""
    width, height = output_size(info.width, info.height, job.scale, job.out_size)
    return min(width / info.width, height / info.height)


def measure(job: Job, shots: Sequence[range]) -> list[tuple[Degradation, float]]:
    """Measures the degradation of shots and by how much each is enlarged.

    A shot is measured as a whole even if only a part of it is wanted.

    ValueError for frames that are too small to be measured.
    """
    source = job.open()
    scale = growth(job, source.info)

    def measured(shot: range) -> Degradation:
        frames = source.frames_at([shot[i] for i in spread(len(shot))])
        return estimate(torch.stack([frame[:3] for frame in frames]))

    return [(measured(shot), scale) for shot in shots]


@dataclass(frozen=True, kw_only=True)
class JobSurvey:
    """The facts about a job that are found once and handed to all that do a part of it.

    source: the video, with all of its frames' times and its hash; None for stills. shot_settings:
    of each shot. segments: the number of frames of each part that `store_segment` can do; stills
    have none.
    """

    source: VideoSource | None
    shot_settings: Sequence[ShotSettings]
    segments: Sequence[int] = ()


def upscale(
    job: Job,
    whole: ShotSettings,
    get_model: Callable[[Sequence[Prompts]], Model],
    *,
    get_shots: Callable[[VideoSource], Sequence[ShotSettings]] | None = None,
    found: JobSurvey | None = None,
    placement: DevicePlacement | None = None,
    on_progress: Progress | None = None,
    on_frame: Callable[[Tensor], None] | None = None,
) -> dict[str, object]:
    """Does a job, from file to file. Returns frames, width, height and fps of the result.

    whole: the settings of the whole source. get_shots: returns the shots of the whole source in
    order, with the behaviour, device and seed of `whole`; None for a single shot, which stills
    always are. get_model: returns the model for the prompts of all shots. Both are called once
    everything else is known to be in order. found: from `survey`, if that was called; the file is
    then not surveyed again, and `get_shots` is not called. placement, on_progress: see `restore`.
    on_frame: called with each restored frame (c h w), while a thread writes it. An exception from
    one of the last two ends the job; the same call resumes it.

    ValueError for whatever a user can mend.
    """
    with ExitStack() as stack:
        work, shot_settings = None, [whole]
        if job.stills:
            clips = stack.enter_context(_stills(job, whole.settings))
        else:
            source = (found and found.source) or job.open()
            work = stack.enter_context(Work(work_folder(job.out), out=job.out, keep=job.keep_work))
            clips = [_clip(source, job.out, job, whole.settings, scratch=work.folder)]
            if found:
                shot_settings = found.shot_settings
            elif get_shots:
                shot_settings = get_shots(source)
        model = get_model([shot.prompts for shot in shot_settings])
        if placement is None:  # one for all clips
            placement = stack.enter_context(placement_of(shot_settings[0].execution))
        for clip in clips:
            canvas, shots = clip.plan(shot_settings, model)
            if work:
                work.begin(_identity(job, clip, canvas, shots, model))
            needed = range(shots[0].span.needed.start, shots[-1].span.needed.stop)
            frames = restore(
                clip.frames(needed),
                model.star,
                model.vae,
                shots,
                canvas,
                work=work,
                placement=placement,
                on_progress=on_progress,
            )
            with clip.sink as sink:
                with closing(frames), behind(sink.write) as write:
                    for frame in frames:
                        write(frame)
                        if on_frame:
                            on_frame(frame)
                if work:
                    work.complete(sink.unfinished)
    first = clips[0]
    width, height = first.size if first.region is None else map(len, first.region[::-1])
    return {
        "frames": sum(len(clip.wanted) for clip in clips),
        "width": width,
        "height": height,
        "fps": None if job.stills else float(first.source.info.fps),
    }


def survey(
    job: Job, whole: ShotSettings, get_shots: Callable[[VideoSource], Sequence[ShotSettings]] | None
) -> JobSurvey:
    """Surveys a job: reads its video once, finds its shots and its segments.

    job, whole, get_shots: see `upscale`. Raises ValueError for whatever a user can correct.
    """
    if job.stills:
        return JobSurvey(source=None, shot_settings=[whole])
    source = job.open()
    clip = _clip(source, job.out, job, whole.settings)
    shot_settings = list(get_shots(source)) if get_shots else [whole]
    segments = [len(span.requested) for span, _ in clip.segments(shot_settings)]
    if len(segments) > 1:  # several workers need it
        source.digest  # noqa: B018
    return JobSurvey(source=source, shot_settings=shot_settings, segments=segments)


def store_segment(
    job: Job,
    found: JobSurvey,
    number: int,
    get_model: Callable[[Sequence[Prompts]], Model],
    *,
    on_progress: Progress | None = None,
) -> None:
    """Does one part of a job but for decoding, so that `upscale` finds it done.

    Several processes may do so at once, for the same job too, where they see the same files.
    found: of `survey`. number: of the segment. Others as in `upscale`.
    """
    source, shot_settings = found.source, found.shot_settings
    assert source is not None
    with Work(work_folder(job.out), out=job.out, shared=True) as work:
        clip = _clip(source, job.out, job, shot_settings[0].settings, scratch=work.folder)
        model = get_model([shot.prompts for shot in shot_settings])
        canvas, shots = clip.plan(shot_settings, model)
        work.begin(_identity(job, clip, canvas, shots, model))
        store_latents(
            clip.frames(shots[number].span.needed),
            model.star,
            model.vae,
            shots,
            number,
            canvas,
            work=work,
            on_progress=on_progress,
        )


def _identity(job: Job, clip: Clip, canvas: Canvas, shots: Sequence[ShotJob], model: Model) -> str:
    """Returns a hash of everything that the latents of a run depend on."""
    return identity_of(
        {
            "input": clip.source.digest,
            "excerpt": job.excerpt,
            "deinterlace": job.deinterlace,
            "numerics": NUMERICS,
            "packages": [version(package) for package in ("torch", "diffusers")],
            "box": clip.box,
            "canvas": canvas,
            "model": model.identity,
            "dtype": [_dtype(model.star.network), _dtype(model.vae.model)],
            "shots": [
                (shot.span, shot.settings, tensor_hash(shot.positive, shot.negative))
                for shot in shots
            ],
        }
    )


def _dtype(module: Any) -> torch.dtype:
    return next(module.parameters()).dtype


@contextmanager
def _stills(job: Job, settings: Settings) -> Iterator[list[Clip]]:
    """A clip for each picture of a folder; all of the results appear at the end, or none."""
    if job.frames is not None:
        raise ValueError("stills are clips of one frame: leave out --frames")
    stills = open_stills(job.source, hdr=True)
    names = [still.path.stem + still.info.color.image_suffix for still in stills]
    if double := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"{job.source} has two pictures that would become {double.pop()}: rename")
    if job.out.suffix and not job.out.is_dir():
        raise ValueError(f"{job.out.name}: stills go into a folder, name one without extension")
    existing = [name for name in names if (job.out / name).exists()]
    if existing and not job.overwrite:
        raise OutputExists(
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


def _clip(
    source: VideoSource,
    out: Path,
    job: Job,
    settings: Settings,
    *,
    scratch: Path | None = None,
) -> Clip:
    info = source.info
    wanted = everything = range(info.frame_count)
    if job.frames is not None:
        wanted = range(job.frames[0], len(everything) if job.frames[1] is None else job.frames[1])
        if not wanted or wanted.stop > len(everything):
            raise ValueError(
                f"frames {wanted.start}:{wanted.stop} are not in {job.source.name}, which has "
                f"0:{len(everything)}"
            )
    box = job.crop and region_of(job.crop, info.width, info.height)
    size = output_size(info.width, info.height, job.scale, job.out_size)
    if max(size) > 2**15:
        raise ValueError(
            f"the result would be {size[0]}x{size[1]}: at most {2**15} pixels a side are possible"
        )
    scales = (job.scale, job.scale) if job.scale else (size[0] / info.width, size[1] / info.height)
    region = box and _enlarged(box, scales, size)
    alone = settings.behaviour.previews == "alone"
    if not alone:
        box = None
    elif region:
        size, region = (len(region[1]), len(region[0])), None
    width, height = size if region is None else map(len, region[::-1])
    sink = open_sink(
        out,
        width=width,
        height=height,
        source=source.cut(wanted),
        codec=job.codec,
        overwrite=job.overwrite,
        alpha=info.has_alpha,
        rounding=settings.behaviour.rounding,
        dither_seed=settings.seed,
        scratch=scratch,
    )
    return Clip(
        source=source, sink=sink, wanted=wanted, alone=alone, box=box, size=size, region=region
    )


def _enlarged(box: Region, scales: tuple[float, float], size: tuple[int, int]) -> Region:
    """The box on the enlarged frame (width, height): corner and sides rounded as its size is."""
    segments = []
    for span, scale, limit in zip(box, scales[::-1], size[::-1], strict=True):
        length = math.floor(len(span) * scale + 0.5)
        start = min(math.floor(span.start * scale + 0.5), limit - length)
        segments.append(range(start, start + length))
    return segments[0], segments[1]
