"""Samples of clips in shards, degraded when they are drawn and then encoded."""

import json
import logging
import tarfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from ..degradation import Recipe, clean_target, degrade_video
from ..vae.cogvideox import CausalVideoVAE
from ..vae.frame_vae import VideoVAE
from ..video_io import open_video
from ..windows.geometry import upsample
from .objective import Sample

logger = logging.getLogger(__name__)

TRIES = 10  # clips that are tried for one sample, as in the reference
TEXTS = 512  # embeddings that are cached
PIXELS = 2**20  # that a VAE of frames encodes at a time


@dataclass(frozen=True, kw_only=True)
class SampleSize:
    """Size of a sample: `frames` frames of `size` (height, width), every `interval`-th of a clip.

    The defaults are STAR's.
    """

    frames: int = 32
    interval: int = 2
    size: tuple[int, int] = (720, 1280)

    def __post_init__(self) -> None:
        if min(self.frames, self.interval, *self.size) < 1:
            raise ValueError(
                f"frames, interval and size must be at least 1, got {self.frames}, "
                f"{self.interval}, {self.size[1]}x{self.size[0]}"
            )

    @property
    def length(self) -> int:
        """Frames that a clip needs."""
        return (self.frames - 1) * self.interval + 1

    def objection(self, frames: int, size: tuple[int, int]) -> str | None:
        """Returns why a clip of `frames` frames of `size` (height, width) is too small, or None."""
        if size[0] < self.size[0] or size[1] < self.size[1]:
            return f"smaller than {self.size[1]}x{self.size[0]}"
        return f"shorter than {self.length} frames" if frames < self.length else None


@dataclass(frozen=True, kw_only=True)
class StoredClip:
    """A clip inside a .tar file.

    name: of the member. offset, size: of the video, in bytes. frames, shape (height, width): as the
    shard's records state them, None if there is no record.
    """

    shard: Path
    name: str
    offset: int
    size: int
    caption: str
    frames: int | None = None
    shape: tuple[int, int] | None = None


def stored_clips(
    folder: Path, *, on_shard: Callable[[int, int], None] | None = None
) -> list[StoredClip]:
    """Lists the clips of all webdataset shards (*.tar) below a folder. ValueError if there is none.

    Members whose names are equal up to the first dot belong together. on_shard: called as
    on_shard(done, shards) after each shard.
    """
    clips, shards = [], sorted(folder.rglob("*.tar"))
    for number, shard in enumerate(shards):
        videos: dict[str, tarfile.TarInfo] = {}
        texts: dict[tuple[str, str], str] = {}
        try:
            with tarfile.open(shard) as tar:
                for member in tar:
                    key, _, suffix = member.name.partition(".")
                    if suffix in ("mp4", "mkv", "mov", "webm"):
                        videos[key] = member
                    elif suffix in ("txt", "json"):
                        text = tar.extractfile(member)
                        texts[key, suffix] = text.read().decode() if text else ""
        except (tarfile.TarError, OSError) as error:
            raise ValueError(f"{shard} is damaged ({error}): write or copy it again") from None
        for key, member in videos.items():
            record = _record(texts.get((key, "json"), ""))
            clips.append(
                StoredClip(
                    shard=shard,
                    name=member.name,
                    offset=member.offset_data,
                    size=member.size,
                    caption=texts.get((key, "txt"), ""),
                    frames=record and record[0],
                    shape=record and record[1],
                )
            )
        if on_shard:
            on_shard(number + 1, len(shards))
    if not clips:
        raise ValueError(f"{folder} holds no shards with clips: write them by the command dataset")
    return clips


def _record(text: str) -> tuple[int, tuple[int, int]] | None:
    """Returns frames and (height, width) of a clip's record; None if it has another form."""
    try:
        record = json.loads(text)
        (start, stop), (width, height) = record["frames"], record["size"]
        return stop - start, (height, width)
    except (ValueError, TypeError, LookupError):
        return None


def read_window(clip: StoredClip, sample: SampleSize, generator: torch.Generator) -> Tensor:
    """Returns frames (f 3 h w) in [0, 1], a random window and crop of a clip.

    ValueError if the clip cannot be read, or is shorter or smaller than the sample.
    """
    with TemporaryDirectory() as folder:
        path = Path(folder) / Path(clip.name).name
        with clip.shard.open("rb") as file:
            file.seek(clip.offset)
            path.write_bytes(file.read(clip.size))
        video = open_video(path)
        if objection := sample.objection(len(video), (video.info.height, video.info.width)):
            raise ValueError(f"it is {objection}")
        start = int(torch.randint(len(video) - sample.length + 1, (), generator=generator))
        window = video.cut(range(start, start + sample.length))
        frames = torch.stack([frame[:3] for frame in window.every(sample.interval)])
        return random_part(frames, sample.size, generator)


