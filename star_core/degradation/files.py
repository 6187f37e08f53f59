"""Degrades a file: `python -m star_core degrade`."""

import json
import os
import secrets
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

from ..video_io import open_sink, open_video
from .pipeline import Degradation, Recipe

OnProgress = Callable[[int, int], None]


def degrade_file(
    source: Path,
    out: Path,
    recipe: Recipe,
    seed: int,
    *,
    frames: tuple[int | None, int | None] | None = None,
    overwrite: bool = False,
    on_progress: OnProgress | None = None,
) -> dict[str, Any]:
    """Degrades a video as one clip and returns the record of the parameters.

    The record is also written to OUT.json, beside the result. Formats that store without loss, .mkv
    and PNG, have equal pixels for equal input, recipe and seed.

    out: its extension chooses the format, see `video_io.open_sink`. seed: from 0 to 2^64 - 1.
    frames: (A, B) selects frames A..B-1, None all. on_progress: called with the frames done and
    the frames in total; an exception from it leaves no file behind. Raises ValueError for a source
    that cannot be read, and for an existing result unless `overwrite`.
    """
    sidecar = out.with_name(f"{out.name}.json")
    if sidecar.exists() and not overwrite:
        raise ValueError(f"{sidecar} exists already: choose another name, or allow overwriting")
    video = open_video(source, frames=frames and (frames[0] or 0, frames[1]))
    degradation = Degradation(recipe, len(video), seed)
    small = degradation.apply(frame[:3] for frame in video)
    first = next(small)
    height, width = first.shape[-2:]
    record = {
        **degradation.record,
        "input": {"name": source.name, "frames": len(video)},
        "size": [width, height],
    }
    with open_sink(out, width=width, height=height, source=video, overwrite=overwrite) as sink:
        for index, frame in enumerate(chain([first], small)):
            sink.write(frame)
            if on_progress:
                on_progress(index + 1, len(video))
    temporary = sidecar.with_name(f".star-{secrets.token_hex(8)}.json")
    temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, sidecar)
    return record
