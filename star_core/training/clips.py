"""Cuts training clips: small crops of videos, and camera moves over stills."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..seeded_random import SeededRandom
from ..video_io import VideoSource, open_video

STILLS = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff"}
VIDEOS = {".mp4", ".mkv", ".mov", ".mpg", ".mpeg", ".avi", ".webm"}


@dataclass(frozen=True, kw_only=True)
class ClipConfig:
    """How clips are cut.

    size: (frames, height, width) of a clip. candidates: random crops that each clip is the best of.
    stills: share of clips made from stills if there are both stills and videos. cut: mean change
    between neighbouring frames, in 8-bit levels, above which they may belong to two shots.
    """

    size: tuple[int, int, int] = (5, 104, 112)
    candidates: int = 5
    stills: float = 0.25
    cut: float = 14.0


def cut_clips(
    folder: Path,
    count: int,
    seed: int,
    config: ClipConfig,
    *,
    on_clip: Callable[[int], None] | None = None,
) -> Tensor:
    """Returns up to `count` clips of all videos and stills below a folder: uint8 (n f 3 h w).

    Of every `config.candidates` random crops one with much detail and motion is chosen, never one
    across a cut. Half of the clips are flipped, half mirrored, half reversed.

    on_clip: called with the number of clips so far. ValueError if the folder holds nothing that can
    be used.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    videos = [path for path in files if path.suffix.lower() in VIDEOS]
    stills = [path for path in files if path.suffix.lower() in STILLS]
    if not videos and not stills:
        raise ValueError(f"{folder} holds no videos or pictures to train on")
    rng = SeededRandom(torch.Generator().manual_seed(seed))
    share = config.stills if videos and stills else float(not videos)
    from_stills = round(count * share)
    report = on_clip or (lambda clips: None)
    clips: list[Tensor] = []
    for _ in range(from_stills):
        clips.append(_camera_move(rng, stills, config))
        report(len(clips))
    for index, path in enumerate(videos):
        rest = count - from_stills
        share = rest * (index + 1) // len(videos) - rest * index // len(videos)
        for clip in _from_video(rng, open_video(path), share, config):
            clips.append(clip)
            report(len(clips))
    if not clips:
        raise ValueError(
            f"no video in {folder} has {config.size[0]} frames of at least "
            f"{config.size[2]}x{config.size[1]} pixels"
        )
    order = torch.randperm(len(clips), generator=rng.generator)
    return torch.stack([_flipped(rng, clips[i]) for i in order])


def _flipped(rng: SeededRandom, clip: Tensor) -> Tensor:
    return clip.flip([axis for axis in (0, 2, 3) if rng.chance(0.5)])


