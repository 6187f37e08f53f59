"""Folders of clips: video files, folders of numbered images, single images; paired by name."""

from dataclasses import dataclass
from pathlib import Path

from ..video_io import images

VIDEOS = {".mp4", ".mkv", ".mov", ".mpg", ".mpeg", ".avi", ".webm", ".m4v", ".y4m", ".ts"}


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A restored clip and its ground truth, None where there is none."""

    name: str
    restored: Path
    reference: Path | None = None


def clips_in(path: Path) -> dict[str, Path]:
    """The clips that `path` stands for, by name, in order.

    A file, or a folder of images that are numbered without gaps, is one clip. Any other folder is
    its video files and its folders of images; if it has neither, each image in it is a clip.
    Hidden files do not count. ValueError if two clips have one name, or if there are none.
    """
    if not path.is_dir():
        return {path.stem: path}
    entries = sorted(entry for entry in path.iterdir() if not entry.name.startswith("."))
    clips = [e for e in entries if e.suffix.lower() in VIDEOS or (e.is_dir() and _pictures(e))]
    if not clips and _pictures(path):
        if _is_sequence(path):
            return {path.name: path}
        clips = _pictures(path)
    found: dict[str, Path] = {}
    for clip in clips:
        name = clip.name if clip.is_dir() else clip.stem
        if name in found:
            raise ValueError(
                f"{path} has {found[name].name} and {clip.name}: keep one clip of each name"
            )
        found[name] = clip
    if not found:
        raise ValueError(f"{path} holds no video, no image and no folder of images")
    return found


def pair_up(restored: Path, reference: Path | None) -> list[Pair]:
    """Restored clips with the ground truth of the same name; a single clip of each fits anyway.

    Ground truths without a restored clip are left alone. ValueError for a restored clip that has
    no ground truth.
    """
    for path in filter(None, (restored, reference)):
        if not path.exists() and not images.is_pattern(path.name):
            raise ValueError(f"{path} does not exist: check the name")
    ours = clips_in(restored)
    if reference is None:
        return [Pair(name=name, restored=path) for name, path in ours.items()]
    truths = clips_in(reference)
    if len(ours) == len(truths) == 1:
        ((name, path),) = ours.items()
        return [Pair(name=name, restored=path, reference=next(iter(truths.values())))]
    if alone := ours.keys() - truths.keys():
        raise ValueError(
            f"no ground truth is called {', '.join(sorted(alone))}: {reference} has "
            f"{', '.join(truths)}"
        )
    return [Pair(name=n, restored=path, reference=truths[n]) for n, path in ours.items()]


def _pictures(folder: Path) -> list[Path]:
    found = (entry for entry in folder.iterdir() if entry.suffix.lower() in images.SUFFIXES)
    return sorted(entry for entry in found if entry.is_file() and not entry.name.startswith("."))


def _is_sequence(folder: Path) -> bool:
    try:
        images.sequence_arguments(folder)
    except ValueError:
        return False
    return True
