"""What is computed so that a preview, a few frames or a crop, shows what the whole run shows."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from ..parity import Behaviour
from .chunking import ChunkConfig, adjacent_or_overlapping, overlapping_windows
from .geometry import Padding, minimal_padding, pad, reference_padding

Region = tuple[range, range]  # rows, columns


@dataclass(frozen=True, kw_only=True)
class WindowGroup:
    """Frames that are denoised together; a long clip has several, one after the other.

    frames: counted from the first frame needed. windows: of the denoiser, counted from the first
    of `frames`, in latents. shared: how many leading frames the piece before has too.
    """

    frames: range
    windows: list[range]
    shared: int = 0


@dataclass(frozen=True, kw_only=True)
class FrameSpan:
    """The frames of a shot to restore, and those that must be looked at for them.

    wanted: frames of the clip that come out. needed: frames that go in, all of every window that a
    wanted one depends on. pieces: the shot's temporal windows of the denoiser that lie in `needed`,
    in pieces. decode_windows: those of the VAE's decoder that hold a wanted frame, counted from the
    first frame needed.
    """

    wanted: range
    needed: range
    groups: list[WindowGroup]
    decode_windows: list[range]

    @classmethod
    def of(
        cls,
        shot: range,
        wanted: range | None = None,
        *,
        chunk: ChunkConfig,
        decode_window: int,
        behaviour: Behaviour,
    ) -> "FrameSpan":
        """Of a shot, frames of a clip; ValueError if `wanted` is empty or goes beyond them."""
        wanted = shot if wanted is None else wanted
        if not wanted or wanted.start < shot.start or wanted.stop > shot.stop:
            raise ValueError(
                f"frames {wanted.start}:{wanted.stop} are not in the clip, which has "
                f"{shot.start}:{shot.stop}"
            )
        inside = _shifted(wanted, -shot.start)
        if chunk.latent_frames > 1:
            groups = _by_themselves(len(shot), inside, chunk)
            needed = _span([group.frames for group in groups])
            return cls(
                wanted=wanted,
                needed=_shifted(needed, shot.start),
                groups=[
                    replace(group, frames=_shifted(group.frames, -needed.start)) for group in groups
                ],
                decode_windows=[_shifted(group.frames, -needed.start) for group in groups],
            )
        decode_windows = _touching(
            adjacent_or_overlapping(len(shot), decode_window, behaviour.decode_overlap), inside
        )
        windows = overlapping_windows(
            len(shot), chunk.length, chunk.overlap, mode=behaviour.windows
        )
        together = behaviour.long_clips == "merged" or len(shot) <= chunk.merged
        windows = _touching(windows, _span(decode_windows))
        needed = _span(windows)
        windows = [_shifted(w, -needed.start) for w in windows]
        return cls(
            wanted=wanted,
            needed=_shifted(needed, shot.start),
            groups=[WindowGroup(frames=_span(windows), windows=windows)]
            if together
            else _chain(windows),
            decode_windows=[_shifted(w, -needed.start) for w in decode_windows],
        )


def _chain(windows: Sequence[range]) -> list[WindowGroup]:
    """Each window a piece of its own."""
    before = [range(0), *windows]
    return [
        WindowGroup(
            frames=window, windows=[range(len(window))], shared=max(last.stop - window.start, 0)
        )
        for last, window in zip(before, windows, strict=False)
    ]


def _by_themselves(total: int, wanted: range, chunk: ChunkConfig) -> list[WindowGroup]:
    """Pieces of a shot, each of latents of its own, that hold a wanted frame."""
    windows = overlapping_windows(total, chunk.length, chunk.overlap, mode="shifted")
    windows = _touching(windows, wanted)
    return [
        replace(group, windows=[range(-(-(len(group.frames) - 1) // chunk.latent_frames) + 1)])
        for group in _chain(windows)
    ]


def _touching(windows: Sequence[range], span: range) -> list[range]:
    return [w for w in windows if w.start < span.stop and span.start < w.stop]


def _span(windows: Sequence[range]) -> range:
    return range(windows[0].start, windows[-1].stop)


def _shifted(span: range, by: int) -> range:
    return range(span.start + by, span.stop + by)


@dataclass(frozen=True, kw_only=True)
class Canvas:
    """Where things lie on the enlarged frame, all in its pixels.

    size: (width, height) of the enlarged frame. padding: around it. region: what comes out, in
    coordinates of the frame. view: what is computed, in coordinates of the padded frame.
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
        """levels: down-samplings of the network. margin: latents of context around `region`."""
        width, height = size
        if behaviour.padding == "white":
            padding = reference_padding(height, width)
        else:
            padding = minimal_padding(height, width, vae_factor=vae_factor, levels=levels)
        rows, columns = _padded(size, padding)
        whole = (range(rows), range(columns))
        if region is None:
            return cls(size=size, padding=padding, region=(range(height), range(width)), view=whole)
        step = vae_factor * 2**levels
        rows, columns = (
            _with_context(_shifted(span, first), full, step, margin * vae_factor)
            for span, first, full in zip(region, (padding.top, padding.left), whole, strict=True)
        )
        return cls(size=size, padding=padding, region=region, view=(rows, columns))

    @property
    def padded(self) -> tuple[int, int]:
        """Height and width of the padded frame."""
        return _padded(self.size, self.padding)

    @property
    def view_size(self) -> tuple[int, int]:
        """Height and width of what is computed."""
        return len(self.view[0]), len(self.view[1])

    @property
    def seen(self) -> Region:
        """The part of the frame, without padding, that is in view."""
        rows, columns = (
            range(max(view.start - first, 0), min(view.stop - first, length))
            for view, first, length in zip(
                self.view, (self.padding.top, self.padding.left), self.size[::-1], strict=True
            )
        )
        return rows, columns

    def look(self, frame: Tensor, behaviour: Behaviour) -> Tensor:
        """Enlarged frame (... h w) -> what is computed of it, padded."""
        return cut(pad(frame, self.padding, behaviour.padding), self.view)

    def crop(self, frame: Tensor) -> Tensor:
        """Enlarged frame (... h w) -> the part of it that is in `seen`."""
        return cut(frame, self.seen)

    def unpadded(self, video: Tensor) -> Tensor:
        """What was computed (... h w) -> the part of it that is no padding."""
        rows, columns = (
            _shifted(seen, first - view.start)
            for seen, first, view in zip(
                self.seen, (self.padding.top, self.padding.left), self.view, strict=True
            )
        )
        return cut(video, (rows, columns))

    def result(self, frame: Tensor) -> Tensor:
        """The part (... h w) of the frame in `seen` -> the part in `region`."""
        rows, columns = (
            _shifted(span, -seen.start) for span, seen in zip(self.region, self.seen, strict=True)
        )
        return cut(frame, (rows, columns))


