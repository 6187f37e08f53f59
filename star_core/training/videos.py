"""Samples of clips in shards, degraded and encoded when they are drawn."""

import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from einops import rearrange
from torch import Tensor

from ..degradation import Recipe, clean_target, degrade_video
from ..vae.cogvideox import CausalVideoVAE
from ..vae.frame_vae import VideoVAE
from ..video_io import open_video
from ..windows.geometry import upsample
from .objective import Sample


@dataclass(frozen=True, kw_only=True)
class StoredClip:
    """A clip inside a .tar file. offset, size: of the video, in bytes. suffix: without the dot."""

    shard: Path
    offset: int
    size: int
    suffix: str
    caption: str


def stored_clips(folder: Path) -> list[StoredClip]:
    """Lists the clips of all webdataset shards (*.tar) below a folder. ValueError if there is none.

    Members whose names are equal up to the first dot belong together.
    """
    clips = []
    for shard in sorted(folder.rglob("*.tar")):
        videos: dict[str, tarfile.TarInfo] = {}
        captions: dict[str, str] = {}
        with tarfile.open(shard) as tar:
            for member in tar:
                key, _, suffix = member.name.partition(".")
                if suffix in ("mp4", "mkv", "mov", "webm"):
                    videos[key] = member
                elif suffix == "txt":
                    text = tar.extractfile(member)
                    captions[key] = text.read().decode() if text else ""
        clips += [
            StoredClip(
                shard=shard,
                offset=member.offset_data,
                size=member.size,
                suffix=member.name.rpartition(".")[2],
                caption=captions.get(key, ""),
            )
            for key, member in videos.items()
        ]
    if not clips:
        raise ValueError(f"{folder} holds no shards with clips: write them by the command dataset")
    return clips


def read_window(clip: StoredClip, frames: int, interval: int, generator: torch.Generator) -> Tensor:
    """Returns frames (f 3 h w) in [0, 1] of a clip from a random position.

    interval: distance of neighbouring frames in the clip; less if the clip is too short for it.
    ValueError if the clip has fewer than `frames` frames.
    """
    with TemporaryDirectory() as folder:
        path = Path(folder) / f"clip.{clip.suffix}"
        with clip.shard.open("rb") as file:
            file.seek(clip.offset)
            path.write_bytes(file.read(clip.size))
        total = len(open_video(path))
        if total < frames:
            raise ValueError(f"a clip in {clip.shard} has {total} frames, training needs {frames}")
        interval = max(1, min(interval, (total - 1) // max(frames - 1, 1)))
        length = (frames - 1) * interval + 1
        start = int(torch.randint(total - length + 1, (), generator=generator))
        video = open_video(path, frames=(start, start + length))
        return torch.stack([frame[:3] for i, frame in enumerate(video) if i % interval == 0])


def random_part(video: Tensor, size: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Returns a random crop of `size` (height, width), the same in all frames (f c h w).

    ValueError if the frames are smaller.
    """
    room = [side - length for side, length in zip(video.shape[-2:], size, strict=True)]
    if min(room) < 0:
        height, width = video.shape[-2:]
        raise ValueError(f"a clip has {width}x{height} pixels, training needs {size[1]}x{size[0]}")
    top, left = (int(torch.randint(space + 1, (), generator=generator)) for space in room)
    return video[..., top : top + size[0], left : left + size[1]]


class VideoSamples:
    """Random clips that are degraded anew every time they are drawn.

    folder: shards, see `stored_clips`. frames, size (height, width), interval: of a sample, in
    frames and pixels of the clean video; the defaults are STAR's. upsampling: mode in which the
    degraded clip is enlarged. text: caption -> embedding (l d); None if prompts are learned.
    caption_dropout: probability of an empty caption. ValueError if there are no clips.
    """

    def __init__(
        self,
        folder: Path,
        vae: VideoVAE | CausalVideoVAE,
        recipe: Recipe,
        *,
        frames: int = 32,
        size: tuple[int, int] = (720, 1280),
        interval: int = 2,
        upsampling: str = "bicubic",
        text: Callable[[str], Tensor] | None = None,
        caption_dropout: float = 0.5,
    ) -> None:
        self.clips = stored_clips(folder)
        self.vae, self.recipe, self.text, self.caption_dropout = vae, recipe, text, caption_dropout
        self.frames, self.size, self.interval = frames, size, interval
        self.upsampling = upsampling

    def pair(self, generator: torch.Generator) -> tuple[Tensor, Tensor, str]:
        """Returns a clean and a degraded clip of one size (f 3 h w) in [0, 1], and the caption.

        ValueError if the clip is shorter or smaller than a sample.
        """
        clip = self.clips[int(torch.randint(len(self.clips), (), generator=generator))]
        video = read_window(clip, self.frames, self.interval, generator)
        video = random_part(video, self.size, generator)
        seed = int(torch.randint(2**62, (), generator=generator))
        small, _ = degrade_video(video, self.recipe, seed)
        return (
            clean_target(video, self.recipe),
            enlarged(small, self.size, self.upsampling),
            clip.caption,
        )

    @torch.no_grad()
    def sample(self, generator: torch.Generator) -> Sample:
        """Returns the latents of a clean and a degraded clip, with the text if prompts need it.

        ValueError if the clip is shorter or smaller than a sample.
        """
        clean, large, caption = self.pair(generator)
        both = rearrange(torch.stack([clean, large]) * 2 - 1, "b f c h w -> b c f h w")
        hq, lq = self.vae.encode(both).cpu()
        if self.text is None:
            return Sample(hq, lq)
        if torch.rand((), generator=generator).item() < self.caption_dropout:
            caption = ""
        return Sample(hq, lq, self.text(caption).float().cpu())


def enlarged(small: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    """Enlarges frames (f c h w) in [0, 1] to `size` (height, width), as the pipeline does."""
    return upsample(small, (size[1], size[0]), mode).clamp(0, 1)  # pyright: ignore
