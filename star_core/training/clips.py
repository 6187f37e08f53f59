"""Training clips: small crops cut from videos, and stills that a camera moves over."""

import math
from collections.abc import Iterator
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
    """size: (frames, height, width) of a clip. candidates: crops looked at for each one kept.

    stills: share of the clips that come from stills, where there are both stills and videos.
    cut: mean change between frames, in levels, from which neighbours may be two shots.
    """

    size: tuple[int, int, int] = (5, 104, 112)
    candidates: int = 5
    stills: float = 0.25
    cut: float = 14.0


def cut_clips(folder: Path, count: int, seed: int, config: ClipConfig) -> Tensor:
    """`count` clips from all videos and stills below a folder: uint8 (n f 3 h w).

    Of each `candidates` random crops one with much detail and motion is kept; clips across a cut
    are not. Half are flipped, half mirrored, half reversed. ValueError where nothing can be used.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    videos = [path for path in files if path.suffix.lower() in VIDEOS]
    stills = [path for path in files if path.suffix.lower() in STILLS]
    if not videos and not stills:
        raise ValueError(f"{folder} holds no videos or pictures to train on")
    draws = SeededRandom(torch.Generator().manual_seed(seed))
    share = config.stills if videos and stills else float(not videos)
    from_stills = round(count * share)
    clips = [_camera_move(draws, stills, config) for _ in range(from_stills)]
    for index, path in enumerate(videos):
        rest = count - from_stills
        wanted = rest * (index + 1) // len(videos) - rest * index // len(videos)
        clips += _from_video(draws, open_video(path), wanted, config)
    if not clips:
        raise ValueError(
            f"no video in {folder} has {config.size[0]} frames of at least "
            f"{config.size[2]}x{config.size[1]} pixels"
        )
    order = torch.randperm(len(clips), generator=draws.generator)
    return torch.stack([_turned(draws, clips[i]) for i in order])


def _turned(draws: SeededRandom, clip: Tensor) -> Tensor:
    return clip.flip([axis for axis in (0, 2, 3) if draws.chance(0.5)])


def _from_video(
    draws: SeededRandom, source: VideoSource, wanted: int, config: ClipConfig
) -> list[Tensor]:
    """Clips of one video, at full or half size, read once from beginning to end."""
    frames, height, width = config.size
    moments = max(1, len(source) // frames)
    per_moment = math.ceil(wanted / moments)
    clips: list[Tensor] = []
    window: list[Tensor] = []
    for frame in source:
        window.append(frame[:3])
        if len(window) < frames:
            continue
        for _ in range(min(per_moment, wanted - len(clips))):
            found = _best_crop(draws, torch.stack(window), config)
            if found is not None:
                clips.append(found)
        window.clear()
    return clips


def _best_crop(draws: SeededRandom, shot: Tensor, config: ClipConfig) -> Tensor | None:
    _, height, width = config.size
    best, most = None, -1.0
    for _ in range(config.candidates):
        half = draws.chance(0.5)
        needed = (2 * height, 2 * width) if half else (height, width)
        room = [have - want for have, want in zip(shot.shape[-2:], needed, strict=True)]
        if min(room) < 0:
            continue
        top, left = (draws.below(space + 1) for space in room)
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
        score *= draws.uniform(0.5, 1.0)  # or only the busiest corner of each video would be seen
        if score > most:
            best, most = (crop + 0.5).clamp(0, 255).byte(), score
    return best


def _camera_move(draws: SeededRandom, stills: list[Path], config: ClipConfig) -> Tensor:
    """A smooth move over a still: rendered at twice the size and averaged down."""
    frames, height, width = config.size
    (image,) = open_video(stills[draws.below(len(stills))])
    image = image[None, :3]
    h, w = image.shape[-2:]
    blur = 4 if draws.chance(0.25) else 1
    n = frames * blur
    zoom = min(draws.uniform(0.7, 1.35), (h - 8) / (2 * height), (w - 8) / (2 * width))
    speed = 10 ** draws.uniform(-0.7, 0.75)
    path = [_smooth_walk(draws, n, speed * 2 / blur) for _ in range(2)]
    angle = draws.uniform(-0.25, 0.25) + _smooth_walk(draws, n, 0.004)
    scale = zoom * torch.exp(_smooth_walk(draws, n, 0.004))
    reach = [min(size * zoom, side / 2) for size, side in ((height, h), (width, w))]
    center = [draws.uniform(r, side - r) for r, side in zip(reach, (h, w), strict=True)]
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
    return (video * draws.uniform(0.75, 1.15) * 255 + 0.5).clamp(0, 255).byte()


def _at(center: float, path: Tensor, side: int) -> Tensor:
    return (center + path) * 2 / side - 1


def _smooth_walk(draws: SeededRandom, steps: int, scale: float) -> Tensor:
    time = torch.arange(steps, dtype=torch.float32)
    walk = draws.normal() * time
    for _ in range(2):
        walk = walk + draws.normal(0.7) * torch.sin(time * draws.uniform(0.2, 1.2))
    return scale * (walk - walk.mean())


def clip_shards(
    folder: Path, out: Path, shards: int, per_shard: int, seed: int, config: ClipConfig
) -> Iterator[Path]:
    """Writes clips to `out` in files of `per_shard`, those that are there already left alone."""
    out.mkdir(parents=True, exist_ok=True)
    for index in range(shards):
        path = out / f"clips_{index:03d}.pt"
        if not path.exists():
            temporary = path.with_suffix(".part")
            torch.save(cut_clips(folder, per_shard, seed + index, config), temporary)
            temporary.rename(path)
        yield path
