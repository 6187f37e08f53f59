"""Reads captions of videos from text files beside them or from CSV files of the folder."""

import csv
import sys
from pathlib import Path

# Columns of the file's name or path and of its caption: OpenVid-1M's, and STAR's own.
_COLUMNS = (("video", "caption"), ("path", "text"))


def read_captions(folder: Path) -> dict[str, str]:
    """Returns captions by file name from all CSV files directly in a folder; {} if there are none.

    The columns are video and caption, as in OpenVid-1M, or path and text; others are ignored.
    ValueError for a CSV file without these columns.
    """
    captions: dict[str, str] = {}
    csv.field_size_limit(sys.maxsize)  # captions may be longer than csv expects
    for path in sorted(folder.glob("*.csv")):
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            names = reader.fieldnames or []
            columns = next((pair for pair in _COLUMNS if set(pair) <= set(names)), None)
            if columns is None:
                raise ValueError(
                    f"{path} has the columns {', '.join(names)}: captions need video and caption, "
                    "or path and text"
                )
            for row in reader:
                captions[Path(row[columns[0]]).name] = row[columns[1]].strip()
    return captions


def caption_of(video: Path, captions: dict[str, str]) -> str | None:
    """Returns the text of the .txt file beside a video, else its entry in `captions`, else None.

    captions: by file name, from `read_captions`.
    """
    beside = video.with_suffix(".txt")
    if beside.exists():
        return beside.read_text(encoding="utf-8").strip()
    return captions.get(video.name)
