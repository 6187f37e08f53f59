"""Captions of videos: a text file beside each, or a CSV file of the whole folder."""

import csv
import sys
from pathlib import Path

# Columns for a file's name or path, and for its caption: OpenVid-1M's, and STAR's own.
_COLUMNS = (("video", "caption"), ("path", "text"))


def read_captions(folder: Path) -> dict[str, str]:
    """Captions by file name, of all CSV files right below a folder; {} if there are none.

    OpenVid-1M's CSV is read as it is: columns video and caption, others ignored.
    """
    captions: dict[str, str] = {}
    csv.field_size_limit(sys.maxsize)  # captions may be longer than csv expects
    for path in sorted(folder.glob("*.csv")):
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            names = reader.fieldnames or []
            found = next((pair for pair in _COLUMNS if set(pair) <= set(names)), None)
            if found is None:
                raise ValueError(
                    f"{path} has columns {', '.join(names)}: captions need video and caption, or "
                    "path and text"
                )
            for row in reader:
                captions[Path(row[found[0]]).name] = row[found[1]].strip()
    return captions


def caption_of(video: Path, captions: dict[str, str]) -> str | None:
    """What the text file beside a video says, else its line of a CSV file."""
    beside = video.with_suffix(".txt")
    if beside.exists():
        return beside.read_text(encoding="utf-8").strip()
    return captions.get(video.name)