def random_part(video: Tensor, size: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Returns a random crop of `size` (height, width), the same in all frames (f c h w)."""
    room = [side - length for side, length in zip(video.shape[-2:], size, strict=True)]
    top, left = (int(torch.randint(space + 1, (), generator=generator)) for space in room)
    return video[..., top : top + size[0], left : left + size[1]]


class Pair(NamedTuple):
    """A clean clip (f 3 h w) and a degraded, smaller one, both uint8, and the caption.

    replaced: the clips that were drawn before this one and could not be read, with the reasons.
    """

    clean: Tensor
    degraded: Tensor
    caption: str
    replaced: tuple[str, ...] = ()


class VideoClips:
    """Random clips that are degraded anew every time they are drawn; needs no VAE and no device.

    folder: shards, see `stored_clips`. Clips that their records call shorter or smaller than a
    sample are left out, with a warning. caption_dropout: probability of an empty caption. on_shard:
    see `stored_clips`.
    ValueError if there are no clips of this size.
    """

    def __init__(
        self,
        folder: Path,
        recipe: Recipe,
        sample: SampleSize,
        *,
        caption_dropout: float = 0.5,
        on_shard: Callable[[int, int], None] | None = None,
    ) -> None:
        self.recipe, self.sample, self.caption_dropout = recipe, sample, caption_dropout
        self.clips: list[StoredClip] = []
        left_out = Counter[str]()
        for clip in stored_clips(folder, on_shard=on_shard):
            objection = None
            if clip.frames is not None and clip.shape is not None:
                objection = sample.objection(clip.frames, clip.shape)
            if objection is None:
                self.clips.append(clip)
            else:
                left_out[objection] += 1
        reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
        if not self.clips:
            raise ValueError(
                f"no clip in {folder} is large enough ({reasons}): lower --size, --clip-frames or "
                "--interval"
            )
        if reasons:
            logger.warning("%s: clips left out: %s", folder, reasons)

    def draw(self, generator: torch.Generator) -> Pair:
        """Returns a random clip, clean and degraded.

        In place of a clip that cannot be read, another one is drawn, the same one in every process.
        ValueError if many in a row cannot be read.
        """
        replaced = []
        for _ in range(TRIES):
            clip = self.clips[int(torch.randint(len(self.clips), (), generator=generator))]
            state = generator.get_state()
            try:
                video = read_window(clip, self.sample, generator)
                break
            except (ValueError, OSError) as error:
                replaced.append(f"{clip.shard.name}, {clip.name}: {error}")
                generator.set_state(state)
        else:
            raise ValueError(f"{TRIES} clips in a row cannot be used, the last {replaced[-1]}")
        seed = int(torch.randint(2**62, (), generator=generator))
        target = clean_target(video, self.recipe)
        small, _ = degrade_video(target, replace(self.recipe, sharpen=False), seed)
        dropped = torch.rand((), generator=generator).item() < self.caption_dropout
        clean, degraded = ((x * 255).round().clamp(0, 255).byte() for x in (target, small))
        return Pair(clean, degraded, "" if dropped else clip.caption, tuple(replaced))


class VideoSamples:
    """Latents of the clips that a source draws.

    source: clips. upsampling: mode in which the degraded clip is enlarged. text: caption ->
    embedding (l d), cached here; None if prompts are learned.
    """

    def __init__(
        self,
        source: VideoClips,
        vae: VideoVAE | CausalVideoVAE,
        *,
        upsampling: str = "bicubic",
        text: Callable[[str], Tensor] | None = None,
    ) -> None:
        self.source, self.vae, self.upsampling = source, vae, upsampling
        self._text = text and lru_cache(TEXTS)(lambda caption: text(caption).float().cpu())

    def videos(self, pair: Pair) -> tuple[Tensor, Tensor]:
        """Returns a clean clip and its degraded version enlarged, (f 3 h w) in [0, 1]."""
        device = self.vae.model.device
        clean, small = (x.to(device).float() / 255 for x in (pair.clean, pair.degraded))
        return clean, enlarged(small, (clean.shape[-2], clean.shape[-1]), self.upsampling)

    @torch.no_grad()
    def encode(self, pairs: Sequence[Pair]) -> list[Sample]:
        """Returns the latents of clips, encoded together, with the text if prompts need it."""
        videos = torch.cat([torch.stack(self.videos(pair)) for pair in pairs])
        hq, lq = self._encoded(videos * 2 - 1).cpu().unflatten(0, (len(pairs), 2)).unbind(1)
        texts = [self._text(pair.caption) if self._text else None for pair in pairs]
        return [Sample(*sample) for sample in zip(hq, lq, texts, strict=True)]

    def _encoded(self, videos: Tensor) -> Tensor:
        """Returns the latents (b c f h w) of videos (b f 3 h w) in [-1, 1]."""
        if isinstance(self.vae, CausalVideoVAE):
            return self.vae.encode(rearrange(videos, "b f c h w -> b c f h w"))
        count = max(1, PIXELS // (videos.shape[-2] * videos.shape[-1]))
        frames = rearrange(videos, "b f c h w -> (b f) c h w").split(count)
        latents = torch.cat([self.vae.encode_frame(part) for part in frames])
        return rearrange(latents, "(b f) c h w -> b c f h w", b=len(videos))

    def sample(self, generator: torch.Generator) -> Sample:
        """Returns a random sample, the same for the same state of the generator."""
        return self.encode([self.source.draw(generator)])[0]


def enlarged(small: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    """Enlarges frames (f c h w) in [0, 1] to `size` (height, width), as the pipeline does."""
    return upsample(small, (size[1], size[0]), mode).clamp(0, 1)  # pyright: ignore
