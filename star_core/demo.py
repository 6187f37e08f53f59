"""The demo: restores a clip that was degraded on purpose and compares it with its ground truth.

`demo_data` holds both clips; its README names source and licence.
"""

import importlib.util
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from .degradation import HEAVY, degrade_video
from .metrics import compare
from .model import find_model, load
from .parity import DEFAULT
from .pipeline import Execution, Settings
from .progress import Progress
from .upscale import Job, ShotSettings, upscale
from .video_io import VideoSource, open_sink, open_video
from .windows.canvas import Region, cut
from .windows.geometry import upsample

DATA = Path(__file__).with_name("demo_data")
GROUND_TRUTH, DEGRADED = "ground_truth.mp4", "degraded.mkv"
QUICK_FRAMES = 4
METRICS = {"psnr": "PSNR, dB", "ssim": "SSIM", "warping_error": "flow warping error x 1000"}
# Regions that the picture shows enlarged: rows, columns.
DETAILS: list[Region] = [
    (range(40, 128), range(290, 450)),
    (range(200, 288), range(40, 200)),
]
# Origin of the bundled clip: frames and region of the film, seed of the degradation.
SHOT, REGION, SEED = range(152, 176), (range(45, 397), range(40, 680)), 1

LABELS = "BICUBIC", "RESTORED", "GROUND TRUTH"
_FONT = """
B ####. #...# #...# ####. #...# #...# ####.
C .###. #...# #.... #.... #.... #...# .###.
D ####. #...# #...# #...# #...# #...# ####.
E ##### #.... #.... ####. #.... #.... #####
G .###. #...# #.... #.### #...# #...# .####
H #...# #...# #...# ##### #...# #...# #...#
I .###. ..#.. ..#.. ..#.. ..#.. ..#.. .###.
N #...# ##..# ##..# #.#.# #..## #..## #...#
O .###. #...# #...# #...# #...# #...# .###.
R ####. #...# #...# ####. #.#.. #..#. #...#
S .#### #.... #.... .###. ....# ....# ####.
T ##### ..#.. ..#.. ..#.. ..#.. ..#.. ..#..
U #...# #...# #...# #...# #...# #...# .###.
"""
LETTERS = {letter: rows for letter, *rows in map(str.split, _FONT.strip().splitlines())}
LETTERS[" "] = ["."] * 7


@dataclass(frozen=True, kw_only=True)
class DemoResult:
    """Result of the demo. seconds: time to restore the frames. bicubic, restored: means by metric.

    files: what the written files are, by path.
    """

    frames: int
    seconds: float
    bicubic: dict[str, float]
    restored: dict[str, float]
    files: dict[str, str]

    def __str__(self) -> str:
        width = max(map(len, METRICS.values()))
        lines = [f"{'':{width}}   bicubic  restored"]
        lines += [
            f"{METRICS[name]:{width}} {self.bicubic[name]:9.3f} {self.restored[name]:9.3f}"
            for name in self.bicubic
        ]
        if "warping_error" not in self.bicubic:
            lines.append("(the flow warping error needs: pip install opencv-python-headless)")
        lines.append(f"{self.frames} frames restored in {self.seconds:.0f} s. Results:")
        lines += [f"  {path}  {what}" for what, path in self.files.items()]
        return "\n".join(lines)


