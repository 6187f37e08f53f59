"""DOVER, the quality of a whole video without a ground truth (Wu et al. 2023).

One network judges small fragments at full resolution (technical quality), another whole frames at
low resolution (aesthetic quality). Attribute names are the keys of the official checkpoint.
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
    """The two networks: clips (b 3 32 224 224), normalised by ImageNet's statistics -> scores."""

    def __init__(self, technical: VideoSwin | None = None, aesthetic: VideoConvNeXt | None = None):
        super().__init__()
        self.technical_backbone = technical or VideoSwin()
        self.technical_head = _Head(self.technical_backbone.norm.normalized_shape[0])
        self.aesthetic_backbone = aesthetic or VideoConvNeXt()
        self.aesthetic_head = _Head(self.aesthetic_backbone.norm.normalized_shape[0])

    def technical(self, clips: Tensor) -> Tensor:
        """Returns raw scores (b,) of technical quality."""
        return self.technical_head(self.technical_backbone(clips)).mean(dim=(1, 2, 3, 4))

    def aesthetic(self, clips: Tensor) -> Tensor:
        """Returns raw scores (b,) of aesthetic quality."""
        return self.aesthetic_head(self.aesthetic_backbone(clips)).mean(dim=(1, 2, 3, 4))


class Scores(Protocol):
    """The two methods of `DOVER` that `DoverMeter` needs."""

    def technical(self, clips: Tensor) -> Tensor:
        """Returns raw scores (b,) of technical quality of clips (b 3 32 224 224)."""
        ...

    def aesthetic(self, clips: Tensor) -> Tensor:
        """Returns raw scores (b,) of aesthetic quality of clips (b 3 32 224 224)."""
        ...


class _Head(nn.Module):
    def __init__(self, dim: int, hidden: int = 64) -> None:
        super().__init__()
        self.fc_hid = nn.Conv3d(dim, hidden, 1)
        self.fc_last = nn.Conv3d(hidden, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc_last(F.gelu(self.fc_hid(x)))


def fused(technical: float, aesthetic: float) -> float:
    """Returns the overall score in [0, 1] from the two raw ones, with the authors' constants."""
    x = 0.6104 * (technical - 0.1107) / 0.07355 + 0.3896 * (aesthetic + 0.08285) / 0.03774
    return 1 / (1 + math.exp(-x))


def technical_frames(count: int, generator: torch.Generator) -> list[int]:
    """Returns the frames, out of `count`, of the technical view: 32 of each third, every second.

    The start in each third is random, as in the authors' code. A short video is repeated.
    """
    third = count // CLIPS
    room = third - FRAMES * STEP
    starts = [third * n + _drawn(room, generator) for n in range(CLIPS)]
    return [(start + STEP * n) % count for start in starts for n in range(FRAMES)]


def aesthetic_frames(count: int, generator: torch.Generator) -> list[int]:
    """Returns the frames, out of `count`, of the aesthetic view: a random one in each 32nd."""
    part = count // FRAMES
    return [(part * n + _drawn(part - STEP, generator)) % count for n in range(FRAMES)]


def _drawn(room: int, generator: torch.Generator) -> int:
    """Draws an integer from 0 to room - 1."""
    return int(torch.randint(room, (1,), generator=generator)) if room > 0 else 0


def fragments(frame: Tensor, offsets: Tensor) -> Tensor:
    """Returns a picture (c 224 224) of 7x7 fragments of 32x32 pixels from all parts of a frame.

    frame: (c h w); one with a side below 224 is enlarged first. offsets: (7 7 2) in [0, 1), the
    position of each fragment in its part of the frame, down and across.
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
    """Measures DOVER in one pass; it stores the two views, 128 pictures of 224x224.

    frames: the video's number of frames. device: where the networks compute. seed: of the random
    choices, so that a video always has the same score.
    """

    def __init__(
        self, network: Scores, frames: int, *, device: torch.device | str = "cpu", seed: int = 0
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.network, self.device = network, device
        # For each frame, the positions that it has in each view.
        self.technical = _positions(technical_frames(frames, generator))
        self.aesthetic = _positions(aesthetic_frames(frames, generator))
        self.offsets = torch.rand(CLIPS, GRID, GRID, 2, generator=generator)
        self.views = {
            "technical": torch.zeros(CLIPS * FRAMES, 3, SIDE, SIDE),
            "aesthetic": torch.zeros(FRAMES, 3, SIDE, SIDE),
        }
        self.frames, self.index = frames, 0

    def add(self, restored: Tensor, reference: Tensor | None) -> None:
        """Copies the next frame's parts (3 h w) in [0, 1] into the views; `reference` is unused."""
        for position in self.technical[self.index]:
            view = fragments(restored, self.offsets[position // FRAMES])
            self.views["technical"][position] = view
        if positions := self.aesthetic[self.index]:
            small = F.interpolate(
                restored[None], (SIDE, SIDE), mode="bilinear", align_corners=False, antialias=True
            )
            self.views["aesthetic"][positions] = small.cpu()
        self.index += 1

    @torch.inference_mode()
    def result(self) -> float:
        """Returns the score in [0, 1]; ValueError unless all frames were added."""
        if self.index != self.frames:
            raise ValueError(f"DOVER expected {self.frames} frames and got {self.index}")

        def score(view: str, network: Callable[[Tensor], Tensor]) -> float:
            clips = rearrange(self.views[view], "(b f) c h w -> b 1 c f h w", f=FRAMES)
            return fmean(network(_normalised(clip.to(self.device))).item() for clip in clips)

        return fused(
            score("technical", self.network.technical), score("aesthetic", self.network.aesthetic)
        )


def _positions(frames: list[int]) -> defaultdict[int, list[int]]:
    positions: defaultdict[int, list[int]] = defaultdict(list)
    for position, frame in enumerate(frames):
        positions[frame].append(position)
    return positions


def _normalised(clip: Tensor) -> Tensor:
    mean, std = torch.tensor([[123.675, 116.28, 103.53], [58.395, 57.12, 57.375]]).to(clip)
    shape = (3, 1, 1, 1)
    return (255 * clip - mean.view(shape)) / std.view(shape)


def load_dover(*, folder: Path | str | None = None, device: torch.device | str = "cpu") -> DOVER:
    """Loads DOVER with its published weights.

    folder: of the weights, None for `weights.default_folder()`. Raises ValueError if they are
    missing or do not fit.
    """
    path = find_weights("dover", folder)
    network = DOVER()
    expected = network.state_dict()
    weights = {key: tensor for key, tensor in open_tensors(path).items() if key in expected}
    # The indices follow from the window's size; the file's are not needed.
    weights |= {k: v for k, v in expected.items() if k.endswith("relative_position_index")}
    missing = expected.keys() - weights.keys()
    wrong = [key for key in weights if weights[key].shape != expected[key].shape]
    if missing or wrong:
        first = sorted([*missing, *wrong])[0]
        raise ValueError(f"{path} is not DOVER: {first} is missing or of another shape")
    network.load_state_dict(weights)
    return network.requires_grad_(False).eval().to(device)
