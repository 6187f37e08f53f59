"""Chunked denoising: a clip of any length through windows of few frames (STAR, long video).

The state of the solver is that of the whole clip; only the prediction of x_0 is made window by
window, and merged, at every step. `overlapping_windows` is plain one-dimensional geometry.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Literal

import torch
from torch import Tensor

WindowMode = Literal["balanced", "reference", "shifted"]
Merge = Literal["smooth", "cut"]


@dataclass(frozen=True, kw_only=True)
class ChunkConfig:
    """Temporal windows for chunked denoising, in frames.

    latent_frames: frames of one of latents; if more than 1, the first of a window holds one alone,
    so that each window is encoded and decoded by itself, and its length fills whole latents.
    hold: of such windows, the frames that two share are held as the first has restored them while
    the next is denoised; off, they only fade into each other.
    merged: the windows of a clip of up to this many frames are merged at every step. Those of a
    longer one run one after the other, so that memory does not grow with the clip; what the first
    has found for the frames that two share (its x_0 at every step) is merged into the next.
    segment: so many frames are restored with the windows that they need, as if the others were not
    there, so that segments can be worked on at the same time; None for the whole clip.
    """

    length: int = 32
    overlap: int = 6
    merged: int = 128
    latent_frames: int = 1
    hold: bool = True
    segment: int | None = None

    def __post_init__(self) -> None:
        _check(self.length, self.overlap)
        for what, frames in (("hold", self.length), ("overlap by", self.overlap)):
            if frames and (frames - 1) % self.latent_frames:
                raise ValueError(
                    f"this model's chunks {what} {self.latent_frames}k+1 frames, got {frames}: try "
                    f"{frames // self.latent_frames * self.latent_frames + 1}"
                )
        if self.merged < 0:
            raise ValueError(f"merged must be at least 0 frames, got {self.merged}")
        if self.segment is not None and self.segment < 1:
            raise ValueError(f"segment must be at least 1 frame, got {self.segment}")

    def in_latents(self, each: int) -> tuple[int, int]:
        """Length and overlap of windows of latents, of `each` frames, that hold no fewer."""
        length = -(-self.length // each)
        return length, min(-(-self.overlap // each), length - 1)

    @classmethod
    def near(cls, length: int, overlap: int, latent_frames: int) -> "ChunkConfig":
        """With lengths rounded down to those that fill whole latents."""
        length, overlap = (frames and cut_to(frames, latent_frames) for frames in (length, overlap))
        return cls(length=length, overlap=overlap, latent_frames=latent_frames)


def cut_to(frames: int, latent_frames: int) -> int:
    """The most frames that fill whole latents, see `ChunkConfig`."""
    return (frames - 1) // latent_frames * latent_frames + 1


def filled_to(frames: int, latent_frames: int) -> int:
    """The fewest frames that fill whole latents and hold as many."""
    return -(-(frames - 1) // latent_frames) * latent_frames + 1


def usual_overlap(length: int, share: float, latent_frames: int = 1) -> int:
    """Frames that windows of `length` share with the next where nobody says how many.

    latent_frames: see `ChunkConfig`.
    """
    overlap = max(int(length * share), min(length - 1, 1))
    return filled_to(overlap, latent_frames) if overlap else 0


def _check(length: int, overlap: int) -> None:
    if length < 1:
        raise ValueError(f"length must be at least 1, got {length}")
    if not 0 <= overlap < length:
        raise ValueError(f"overlap must be in [0, {length}), got {overlap}")


def overlapping_windows(
    total: int, length: int, overlap: int, *, mode: WindowMode = "balanced"
) -> list[range]:
    """Windows of at most `length` that cover range(total), in order.

    "balanced": as few as can be, all equally long, neighbours sharing at least `overlap`.
    "shifted": all of `length`, one stride apart, the last moved back to end on the last frame.
    "reference": one stride apart, the last taking in a rest of up to a quarter of `length`, so it
    may be longer than asked.
    """
    _check(length, overlap)
    if total < 1:
        raise ValueError(f"nothing to cover: total must be at least 1, got {total}")
    if total <= length:
        return [range(total)]
    stride = length - overlap
    if mode == "shifted":
        starts = [*range(0, total - length, stride), total - length]
        return [range(start, start + length) for start in starts]
    if mode == "reference":
        count = max(math.ceil((total - 1.25 * length) / stride), 0)
        windows = [range(i * stride, i * stride + length) for i in range(count)]
        return [*windows, range(count * stride, total)]
    gaps = math.ceil((total - length) / stride)
    length = math.ceil((total + gaps * overlap) / (gaps + 1))
    starts = (i * (total - length) // gaps for i in range(gaps + 1))
    return [range(start, start + length) for start in starts]


def adjacent_or_overlapping(total: int, length: int, overlap: int) -> list[range]:
    """`overlapping_windows`, or without overlap one after the other, the last one shorter.

    The latter are the reference's windows of the VAE's decoder.
    """
    if overlap:
        return overlapping_windows(total, length, overlap)
    _check(length, overlap)
    return [range(i, min(i + length, total)) for i in range(0, total, length)]


def ramp(length: int) -> Tensor:
    """A raised cosine from above 0 to below 1; with its mirror image it sums to 1. float64."""
    return torch.sin(torch.pi / 2 * (torch.arange(length) + 0.5) / max(length, 1)) ** 2


def window_weights(windows: Sequence[range], merge: Merge = "smooth") -> list[Tensor]:
    """How much each window counts at each of its positions, float32; sums to 1 over the windows.

    "smooth": raised-cosine ramps where neighbours overlap, positive everywhere.
    "cut": 1 for the window whose part it is and 0 for others, changing amid the overlap.
    """
    weights = [torch.ones(len(window), dtype=torch.float64) for window in windows]
    for (left, right), (before, after) in zip(pairwise(weights), pairwise(windows), strict=True):
        shared = before.stop - after.start
        if merge == "cut":
            left[len(left) - shared + shared // 2 :] = 0
            right[: shared // 2] = 0
        else:
            left[len(left) - shared :] *= ramp(shared).flip(0)
            right[:shared] *= ramp(shared)
    sums = torch.zeros(windows[-1].stop, dtype=torch.float64)
    for window, weight in zip(windows, weights, strict=True):
        sums[window.start : window.stop] += weight
    return [
        (weight / sums[window.start : window.stop]).float()
        for window, weight in zip(windows, weights, strict=True)
    ]


def chunked(
    denoise_window: Callable[[Tensor, Tensor, range], Tensor],
    windows: Sequence[range],
    merge: Merge = "smooth",
) -> Callable[[Tensor, Tensor], Tensor]:
    """A denoiser of whole clips from one of windows.

    denoise_window: (x_in, sigma, window) -> x_0 of the frames in `window`, both (b c f h w).
    """
    weights = window_weights(windows, merge)

    def denoise(x_in: Tensor, sigma: Tensor) -> Tensor:
        if len(windows) == 1:
            return denoise_window(x_in, sigma, windows[0])
        x_0 = torch.zeros_like(x_in)
        for window, weight in zip(windows, weights, strict=True):
            part = slice(window.start, window.stop)
            weight = weight.to(x_in).reshape(-1, 1, 1)
            x_0[:, :, part] += weight * denoise_window(x_in[:, :, part], sigma, window)
        return x_0

    return denoise


def decode_in_windows(
    decode: Callable[[Tensor], Tensor], latents: Iterable[Tensor], windows: Sequence[range]
) -> Iterator[Tensor]:
    """Decodes windows of frames (b c h w) and blends what they share; yields what is finished.

    latents: from the first frame on, read as far as a window needs. What is before the first
    window or behind the last is not decoded.
    """

    def videos() -> Iterator[Tensor]:
        coming, held, first = iter(latents), [], 0  # latents from frame `first` on
        for window in windows:
            held += islice(coming, max(window.stop - first - len(held), 0))
            del held[: window.start - first]
            first = window.start
            yield decode(torch.stack(held, dim=2))

    return blend_windows(videos(), windows)


def blend_windows(videos: Iterable[Tensor], windows: Sequence[range]) -> Iterator[Tensor]:
    """Blends what the videos (b c f h w) of windows of frames share; yields what is finished."""
    carried = None  # weighted frames that the next window has its share in
    for i, (video, weight) in enumerate(zip(videos, window_weights(windows), strict=True)):
        window = windows[i]
        video = video * weight.to(video).reshape(-1, 1, 1)
        if carried is not None:
            video[:, :, : carried.shape[2]] += carried
        end = windows[i + 1].start if i + 1 < len(windows) else window.stop
        carried = video[:, :, end - window.start :]
        yield video[:, :, : end - window.start]