def _padded(size: tuple[int, int], padding: Padding) -> tuple[int, int]:
    width, height = size
    return height + padding.top + padding.bottom, width + padding.left + padding.right


def _with_context(span: range, whole: range, step: int, margin: int) -> range:
    """A range around `span` that begins on the network's grid and has a length that it takes.

    The network's grid has steps of `step` and a rest at the end (height is 2 mod 2^n latents).
    """
    rest = len(whole) % step
    begin = max(span.start - margin, 0) // step * step
    steps = -(-(span.stop + margin - rest - begin) // step)
    return range(begin, min(begin + steps * step + rest, whole.stop))


def region_of(crop: tuple[int, int, int, int], width: int, height: int) -> Region:
    """The region of a (width, height, x, y); ValueError where it is not inside the frame."""
    w, h, x, y = crop
    if min(w, h) < 1 or min(x, y) < 0 or x + w > width or y + h > height:
        raise ValueError(
            f"crop {w}x{h}+{x}+{y} is not inside the frame, which is displayed as "
            f"{width}x{height}: choose another"
        )
    return range(y, y + h), range(x, x + w)


def cut(frame: Tensor, region: Region) -> Tensor:
    """The region of (... h w), a view."""
    rows, columns = region
    return frame[..., rows.start : rows.stop, columns.start : columns.stop]
