"""Chunked denoising: a clip of any length in windows of a few frames (STAR, long video).

The solver's state covers the whole clip; at every step x_0 is predicted window by window and the
predictions are merged. `overlapping_windows` is plain one-dimensional geometry.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Literal

import torch
from torch import Tensor

from ..devices import send

WindowMode = Literal["balanced", "reference", "shifted"]
Merge = Literal["smooth", "cut"]


@dataclass(frozen=True, kw_only=True)
class ChunkConfig:
    """Temporal windows for chunked denoising, in frames.

    length: frames of a window. overlap: frames that neighbouring windows share.
    merged: clips of up to this many frames have their windows merged at every step. The windows of
    a longer clip run one after the other, so that memory does not grow with the clip; each merges
    its predecessor's x_0 of the shared frames into its own at every step.
    latent_frames: video frames per latent frame. If more than 1, the first latent frame of a window
    holds a single frame, so each window is encoded and decoded on its own and its length must be
    latent_frames * k + 1.
    hold: only for latent_frames > 1. True fixes the shared frames to the previous window's result
    while a window is denoised; False only cross-fades them.
    segment: splits a clip into segments of this many frames that are restored independently, for
    example in parallel, each with all windows that its frames need; None for no split.
    """

    length: int = 32
    overlap: int = 6
    merged: int = 128
    latent_frames: int = 1
    hold: bool = True
    segment: int | None = None

    def __post_init__(self) -> None:
        _check(self.length, self.overlap)
        for verb, frames in (("hold", self.length), ("overlap by", self.overlap)):
            if frames and (frames - 1) % self.latent_frames:
                raise ValueError(
                    f"this model's chunks {verb} {self.latent_frames}k+1 frames, got {frames}: try "
                    f"{frames // self.latent_frames * self.latent_frames + 1}"
                )
        if self.merged < 0:
            raise ValueError(f"merged must be at least 0 frames, got {self.merged}")
        if self.segment is not None and self.segment < 1:
            raise ValueError(f"segment must be at least 1 frame, got {self.segment}")

    def in_latents(self, each: int) -> tuple[int, int]:
        """Returns length and overlap in latent frames of `each` frames, rounded up."""
        length = -(-self.length // each)
        return length, min(-(-self.overlap // each), length - 1)

    @classmethod
    def near(cls, length: int, overlap: int, latent_frames: int) -> "ChunkConfig":
        """Returns a config whose length and overlap are rounded down to fill whole latents.

        length, overlap: in frames. latent_frames: video frames per latent frame.
        """
        length, overlap = (frames and cut_to(frames, latent_frames) for frames in (length, overlap))
        return cls(length=length, overlap=overlap, latent_frames=latent_frames)


def cut_to(frames: int, latent_frames: int) -> int:
    """Rounds a number of frames down to latent_frames * k + 1, see `ChunkConfig`."""
    return (frames - 1) // latent_frames * latent_frames + 1


def filled_to(frames: int, latent_frames: int) -> int:
    """Rounds a number of frames up to latent_frames * k + 1, see `ChunkConfig`."""
    return -(-(frames - 1) // latent_frames) * latent_frames + 1


def usual_overlap(length: int, share: float, latent_frames: int = 1) -> int:
    """Returns the default overlap, in frames, of windows of `length` frames.

    share: overlap as a fraction of `length`. latent_frames: video frames per latent frame; the
    overlap is rounded up to latent_frames * k + 1.
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
    """Returns windows of `length` that cover range(total), in order.

    mode: "balanced" makes as few windows as possible, all equally long and at most `length`, whose
    neighbours share at least `overlap`. "shifted" makes all of `length`, one stride apart, and
    moves the last one back to end on the last frame. "reference" makes them one stride apart and
    extends the last by a remainder of up to a quarter of `length`.
    Raises ValueError unless total >= 1 and 0 <= overlap < length.
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
    """Returns balanced `overlapping_windows`, or adjacent windows if `overlap` is 0.

    Adjacent windows have `length`, except the last, which may be shorter. The reference's VAE
    decoder uses those. Raises ValueError unless total >= 1 and 0 <= overlap < length.
    """
    if overlap:
        return overlapping_windows(total, length, overlap)
    _check(length, overlap)
    return [range(i, min(i + length, total)) for i in range(0, total, length)]


def ramp(length: int) -> Tensor:
    """Returns a raised cosine from above 0 to below 1, (length,) float64.

    The ramp and its mirror image sum to 1.
    """
    return torch.sin(torch.pi / 2 * (torch.arange(length) + 0.5) / max(length, 1)) ** 2


def window_weights(windows: Sequence[range], merge: Merge = "smooth") -> list[Tensor]:
    """Returns each window's blend weights, float32; they sum to 1 at every position.

    windows: in order, covering everything from the first to the last.
    merge: "smooth" uses raised-cosine ramps where neighbours overlap, positive everywhere. "cut"
    switches from one window to the next in the middle of the overlap, with weights 1 and 0.
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
    """Makes a denoiser of whole clips, (x_in, sigma) -> x_0, from one of windows.

    denoise_window: (x_in, sigma, window) -> x_0 of the frames in `window`, both (b c f h w).
    windows: cover the clip, in order. merge: see `window_weights`.
    """
    weights = window_weights(windows, merge)

    def denoise(x_in: Tensor, sigma: Tensor) -> Tensor:
        if len(windows) == 1:
            return denoise_window(x_in, sigma, windows[0])
        x_0 = torch.zeros_like(x_in)
        for window, weight in zip(windows, weights, strict=True):
            frames = slice(window.start, window.stop)
            weight = send(weight, x_in.device, x_in.dtype).reshape(-1, 1, 1)
            x_0[:, :, frames] += weight * denoise_window(x_in[:, :, frames], sigma, window)
        return x_0

    return denoise


def decode_in_windows(
    decode: Callable[[Tensor], Tensor], latents: Iterable[Tensor], windows: Sequence[range]
) -> Iterator[Tensor]:
    """Decodes latents window by window; yields blended frames as soon as they are final.

    decode: latents (b c f h w) of a window -> video (b c f h w).
    latents: one (b c h w) per frame from frame 0 on, read no further than a window needs. Frames
    before the first window or after the last are not decoded.
    windows: in frames, in order.
    """

    def videos() -> Iterator[Tensor]:
        unread, buffer, first = iter(latents), [], 0  # the buffer begins at frame `first`
        for window in windows:
            buffer += islice(unread, max(window.stop - first - len(buffer), 0))
            del buffer[: window.start - first]
            first = window.start
            yield decode(torch.stack(buffer, dim=2))

    return blend_windows(videos(), windows)


def blend_windows(videos: Iterable[Tensor], windows: Sequence[range]) -> Iterator[Tensor]:
    """Blends the videos (b c f h w) of overlapping windows; yields frames once they are final.

    windows: in frames, in order, one for each video.
    """
    carried = None  # weighted frames that the next window's are added to
    videos = iter(videos)
    for i, (window, weight) in enumerate(zip(windows, window_weights(windows), strict=True)):
        video = next(videos)  # zip would keep it in memory while the next one is made
        video = video * weight.to(video).reshape(-1, 1, 1)
        if carried is not None:
            video[:, :, : carried.shape[2]] += carried
        end = windows[i + 1].start if i + 1 < len(windows) else window.stop
        carried = video[:, :, end - window.start :]
        yield video[:, :, : end - window.start]
