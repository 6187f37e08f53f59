"""What is compared: the same scene in several clips, brought to one size, frame beside frame."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ..evaluation.clip_folders import clips_in
from ..video_io import VideoSource, open_video
from ..windows.geometry import upsample


@dataclass(frozen=True, kw_only=True)
class Clip:
    """One version of a scene; frames come at the scene's size (width, height)."""

    name: str
    source: VideoSource
    size: tuple[int, int]

    def __iter__(self) -> Iterator[Tensor]:
        """Frames (3 h w) in [0, 1]."""
        for frame in self.source:
            frame = frame[:3]
            if frame.shape[-2:] != self.size[::-1]:
                frame = upsample(frame, self.size, "bicubic").clamp(0, 1)
            yield frame


@dataclass(frozen=True, kw_only=True)
class Scene:
    """Clips of equal size and frame count. reference: which of them is the truth, or None.

    notes: what had to be done to make them equal, in words for the viewer.
    """

    name: str
    clips: tuple[Clip, ...]
    reference: Clip | None
    notes: tuple[str, ...]

    @property
    def frames(self) -> int:
        return len(self.clips[0].source)

    @property
    def size(self) -> tuple[int, int]:
        return self.clips[0].size

    @property
    def fps(self) -> float:
        return float(self.clips[0].source.info.fps)


def find_scenes(
    paths: Sequence[Path],
    *,
    reference: Path | None = None,
    names: Sequence[str] = (),
    frames: tuple[int, int | None] | None = None,
) -> list[Scene]:
    """Scenes out of clips (one scene), or of folders with equally named clips (one scene each).

    names: what the clips are called; by default as the files or folders. frames: see `open_video`,
    the same of every clip. ValueError where the clips do not belong together.
    """
    if names and len(names) != len(paths):
        raise ValueError(f"{len(names)} names for {len(paths)} clips: give one for each")
    labels = list(names) or _labels(paths)
    if reference is not None and "reference" not in labels:
        labels, paths = [*labels, "reference"], [*paths, reference]
    elif reference is not None:
        raise ValueError("a clip is called reference, as the reference is: name it differently")
    if doubled := [label for label, count in Counter(labels).items() if count > 1]:
        raise ValueError(f"two clips are called {doubled[0]}: tell them apart with --names")
    has_reference = reference is not None

    every = [clips_in(path) for path in paths]
    if all(len(clips) == 1 for clips in every):
        files = [next(iter(clips.values())) for clips in every]
        return [_scene(paths[0].stem, labels, files, has_reference, frames)]
    common = [name for name in every[0] if all(name in clips for clips in every)]
    if not common:
        raise ValueError(
            "no clip has the same name in all folders: a scene is called alike in all of them"
        )
    left_out = sorted({name for clips in every for name in clips} - set(common))
    note = [f"Not in every folder, so left out: {', '.join(left_out)}."] if left_out else []
    return [
        _scene(name, labels, [clips[name] for clips in every], has_reference, frames, note)
        for name in common
    ]


def _labels(paths: Sequence[Path]) -> list[str]:
    """File or folder names; with the folder they lie in where that is what tells them apart."""
    stems = [path.stem if path.is_file() else path.name for path in paths]
    return [
        f"{path.absolute().parent.name}/{stem}" if stems.count(stem) > 1 else stem
        for path, stem in zip(paths, stems, strict=True)
    ]


def _scene(
    name: str,
    labels: Sequence[str],
    paths: Sequence[Path],
    has_reference: bool,
    frames: tuple[int, int | None] | None,
    notes: Sequence[str] = (),
) -> Scene:
    sources = [open_video(path, frames=frames) for path in paths]
    counts = [len(source) for source in sources]
    if len(set(counts)) > 1:
        found = ", ".join(f"{label} {count}" for label, count in zip(labels, counts, strict=True))
        raise ValueError(
            f"scene {name}: the clips have different numbers of frames ({found}): compare a range "
            f"that all have, such as --frames 0:{min(counts)}"
        )
    sizes = [(source.info.width, source.info.height) for source in sources]
    size = max(sizes, key=lambda size: size[0] * size[1])
    notes = list(notes)
    for label, (width, height) in zip(labels, sizes, strict=True):
        if (width, height) == size:
            continue
        # Rounding a side to whole pixels may cost up to one of the small ones.
        if abs(width * size[1] - height * size[0]) > max(size):
            raise ValueError(
                f"scene {name}: {label} is {width}x{height}, another clip {size[0]}x{size[1]}: "
                "these are different shapes, cut or pad them first"
            )
        notes.append(
            f"{label} is {width}x{height}; it is shown and measured enlarged to "
            f"{size[0]}x{size[1]} (bicubic)."
        )
    rates = [source.info.fps for source in sources]
    if any(abs(rate / rates[0] - 1) > 1e-3 for rate in rates):
        found = ", ".join(
            f"{label} {rate}" for label, rate in zip(labels, map(float, rates), strict=True)
        )
        notes.append(
            f"The frame rates differ ({found}); frame is shown beside frame at {float(rates[0]):g}."
        )
    elif not sources[0].info.constant_rate:
        notes.append(
            f"The frames have times of their own; shown at their mean {rates[0]} a second."
        )
    clips = tuple(
        Clip(name=label, source=source, size=size)
        for label, source in zip(labels, sources, strict=True)
    )
    return Scene(
        name=name,
        clips=clips,
        reference=clips[-1] if has_reference else None,
        notes=tuple(notes),
    )
