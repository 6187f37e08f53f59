"""Writes the comparison page: video, metrics and program in one HTML file without network access.

All clips of a scene are encoded as one video, one above the other, because browsers synchronise
several videos only roughly. Below the clips each frame contains its number, because browsers have
no common way to report the displayed frame.
"""

import base64
import html
import json
import math
import tempfile
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import IO, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import metrics as measures
from ..progress import Counter, Progress
from ..video_io import open_sink
from ..video_io.targets import FileTarget
from .scenes import Scene
from .votes import QUESTIONS

FOLDER = Path(__file__).with_name("page")
SCRIPTS = ("player.js", "view.js", "curves.js", "vote.js", "main.js")
LONGEST_SIDE = 16384  # of a VP9 picture in Chromium
NUMBER_BITS, NUMBER_BLOCK = 16, 8  # lowest bit first, white for 1; a block's side in pixels
BASE64_BLOCK = 3 * 2**20  # bytes; a multiple of three, so that each block decodes separately


def write_page(
    scenes: Sequence[Scene],
    out: Path,
    *,
    title: str,
    metrics: Sequence[str],
    seed: int = 0,
    overwrite: bool = False,
    on_progress: Progress | None = None,
) -> list[str]:
    """Writes the page that compares `scenes`; returns why metrics have no value, one line each.

    metrics: keys of `star_core.metrics.METRICS`; the page shows why one of them has no value. seed:
    of the shuffling in blind mode. on_progress: called with the stage ("measure" or "encode"), the
    frames done and their number; an exception from it ends the run and leaves no file behind.
    Raises ValueError for an existing file without `overwrite`, and for clips that are too large for
    one video.
    """
    report = on_progress or (lambda stage, done, total: None)
    for scene in scenes:
        _check(scene)
    target = FileTarget(out.absolute(), overwrite=overwrite, scratch=None)
    target.prepare()
    try:
        described = [_described(scene, metrics, report) for scene in scenes]
        data = {
            "title": title,
            "seed": seed,
            "questions": [{"id": name, "text": text} for name, text in QUESTIONS.items()],
            "scenes": described,
        }
        with target.temporary.open("w", encoding="utf-8", newline="\n") as page:
            for part, name in _template():
                page.write(part)
                if name == "videos":
                    for index, scene in enumerate(scenes):
                        _write_video(page, index, scene, report)
                elif name == "data":
                    # "</script" inside a name must not end the element.
                    page.write(json.dumps(data, allow_nan=False).replace("<", "\\u003c"))
                elif name:
                    page.write(_text(name, title))
        target.commit()
        notes = (note for scene in described for note in scene["missing"])
        return list(dict.fromkeys(notes))
    finally:
        target.discard()


def _template() -> Iterator[tuple[str, str]]:
    """Yields parts of the page's text, each with the name of the placeholder that follows it."""
    remainder = (FOLDER / "page.html").read_text(encoding="utf-8")
    while remainder:
        part, _, remainder = remainder.partition("{{")
        name, _, remainder = remainder.partition("}}")
        yield part, name


def _text(name: str, title: str) -> str:
    if name == "title":
        return html.escape(title)
    if name == "style":
        return (FOLDER / "page.css").read_text(encoding="utf-8")
    assert name == "script", name
    return "\n".join((FOLDER / script).read_text(encoding="utf-8") for script in SCRIPTS)


def cell_height(height: int) -> int:
    """Returns the rows from clip to clip in the video.

    height: of a clip. At least 8 rows separate clips, and the result is a multiple of 16, so that
    chroma samples of different clips do not mix.
    """
    return math.ceil((height + 8) / 16) * 16


def stacked(frames: Sequence[Tensor], number: int) -> Tensor:
    """Returns a frame of the video (3 H W) from frames (3 h w) in [0, 1] of equal size.

    They are stacked in cells that repeat their edges; `number`, the frame's, is encoded below.
    """
    height, width = frames[0].shape[-2:]
    total_width = stacked_width(width)
    margin = (0, total_width - width, 0, cell_height(height) - height)
    blocks = torch.tensor([float(number >> bit & 1) for bit in range(NUMBER_BITS)])
    strip = blocks.repeat_interleave(NUMBER_BLOCK).expand(3, 2 * NUMBER_BLOCK, -1)
    strip = F.pad(strip, (0, total_width - strip.shape[-1]))
    return torch.cat([*(F.pad(frame, margin, mode="replicate") for frame in frames), strip], dim=1)


