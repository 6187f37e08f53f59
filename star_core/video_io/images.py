"""Finds images that are read as video: numbered sequences, and folders of unrelated stills."""

import re
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO, Literal

SUFFIXES = {
    ".png",
    ".jpg",
    ".jpeg",
    ".webp",
    ".bmp",
    ".tif",
    ".tiff",
    ".tga",
    ".ppm",
    ".pgm",
    ".exr",
}
_TIFF: dict[bytes, Literal["little", "big"]] = {b"II*\0": "little", b"MM\0*": "big"}
_NUMBERED = re.compile(r"(.*?)(\d+)(\D*)")
_PATTERN = re.compile(r"((?:[^%]|%%)*)%(?:0(\d+))?d((?:[^%]|%%)*)")


def is_pattern(name: str) -> bool:
    """Tests whether a file name is a pattern for a sequence, such as `%05d.png`."""
    return _PATTERN.fullmatch(name) is not None


def pattern_numbers(folder: Path, pattern: str) -> dict[int, Path]:
    """Returns the files in `folder` that match the pattern, by their number."""
    match = _PATTERN.fullmatch(pattern)
    if match is None or not folder.is_dir():
        return {}
    prefix, width, suffix = match[1].replace("%%", "%"), int(match[2] or 1), match[3]
    digits = rf"(\d{{{width},}})" if width > 1 else r"(0|[1-9]\d*)"
    exact = re.compile(re.escape(prefix) + digits + re.escape(suffix.replace("%%", "%")))
    matches = ((exact.fullmatch(path.name), path) for path in _visible(folder))
    return {int(match[1]): path for match, path in matches if match}


def sequence_files(path: Path) -> list[Path]:
    """Returns the images of a sequence in order.

    path: a pattern, or a folder of numbered images. Raises ValueError for a sequence that is empty,
    has gaps or mixes names.
    """
    folder, pattern = (path, _folder_pattern(path)) if path.is_dir() else (path.parent, path.name)
    files = pattern_numbers(folder, pattern)
    numbers = sorted(files)
    if not numbers:
        raise ValueError(f"no image in {folder} is named like {pattern}")
    if path.is_dir() and len(numbers) < len(still_paths(path)):
        raise ValueError(f"{path} numbers its images in different ways: treat it as stills")
    missing = numbers[-1] - numbers[0] + 1 - len(numbers)
    if missing:
        first = next(a + 1 for a, b in pairwise(numbers) if b > a + 1)
        raise ValueError(
            f"{path.name}: image {pattern % first} is missing ({missing} in total): "
            "number the images without gaps, or treat them as stills"
        )
    return [files[number] for number in numbers]


def check_readable(path: Path) -> None:
    """Raises ValueError for an image of which ffmpeg would read the first of several, or none."""
    with path.open("rb") as file:
        start = file.read(64)
        if start[8:12] == b"WEBP" and b"ANIM" in start:
            raise ValueError(f"{path.name} is an animated WebP image, which ffmpeg cannot decode")
        if start[:4] in _TIFF and _has_pages(file, _TIFF[start[:4]]):
            raise ValueError(
                f"{path.name} is a TIFF image of several pages, of which ffmpeg reads the first "
                "only: save every page as an image of its own"
            )


def _has_pages(file: BinaryIO, order: Literal["little", "big"]) -> bool:
    """Tests whether a TIFF image has more than one page, besides thumbnails and masks."""

    def number(data: bytes) -> int:
        return int.from_bytes(data, order)

    pages, link, seen = 0, 4, {0}
    while pages < 2:
        file.seek(link)
        start = number(file.read(4))
        if start in seen:
            break
        seen.add(start)
        file.seek(start)
        count = number(file.read(2))
        fields = [file.read(12) for _ in range(count)]
        link = start + 2 + 12 * count
        # NewSubfileType (TIFF 6.0, section 8): 1 for a smaller copy, 4 for a mask.
        kind = next((number(field[8:]) for field in fields if number(field[:2]) == 254), 0)
        pages += not kind & 5
    return pages > 1


def _visible(folder: Path) -> list[Path]:
    """The entries of a folder without hidden ones, such as .DS_Store and ._frame_0001.png."""
    return [path for path in folder.iterdir() if not path.name.startswith(".")]


def still_paths(folder: Path) -> list[Path]:
    """Returns the images in a folder, in order of their names; ValueError if there are none."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder: stills are read from a folder of images")
    images = (path for path in _visible(folder) if path.suffix.lower() in SUFFIXES)
    paths = sorted(path for path in images if path.is_file())
    if not paths:
        raise ValueError(f"{folder} contains no images ({' '.join(sorted(SUFFIXES))})")
    return paths


def _folder_pattern(folder: Path) -> str:
    """Returns the pattern that all images in a folder match."""
    patterns = set()
    widths = set()
    for path in still_paths(folder):
        match = _NUMBERED.fullmatch(path.stem)
        if match is None:
            raise ValueError(f"{path} has no number in its name: treat the folder as stills")
        patterns.add((match[1], match[3] + path.suffix))
        widths.add((len(match[2]), match[2].startswith("0")))
    if len(patterns) > 1:
        first, second = sorted(patterns)[:2]
        raise ValueError(
            f"{folder} mixes images named {first[0]}N{first[1]} and {second[0]}N{second[1]}, "
            "which is not one sequence: treat the folder as stills"
        )
    prefix, suffix = (part.replace("%", "%%") for part in patterns.pop())
    width = min(length for length, _ in widths)
    padded = any(zero for _, zero in widths) and width > 1
    return f"{prefix}%0{width}d{suffix}" if padded else f"{prefix}%d{suffix}"
