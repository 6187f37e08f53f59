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
    """Degrades all frames of a video, or `frames` A..B-1, as one clip; returns the record.

    The record also goes to OUT.json, beside the result. Whatever extension stores without loss,
    .mkv or PNG, gives the same pixels for the same input, recipe and seed. on_progress(done,
    frames) is called for every frame; an exception from it leaves nothing behind.
    """
    sidecar = out.with_name(f"{out.name}.json")
    if sidecar.exists() and not overwrite:
        raise ValueError(f"{sidecar} exists: choose another name or allow overwriting")
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