def _from_video(
    rng: SeededRandom, source: VideoSource, count: int, config: ClipConfig
) -> Iterator[Tensor]:
    """Yields up to `count` clips of one video, at full or half size, in one pass over it."""
    frames = config.size[0]
    moments = max(1, len(source) // frames)
    per_moment = math.ceil(count / moments)
    found = 0
    window: list[Tensor] = []
    for frame in source:
        window.append(frame[:3])
        if len(window) < frames:
            continue
        for _ in range(min(per_moment, count - found)):
            clip = _best_crop(rng, torch.stack(window), config)
            if clip is not None:
                found += 1
                yield clip
        window.clear()


def _best_crop(rng: SeededRandom, shot: Tensor, config: ClipConfig) -> Tensor | None:
    """Returns the best of `config.candidates` random crops, None if none can be used."""
    _, height, width = config.size
    best, most = None, -1.0
    for _ in range(config.candidates):
        half = rng.chance(0.5)
        needed = (2 * height, 2 * width) if half else (height, width)
        room = [side - part for side, part in zip(shot.shape[-2:], needed, strict=True)]
        if min(room) < 0:
            continue
        top, left = (rng.below(space + 1) for space in room)
        crop = shot[:, :, top : top + needed[0], left : left + needed[1]] * 255
        crop = F.avg_pool2d(crop, 2) if half else crop
        green = crop[:, 1]
        change = (green[1:] - green[:-1]).abs().mean((1, 2))
        if len(change) and change.max() > max(config.cut, 3 * change.median().item()):
            continue
        detail = (green[0, 1:] - green[0, :-1]).abs().mean() + (
            green[0, :, 1:] - green[0, :, :-1]
        ).abs().mean()
        score = min(detail.item() / 2, 14) + 0.5 * min(change.mean().item(), 10)
        score *= rng.uniform(0.5, 1.0)  # or all crops would show the busiest corner of the video
        if score > most:
            best, most = (crop + 0.5).clamp(0, 255).byte(), score
    return best


def _camera_move(rng: SeededRandom, stills: list[Path], config: ClipConfig) -> Tensor:
    """Renders a smooth camera move over a random still at twice the size and averages it down."""
    frames, height, width = config.size
    (image,) = open_video(stills[rng.below(len(stills))])
    image = image[None, :3]
    h, w = image.shape[-2:]
    blur = 4 if rng.chance(0.25) else 1
    n = frames * blur
    zoom = min(rng.uniform(0.7, 1.35), (h - 8) / (2 * height), (w - 8) / (2 * width))
    speed = 10 ** rng.uniform(-0.7, 0.75)
    path = [_smooth_walk(rng, n, speed * 2 / blur) for _ in range(2)]
    angle = rng.uniform(-0.25, 0.25) + _smooth_walk(rng, n, 0.004)
    scale = zoom * torch.exp(_smooth_walk(rng, n, 0.004))
    reach = [min(size * zoom, side / 2) for size, side in ((height, h), (width, w))]
    center = [rng.uniform(r, side - r) for r, side in zip(reach, (h, w), strict=True)]
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    rows = [
        torch.stack([cos * 2 * width / w, -sin * 2 * height / w, _at(center[1], path[1], w)], 1),
        torch.stack([sin * 2 * width / h, cos * 2 * height / h, _at(center[0], path[0], h)], 1),
    ]
    grid = F.affine_grid(torch.stack(rows, 1), [n, 3, 2 * height, 2 * width], align_corners=False)
    video = F.grid_sample(
        image.expand(n, -1, -1, -1),
        grid,
        mode="bicubic",
        padding_mode="reflection",
        align_corners=False,
    )
    video = F.avg_pool2d(video.clamp(0, 1), 2).unflatten(0, (frames, blur)).mean(1)
    return (video * rng.uniform(0.75, 1.15) * 255 + 0.5).clamp(0, 255).byte()


def _at(center: float, path: Tensor, side: int) -> Tensor:
    return (center + path) * 2 / side - 1


def _smooth_walk(rng: SeededRandom, steps: int, scale: float) -> Tensor:
    """Returns a smooth random path (steps,) around 0: a drift and two waves."""
    time = torch.arange(steps, dtype=torch.float32)
    walk = rng.normal() * time
    for _ in range(2):
        walk = walk + rng.normal(0.7) * torch.sin(time * rng.uniform(0.2, 1.2))
    return scale * (walk - walk.mean())


def clip_shards(
    folder: Path,
    out: Path,
    shards: int,
    per_shard: int,
    seed: int,
    config: ClipConfig,
    *,
    on_clip: Callable[[int, int], None] | None = None,
) -> Iterator[Path]:
    """Yields the paths of `shards` files of `per_shard` clips; writes those that are missing.

    folder: of videos and stills, see `cut_clips`. out: folder of the files clips_NNN.pt. seed: of
    the first file; each further one adds 1. on_clip: called as on_clip(done, total) after each clip
    that is cut.
    """
    out.mkdir(parents=True, exist_ok=True)
    for index in range(shards):
        path = out / f"clips_{index:03d}.pt"
        if not path.exists():
            temporary = path.with_suffix(".part")

            def report(clips: int, before: int = index * per_shard) -> None:
                if on_clip:
                    on_clip(before + clips, shards * per_shard)

            torch.save(
                cut_clips(folder, per_shard, seed + index, config, on_clip=report), temporary
            )
            temporary.rename(path)
        yield path
