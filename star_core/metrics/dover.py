"""DOVER, how good a video looks without ground truth (Wu et al. 2023): one score for all of it.

Two networks see it: one small original fragments (technical quality), one whole frames made small
(aesthetic quality). Official attribute names: `technical_backbone`, `technical_head` ...
"""

import math
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Protocol

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..checkpoints.tensors import open_tensors
from .meters import Meter
from .video_convnext import VideoConvNeXt
from .video_swin import VideoSwin
from .weights import find_weights

SIDE, FRAGMENT, GRID = 224, 32, 7
FRAMES, CLIPS, STEP = 32, 3, 2


class DOVER(nn.Module):
    """Clips (b 3 32 224 224), normalised by ImageNet's statistics, to raw scores (b,)."""

    def __init__(self, technical: VideoSwin | None = None, aesthetic: VideoConvNeXt | None = None):
        super().__init__()
        self.technical_backbone = technical or VideoSwin()
        self.technical_head = _Head(self.technical_backbone.norm.normalized_shape[0])
        self.aesthetic_backbone = aesthetic or VideoConvNeXt()
        self.aesthetic_head = _Head(self.aesthetic_backbone.norm.normalized_shape[0])

    def technical(self, clips: Tensor) -> Tensor:
        return self.technical_head(self.technical_backbone(clips)).mean(dim=(1, 2, 3, 4))

    def aesthetic(self, clips: Tensor) -> Tensor:
        return self.aesthetic_head(self.aesthetic_backbone(clips)).mean(dim=(1, 2, 3, 4))


class Scores(Protocol):
    """What DOVER gives: raw scores (b,) of clips (b 3 32 224 224)."""

    def technical(self, clips: Tensor) -> Tensor: ...

    def aesthetic(self, clips: Tensor) -> Tensor: ...


class _Head(nn.Module):
    def __init__(self, dim: int, hidden: int = 64) -> None:
        super().__init__()
        self.fc_hid = nn.Conv3d(dim, hidden, 1)
        self.fc_last = nn.Conv3d(hidden, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc_last(F.gelu(self.fc_hid(x)))


def fused(technical: float, aesthetic: float) -> float:
    """The overall score in [0, 1] from the two raw ones, with the authors' constants."""
    x = 0.6104 * (technical - 0.1107) / 0.07355 + 0.3896 * (aesthetic + 0.08285) / 0.03774
    return 1 / (1 + math.exp(-x))


def technical_frames(count: int, generator: torch.Generator) -> list[int]:
    """Which frames the technical view takes of `count`: 3 thirds, 32 of each, every second one.

    Each third's start is drawn, as the authors do. A short video begins again at its end.
    """
    third = count // CLIPS
    room = third - FRAMES * STEP
    starts = [third * n + _drawn(room, generator) for n in range(CLIPS)]
    return [(start + STEP * n) % count for start in starts for n in range(FRAMES)]


def aesthetic_frames(count: int, generator: torch.Generator) -> list[int]:
    """Which frames the aesthetic view takes of `count`: one, drawn, of each of 32 parts."""
    part = count // FRAMES
    return [(part * n + _drawn(part - STEP, generator)) % count for n in range(FRAMES)]


def _drawn(room: int, generator: torch.Generator) -> int:
    """0 to room - 1."""
    return int(torch.randint(room, (1,), generator=generator)) if room > 0 else 0


def fragments(frame: Tensor, offsets: Tensor) -> Tensor:
    """7x7 fragments of 32x32 pixels from all over a frame (c h w), side by side: (c 224 224).

    offsets (7 7 2) in [0, 1): where in its part of the frame each lies, down and across. A frame
    with a side below 224 is enlarged first.
    """
    if min(frame.shape[-2:]) < SIDE:
        scale = SIDE / min(frame.shape[-2:])
        size = [max(SIDE, round(side * scale)) for side in frame.shape[-2:]]
        frame = F.interpolate(frame[None], size, mode="bilinear", align_corners=False)[0]
    h, w = (side // GRID for side in frame.shape[-2:])
    parts = []
    for row in range(GRID):
        for column in range(GRID):
            down, across = offsets[row, column].tolist()
            top = row * h + int(down * (h - FRAGMENT))
            left = column * w + int(across * (w - FRAGMENT))
            parts.append(frame[:, top : top + FRAGMENT, left : left + FRAGMENT])
    return rearrange(torch.stack(parts), "(y x) c h w -> c (y h) (x w)", y=GRID)


class DoverMeter(Meter):
    """Keeps what the two views need of the frames as they pass: 128 pictures of 224x224.

    frames: how many there will be. What the authors draw at random is drawn from `seed`, so a
    video has one score.
    """

    def __init__(
        self, network: Scores, frames: int, *, device: torch.device | str = "cpu", seed: int = 0
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.network, self.device = network, device
        # Frame -> the places that it takes in each view.
        self.technical = _places(technical_frames(frames, generator))
        self.aesthetic = _places(aesthetic_frames(frames, generator))
        self.offsets = torch.rand(CLIPS, GRID, GRID, 2, generator=generator)
        self.views = {
            "technical": torch.zeros(CLIPS * FRAMES, 3, SIDE, SIDE),
            "aesthetic": torch.zeros(FRAMES, 3, SIDE, SIDE),
        }
        self.frames, self.index = frames, 0

    def add(self, restored: Tensor, reference: Tensor | None) -> None:
        for place in self.technical[self.index]:
            view = fragments(restored, self.offsets[place // FRAMES])
            self.views["technical"][place] = view
        if places := self.aesthetic[self.index]:
            small = F.interpolate(
                restored[None], (SIDE, SIDE), mode="bilinear", align_corners=False, antialias=True
            )
            self.views["aesthetic"][places] = small.cpu()
        self.index += 1

    @torch.inference_mode()
    def result(self) -> float:
        if self.index != self.frames:
            raise ValueError(f"DOVER was told of {self.frames} frames and got {self.index}")

        def score(view: str, network: Callable[[Tensor], Tensor]) -> float:
            clips = rearrange(self.views[view], "(b f) c h w -> b 1 c f h w", f=FRAMES)
            return fmean(network(_normalised(clip.to(self.device))).item() for clip in clips)

        return fused(
            score("technical", self.network.technical), score("aesthetic", self.network.aesthetic)
        )


def _places(frames: list[int]) -> defaultdict[int, list[int]]:
    places: defaultdict[int, list[int]] = defaultdict(list)
    for place, frame in enumerate(frames):
        places[frame].append(place)
    return places


def _normalised(clip: Tensor) -> Tensor:
    mean, std = torch.tensor([[123.675, 116.28, 103.53], [58.395, 57.12, 57.375]]).to(clip)
    shape = (3, 1, 1, 1)
    return (255 * clip - mean.view(shape)) / std.view(shape)


def load_dover(*, folder: Path | str | None = None, device: torch.device | str = "cpu") -> DOVER:
    """DOVER with its published weights. ValueError if they are missing or do not fit."""
    path = find_weights("dover", folder)
    network = DOVER()
    expected = network.state_dict()
    given = {key: tensor for key, tensor in open_tensors(path).items() if key in expected}
    # Indices follow from the window; the file's are not needed.
    given |= {k: v for k, v in expected.items() if k.endswith("relative_position_index")}
    missing = expected.keys() - given.keys()
    wrong = [key for key in given if given[key].shape != expected[key].shape]
    if missing or wrong:
        first = sorted([*missing, *wrong])[0]
        raise ValueError(f"{path} is not DOVER: {first} is missing or of another shape")
    network.load_state_dict(given)
    return network.requires_grad_(False).eval().to(device)
