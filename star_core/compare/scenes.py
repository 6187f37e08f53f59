"""Finds scenes: several clips of the same content, brought to one size, compared frame by frame."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ..checkpoints.tensors import first_names
from ..evaluation.clip_folders import clips_in
from ..video_io import VideoSource, open_video
from ..windows.geometry import upsample


@dataclass(frozen=True, kw_only=True)
class Clip:
    """One version of a scene. Iteration yields its frames (3 h w) in [0, 1] at the scene's size.

    size: width and height of the scene.
    """

    name: str
    source: VideoSource
    size: tuple[int, int]

    def __iter__(self) -> Iterator[Tensor]:
        for frame in self.source:
            frame = frame[:3]
            if frame.shape[-2:] != self.size[::-1]:
                frame = upsample(frame, self.size, "bicubic").clamp(0, 1)
            yield frame


@dataclass(frozen=True, kw_only=True)
class Scene:
    """Clips of equal size and frame count.

    reference: the clip that is the ground truth, or None. notes: how the clips were made equal, as
    sentences for the viewer.
    """

    name: str
    clips: tuple[Clip, ...]
    reference: Clip | None
    notes: tuple[str, ...]

    @property
    def frames(self) -> int:
        """The number of frames."""
        return len(self.clips[0].source)

    @property
    def size(self) -> tuple[int, int]:
        """Width and height."""
        return self.clips[0].size

    @property
    def fps(self) -> float:
        """The frame rate of the first clip."""
        return float(self.clips[0].source.info.fps)


def find_scenes(
    paths: Sequence[Path],
    *,
    reference: Path | None = None,
    names: Sequence[str] = (),
    frames: tuple[int, int | None] | None = None,
) -> list[Scene]:
    """Returns the scenes to compare.

    paths: clips of one scene, or folders whose equally named clips form one scene each. reference:
    a further clip or folder with the ground truth. names: the clips' names, by default those of the
    files or folders. frames: (A, B) selects frames A..B-1 of every clip; B None selects all from A.
    Raises ValueError for clips that do not belong together.
    """
    if names and len(names) != len(paths):
        raise ValueError(f"{len(names)} names for {len(paths)} clips: set one for each")
    labels = list(names) or _labels(paths)
    if reference is not None and "reference" not in labels:
        labels, paths = [*labels, "reference"], [*paths, reference]
    elif reference is not None:
        raise ValueError("a clip is called reference, as the reference is: name it differently")
    if repeated := [label for label, count in Counter(labels).items() if count > 1]:
        raise ValueError(f"two clips are called {repeated[0]}: name them differently with --names")
    has_reference = reference is not None

    folders = [clips_in(path) for path in paths]
    if all(len(clips) == 1 for clips in folders):
        files = [next(iter(clips.values())) for clips in folders]
        return [_scene(paths[0].stem, labels, files, has_reference, frames)]
    common = [name for name in folders[0] if all(name in clips for clips in folders)]
    if not common:
        raise ValueError(
            "no clip has the same name in all folders: use the same name for a scene in each"
        )
    left_out = sorted({name for clips in folders for name in clips} - set(common))
    note = [f"Not in every folder, so left out: {first_names(left_out)}."] if left_out else []
    return [
        _scene(name, labels, [clips[name] for clips in folders], has_reference, frames, note)
        for name in common
    ]


def _labels(paths: Sequence[Path]) -> list[str]:
    """Returns file or folder names, with their parent folder where two have the same name."""
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
        listed = ", ".join(f"{label} {count}" for label, count in zip(labels, counts, strict=True))
        raise ValueError(
            f"scene {name}: the clips have different numbers of frames ({listed}): compare a range "
            f"that all have, such as --frames 0:{min(counts)}"
        )
    sizes = [(source.info.width, source.info.height) for source in sources]
    size = max(sizes, key=lambda size: size[0] * size[1])
    notes = list(notes)
    for label, (width, height) in zip(labels, sizes, strict=True):
        if (width, height) == size:
            continue
        # Rounding a side to whole pixels changes it by at most one pixel of the smaller clip.
        if abs(width * size[1] - height * size[0]) > max(size):
            raise ValueError(
                f"scene {name}: {label} is {width}x{height}, another clip {size[0]}x{size[1]}: "
                "their aspect ratios differ, cut or pad them first"
            )
        notes.append(
            f"{label} is {width}x{height}; it is enlarged to {size[0]}x{size[1]} (bicubic) to be "
            "shown and measured."
        )
    rates = [source.info.fps for source in sources]
    if any(abs(rate / rates[0] - 1) > 1e-3 for rate in rates):
        listed = ", ".join(
            f"{label} {rate}" for label, rate in zip(labels, map(float, rates), strict=True)
        )
        notes.append(
            f"The frame rates differ ({listed}); all clips are shown frame by frame at "
            f"{float(rates[0]):g}."
        )
    elif not sources[0].info.constant_rate:
        notes.append(
            f"The frame rate varies; all clips are shown at the mean of {rates[0]} per second."
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
