"""Which frames and which pixels are computed, so that a preview equals that part of the full run.

`FrameSpan` answers for time and `Canvas` for space: a few requested frames need every window that
contributes to them, a requested crop needs the pixels around it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor

from ..parity import Behaviour
from .chunking import ChunkConfig, adjacent_or_overlapping, overlapping_windows
from .geometry import Padding, minimal_padding, pad, reference_padding

Region = tuple[range, range]  # rows, columns


@dataclass(frozen=True, kw_only=True)
class WindowGroup:
    """Consecutive frames whose windows are denoised together, merged at every sampling step.

    A short shot is one group. The groups of a long shot run one after the other, so that memory
    does not grow with its length.

    frames: the group's frames, as indices into `FrameSpan.needed` (0 is the first needed frame).
    windows: the denoiser's temporal windows, in latent frames counted from the group's first.
    shared: number of leading frames that also belong to the previous group.
    """

    frames: range
    windows: list[range]
    shared: int = 0


@dataclass(frozen=True, kw_only=True)
class FrameSpan:
    """The requested frames of a shot and everything that has to be computed to restore them.

    A frame's result depends on all frames of the windows that contain it. For example, frame 40 of
    a shot with windows 0:32 and 26:58 needs frames 26:58.

    requested: frames of the clip that are returned.
    needed: frames of the clip that are read: those of all windows that contribute to `requested`.
    groups: the denoiser's windows that lie in `needed`, grouped, in order.
    decode_windows: windows of the VAE's decoder that contain a requested frame, as indices into
        `needed` (0 is the first needed frame).
    """

    requested: range
    needed: range
    groups: list[WindowGroup]
    decode_windows: list[range]

    @classmethod
    def of(
        cls,
        shot: range,
        requested: range | None = None,
        *,
        chunk: ChunkConfig,
        decode_window: int,
        behaviour: Behaviour,
    ) -> "FrameSpan":
        """Returns the span that restores some frames of a shot exactly as the whole shot would.

        shot: the shot's frames within the clip. requested: frames of the clip to return, None for
        the whole shot. decode_window: frames that the VAE decodes together.
        Raises ValueError if `requested` is empty or not inside the shot.
        """
        requested = shot if requested is None else requested
        if not requested or requested.start < shot.start or requested.stop > shot.stop:
            raise ValueError(
                f"frames {requested.start}:{requested.stop} are not in the clip, which has "
                f"{shot.start}:{shot.stop}"
            )
        inside = _shifted(requested, -shot.start)
        if chunk.latent_frames > 1:
            groups = _separate_groups(len(shot), inside, chunk)
            needed = _covered([group.frames for group in groups])
            return cls(
                requested=requested,
                needed=_shifted(needed, shot.start),
                groups=[
                    replace(group, frames=_shifted(group.frames, -needed.start)) for group in groups
                ],
                decode_windows=[_shifted(group.frames, -needed.start) for group in groups],
            )
        decode_windows = _intersecting(
            adjacent_or_overlapping(len(shot), decode_window, behaviour.decode_overlap), inside
        )
        windows = overlapping_windows(
            len(shot), chunk.length, chunk.overlap, mode=behaviour.windows
        )
        merged = behaviour.long_clips == "merged" or len(shot) <= chunk.merged
        windows = _intersecting(windows, _covered(decode_windows))
        needed = _covered(windows)
        windows = [_shifted(w, -needed.start) for w in windows]
        return cls(
            requested=requested,
            needed=_shifted(needed, shot.start),
            groups=[WindowGroup(frames=_covered(windows), windows=windows)]
            if merged
            else _one_group_each(windows),
            decode_windows=[_shifted(w, -needed.start) for w in decode_windows],
        )


def _one_group_each(windows: Sequence[range]) -> list[WindowGroup]:
    previous_windows = [range(0), *windows]
    return [
        WindowGroup(
            frames=window, windows=[range(len(window))], shared=max(previous.stop - window.start, 0)
        )
        for previous, window in zip(previous_windows, windows, strict=False)
    ]


def _separate_groups(total: int, requested: range, chunk: ChunkConfig) -> list[WindowGroup]:
    """Groups of one window each, encoded on its own, that contain a requested frame."""
    windows = overlapping_windows(total, chunk.length, chunk.overlap, mode="shifted")
    windows = _intersecting(windows, requested)
    return [
        replace(group, windows=[range(-(-(len(group.frames) - 1) // chunk.latent_frames) + 1)])
        for group in _one_group_each(windows)
    ]


def _intersecting(windows: Sequence[range], frames: range) -> list[range]:
    return [w for w in windows if w.start < frames.stop and frames.start < w.stop]


def _covered(windows: Sequence[range]) -> range:
    return range(windows[0].start, windows[-1].stop)


def _shifted(interval: range, by: int) -> range:
    return range(interval.start + by, interval.stop + by)


@dataclass(frozen=True, kw_only=True)
class Canvas:
    """Coordinates of one enlarged frame: its padding, and what is computed and returned of it.

    For a whole frame, `view` is the padded frame and `region` the frame without padding. For a
    crop, `view` is the crop with a margin of context, aligned to the network's grid.

    size: (width, height) of the enlarged frame, in pixels like everything here.
    padding: added around the enlarged frame.
    region: rows and columns that are returned, in coordinates of the frame without padding.
    view: rows and columns that are computed, in coordinates of the padded frame.
    """

    size: tuple[int, int]
    padding: Padding
    region: Region
    view: Region

    @classmethod
    def of(
        cls,
        size: tuple[int, int],
        region: Region | None = None,
        *,
        vae_factor: int,
        levels: int,
        behaviour: Behaviour,
        margin: int = 32,
    ) -> "Canvas":
        """Returns the canvas of an enlarged frame of `size` = (width, height).

        region: rows and columns to return, None for all. vae_factor: pixels per latent. levels:
        number of down-samplings in the network. margin: latents of context around `region`.
        ValueError if the reference's padding does not fit the network, as with the built-in model.
        """
        width, height = size
        fitting = partial(minimal_padding, vae_factor=vae_factor, levels=levels)
        padding = (reference_padding if behaviour.padding == "white" else fitting)(height, width)
        rows, columns = _padded(size, padding)
        if any(fitting(rows, columns)):
            raise ValueError(
                f"the reference pads frames to {columns}x{rows}, which is not a size that this "
                "model takes: use the default behaviour, or a published model"
            )
        whole = (range(rows), range(columns))
        if region is None:
            return cls(size=size, padding=padding, region=(range(height), range(width)), view=whole)
        step = vae_factor * 2**levels
        rows, columns = (
            _with_context(_shifted(side, offset), full, step, margin * vae_factor)
            for side, offset, full in zip(region, (padding.top, padding.left), whole, strict=True)
        )
        return cls(size=size, padding=padding, region=region, view=(rows, columns))

    @property
    def padded(self) -> tuple[int, int]:
        """Height and width of the padded frame."""
        return _padded(self.size, self.padding)

    @property
    def view_size(self) -> tuple[int, int]:
        """Height and width of `view`, the part that is computed."""
        return len(self.view[0]), len(self.view[1])

    @property
    def visible(self) -> Region:
        """Rows and columns of `view` that are not padding, in coordinates of the frame."""
        rows, columns = (
            range(max(view.start - offset, 0), min(view.stop - offset, length))
            for view, offset, length in zip(
                self.view, (self.padding.top, self.padding.left), self.size[::-1], strict=True
            )
        )
        return rows, columns

    def network_input(self, frame: Tensor, behaviour: Behaviour) -> Tensor:
        """Returns the part of an enlarged frame (... h w) in [-1, 1] that is computed, padded."""
        return cut(pad(frame, self.padding, behaviour.padding), self.view)

    def crop(self, frame: Tensor) -> Tensor:
        """Returns the `visible` part of an enlarged frame (... h w) without padding."""
        return cut(frame, self.visible)

    def unpadded(self, video: Tensor) -> Tensor:
        """Removes the padding from computed frames (... h w), which leaves the `visible` part."""
        rows, columns = (
            _shifted(visible, offset - view.start)
            for visible, offset, view in zip(
                self.visible, (self.padding.top, self.padding.left), self.view, strict=True
            )
        )
        return cut(video, (rows, columns))

    def result(self, frame: Tensor) -> Tensor:
        """Cuts `region` out of the `visible` part (... h w) of a frame."""
        rows, columns = (
            _shifted(side, -visible.start)
            for side, visible in zip(self.region, self.visible, strict=True)
        )
        return cut(frame, (rows, columns))


def _padded(size: tuple[int, int], padding: Padding) -> tuple[int, int]:
    width, height = size
    return height + padding.top + padding.bottom, width + padding.left + padding.right


def _with_context(interval: range, whole: range, step: int, margin: int) -> range:
    """Returns `interval` with a margin, rounded outward to a start and length the network takes.

    The network's grid has steps of `step` and a remainder at the end (height is 2 mod 2^n latents).
    """
    remainder = len(whole) % step
    start = max(interval.start - margin, 0) // step * step
    steps = -(-(interval.stop + margin - remainder - start) // step)
    return range(start, min(start + steps * step + remainder, whole.stop))


def region_of(crop: tuple[int, int, int, int], width: int, height: int) -> Region:
    """Returns the rows and columns of a crop (width, height, x, y) of a frame, all in pixels.

    Raises ValueError if the crop is empty or not inside the frame of `width` x `height`.
    """
    w, h, x, y = crop
    if min(w, h) < 1 or min(x, y) < 0 or x + w > width or y + h > height:
        raise ValueError(
            f"crop {w}x{h}+{x}+{y} is not inside the frame, which is displayed as "
            f"{width}x{height}: choose another"
        )
    return range(y, y + h), range(x, x + w)


def cut(frame: Tensor, region: Region) -> Tensor:
    """Returns the region of a frame (... h w) as a view that shares its memory."""
    rows, columns = region
    return frame[..., rows.start : rows.stop, columns.start : columns.stop]