def stacked_width(width: int) -> int:
    """Returns the video's width for clips of a width: even, and with room for a number."""
    return max(width + width % 2, NUMBER_BITS * NUMBER_BLOCK)


def _check(scene: Scene) -> None:
    width, height = scene.size
    rows = len(scene.clips) * cell_height(height) + 2 * NUMBER_BLOCK
    if scene.frames > 2**NUMBER_BITS:
        raise ValueError(
            f"scene {scene.name} has {scene.frames} frames, and a page at most {2**NUMBER_BITS}: "
            "choose some with --frames"
        )
    if max(width, rows) > LONGEST_SIDE:
        limit = (LONGEST_SIDE - 2 * NUMBER_BLOCK) // cell_height(height)
        raise ValueError(
            f"scene {scene.name}: {len(scene.clips)} clips of {width}x{height} do not fit into one "
            f"video of at most {LONGEST_SIDE} rows: compare at most {limit} at once"
        )


def _described(scene: Scene, metrics: Sequence[str], report: Progress) -> dict[str, Any]:
    """Returns the description of a scene that the page's program reads."""
    measured = _measured(scene, metrics, report)
    reasons = (reason for clip in measured.values() for reason in clip.missing.values())
    missing = list(dict.fromkeys(reasons))
    rows = len(scene.clips) * cell_height(scene.size[1])
    return {
        "name": scene.name,
        "frames": scene.frames,
        "fps": scene.fps,
        "width": scene.size[0],
        "height": scene.size[1],
        "cell_height": cell_height(scene.size[1]),
        "number": {"top": rows, "block": NUMBER_BLOCK, "bits": NUMBER_BITS},
        "clips": [{"name": clip.name} for clip in scene.clips],
        "reference": scene.clips.index(scene.reference) if scene.reference else None,
        "metrics": [_metric(name, measured) for name in metrics],
        "notes": list(scene.notes),
        "missing": missing,
    }


def _measured(
    scene: Scene, metrics: Sequence[str], report: Progress
) -> dict[int, measures.Comparison]:
    """Returns the comparisons, by the number of each clip that is not the reference."""
    if not metrics:
        return {}
    numbers = [i for i, clip in enumerate(scene.clips) if clip is not scene.reference]
    counter = Counter({"measure": len(numbers) * scene.frames}, report)
    counter.begin("measure")
    return {
        number: measures.compare(
            scene.clips[number],
            scene.reference,
            metrics=metrics,
            skip_missing=True,
            on_frame=lambda done: counter.add("measure"),
        )
        for number in numbers
    }


def _metric(name: str, measured: dict[int, measures.Comparison]) -> dict[str, object]:
    """Returns a metric's values by frame, if it has such, and their means or its one value."""
    return {
        "title": measures.METRICS[name].title,
        "better": f"{measures.METRICS[name].better} is better",
        "values": {
            number: [_json(value) for value in comparison.per_frame[name]]
            for number, comparison in measured.items()
            if name in comparison.per_frame
        },
        "means": {
            number: _json(comparison.means[name])
            for number, comparison in measured.items()
            if name in comparison.means
        },
    }


def _json(value: float) -> float | str | None:
    if math.isnan(value):
        return None
    return "inf" if math.isinf(value) else float(f"{value:.6g}")


def _write_video(page: IO[str], index: int, scene: Scene, report: Progress) -> None:
    report("encode", 0, scene.frames)
    with tempfile.TemporaryDirectory(prefix="star-") as folder:
        path = Path(folder) / "clips.webm"
        rate = Fraction(scene.fps).limit_denominator(1001)
        height = cell_height(scene.size[1]) * len(scene.clips) + 2 * NUMBER_BLOCK
        with open_sink(path, width=stacked_width(scene.size[0]), height=height, fps=rate) as sink:
            for number, frames in enumerate(zip(*scene.clips, strict=True)):
                sink.write(stacked(frames, number))
                report("encode", number + 1, scene.frames)
        with path.open("rb") as video:
            while block := video.read(BASE64_BLOCK):
                text = base64.b64encode(block).decode("ascii")
                page.write(f'<script type="text/plain" data-scene="{index}">{text}</script>\n')
