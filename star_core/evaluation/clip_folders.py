"""Finds clips in folders (videos, folders of numbered images, images) and pairs them by name."""

from dataclasses import dataclass
from pathlib import Path

from ..checkpoints.tensors import first_names
from ..video_io import images

VIDEOS = {".mp4", ".mkv", ".mov", ".mpg", ".mpeg", ".avi", ".webm", ".m4v", ".y4m", ".ts"}


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A restored clip and its ground truth, None without one."""

    name: str
    restored: Path
    reference: Path | None = None


def clips_in(path: Path) -> dict[str, Path]:
    """Returns the clips at `path` by their names, in order.

    A file is one clip, and so is a folder of images that are numbered without gaps. In any other
    folder the video files and folders of images are clips; without any, each image is a clip.
    Hidden files are ignored. Raises ValueError if two clips have the same name, or if there are
    none.
    """
    if not path.is_dir():
        return {path.stem: path}
    entries = sorted(entry for entry in path.iterdir() if not entry.name.startswith("."))
    clips = [e for e in entries if e.suffix.lower() in VIDEOS or (e.is_dir() and _pictures(e))]
    if not clips and _pictures(path):
        if _is_sequence(path):
            return {path.name: path}
        clips = _pictures(path)
    by_name: dict[str, Path] = {}
    for clip in clips:
        name = clip.name if clip.is_dir() else clip.stem
        if name in by_name:
            raise ValueError(
                f"{path} has {by_name[name].name} and {clip.name}: keep one clip of each name"
            )
        by_name[name] = clip
    if not by_name:
        raise ValueError(f"{path} contains no video, no image and no folder of images")
    return by_name


def pair_up(restored: Path, reference: Path | None) -> list[Pair]:
    """Pairs restored clips with the ground truth of the same name.

    A single clip of each is paired whatever its name. Ground truths without a restored clip are
    ignored. reference: None pairs no ground truth. Raises ValueError for a path that does not
    exist, and for a restored clip without ground truth.
    """
    for path in filter(None, (restored, reference)):
        if not path.exists() and not images.is_pattern(path.name):
            raise ValueError(f"{path} does not exist: check the name")
    clips = clips_in(restored)
    if reference is None:
        return [Pair(name=name, restored=path) for name, path in clips.items()]
    truths = clips_in(reference)
    if len(clips) == len(truths) == 1:
        ((name, path),) = clips.items()
        return [Pair(name=name, restored=path, reference=next(iter(truths.values())))]
    if unpaired := clips.keys() - truths.keys():
        raise ValueError(
            f"no ground truth is called {first_names(sorted(unpaired))}: {reference} has "
            f"{first_names(truths)}"
        )
    return [Pair(name=n, restored=path, reference=truths[n]) for n, path in clips.items()]


def _pictures(folder: Path) -> list[Path]:
    entries = (entry for entry in folder.iterdir() if entry.suffix.lower() in images.SUFFIXES)
    return sorted(entry for entry in entries if entry.is_file() and not entry.name.startswith("."))


def _is_sequence(folder: Path) -> bool:
    try:
        images.sequence_files(folder)
    except ValueError:
        return False
    return True