def demo(
    out: Path,
    *,
    quick: bool = False,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    on_progress: Progress | None = None,
) -> DemoResult:
    """Restores the bundled clip and writes clips and a picture that compare it to `out`.

    Earlier results are replaced. quick: only the first frames. dtype: see `model.load`.
    on_progress: called with a stage, steps done and steps in all.
    """
    out.mkdir(parents=True, exist_ok=True)
    truth, degraded = open_video(DATA / GROUND_TRUTH), open_video(DATA / DEGRADED)
    count = QUICK_FRAMES if quick else len(truth)
    files = find_model("tiny")
    settings = Settings(
        sampling=files.sampling,
        behaviour=replace(DEFAULT, previews="alone"),  # or `quick` would read all frames
    )
    start = time.monotonic()
    restored: list[Tensor] = []
    upscale(
        Job(
            source=DATA / DEGRADED,
            out=out / "restored.mp4",
            scale=4,
            frames=(0, count),
            overwrite=True,
        ),
        ShotSettings(settings=settings, execution=Execution(device=device)),
        lambda prompts: load(
            files, prompts, behaviour=settings.behaviour, device=device, dtype=dtype
        ),
        on_progress=on_progress,
        on_frame=lambda frame: restored.append(_eight_bit(frame)),
    )
    seconds = time.monotonic() - start

    size = (truth.info.width, truth.info.height)
    bicubic = [_eight_bit(upsample(frame, size, "bicubic")) for frame in islice(degraded, count)]
    originals = list(islice(truth, count))
    rows = list(zip(bicubic, restored, originals, strict=True))
    side_by_side, picture = out / "side_by_side.mp4", out / "comparison.png"
    _write(side_by_side, open_video(DATA / GROUND_TRUTH, frames=(0, count)), map(_labelled, rows))
    middle = count // 2
    one = open_video(DATA / GROUND_TRUTH, frames=(middle, middle + 1))
    _write(picture, one, [_with_details(rows[middle])])
    metrics = list(METRICS)
    if not importlib.util.find_spec("cv2"):
        metrics.remove("warping_error")
    return DemoResult(
        frames=count,
        seconds=seconds,
        bicubic=compare(bicubic, originals, metrics=metrics).means,
        restored=compare(restored, originals, metrics=metrics).means,
        files={
            "one frame, with details enlarged": str(picture),
            "all three side by side": str(side_by_side),
            "the restored clip": str(out / "restored.mp4"),
        },
    )


def remake(film: Path, folder: Path) -> None:
    """Writes the bundled clips again to `folder`, from `film`, the file cityCC0.mpg."""
    source = open_video(film, frames=(SHOT.start, SHOT.stop))
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / GROUND_TRUTH, source, (cut(frame, REGION) for frame in source))
    truth = torch.stack(list(open_video(folder / GROUND_TRUTH)))  # as it was stored
    degraded, _ = degrade_video(truth, HEAVY, SEED)
    _write(folder / DEGRADED, source, degraded)


def _eight_bit(frame: Tensor) -> Tensor:
    """Rounds a frame in [0, 1] to 8 bits."""
    return (frame.clamp(0, 1) * 255).round() / 255


def _write(path: Path, timing: VideoSource, frames: Iterable[Tensor]) -> None:
    first, *rest = frames
    height, width = first.shape[-2:]
    with open_sink(path, width=width, height=height, source=timing, overwrite=True) as sink:
        for frame in (first, *rest):
            sink.write(frame)


def _labelled(row: Sequence[Tensor]) -> Tensor:
    """Puts frames (3 h w) side by side under their names."""
    columns = [
        torch.cat([_label(text, frame), frame], dim=1)
        for text, frame in zip(LABELS, row, strict=True)
    ]
    return torch.cat(columns, dim=2)


def _with_details(row: Sequence[Tensor]) -> Tensor:
    """Puts frames side by side, and their enlarged details below them."""
    lines = [_labelled(row)]
    for detail in DETAILS:
        zoom = row[0].shape[-1] // len(detail[1])
        lines.append(torch.cat([_zoomed(cut(frame, detail), zoom) for frame in row], dim=2))
    return torch.cat(lines, dim=1)


def _zoomed(frame: Tensor, by: int) -> Tensor:
    return frame.repeat_interleave(by, dim=1).repeat_interleave(by, dim=2)


def _label(text: str, frame: Tensor) -> Tensor:
    """Returns a dark bar as wide as the frame with the text in white."""
    rows = [" ".join(LETTERS[letter][y] for letter in text) for y in range(7)]
    pixels = torch.tensor([[float(dot == "#") for dot in row] for row in rows])
    letters = _zoomed(pixels[None], 2).expand(3, -1, -1)
    right = frame.shape[-1] - letters.shape[-1] - 8
    return F.pad(letters, (8, right, 5, 5))
