"""The paper's evaluation: its four test sets, their low-quality input, its table beside ours.

docs/metrics.md says what is not known about the original.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ..degradation import PRESETS
from ..degradation.files import degrade_file
from ..metrics import METRICS
from .clip_folders import Pair, clips_in
from .evaluate import Evaluation
from .report import missing, overall

# Where the published archives and other papers' releases keep clips, below a set's folder.
_TRUTH = ("GT", "GT-Video", "gt", "val_sharp", "val/val_sharp", "HR", "HQ", "hq")
_LOW_QUALITY = ("LQ", "LQ-Video", "lq", "Input")


@dataclass(frozen=True, kw_only=True)
class TestSet:
    """metrics: of the paper's Table 1, by our names. has_truth: False for video found bad."""

    name: str
    clips: int
    metrics: tuple[str, ...]
    has_truth: bool = True


_WITH_TRUTH = ("psnr", "ssim", "lpips", "dover", "warping_error")
SETS = {
    test_set.name: test_set
    for test_set in (
        TestSet(name="UDM10", clips=10, metrics=_WITH_TRUTH),
        TestSet(name="REDS30", clips=30, metrics=_WITH_TRUTH),
        TestSet(name="OpenVid30", clips=30, metrics=_WITH_TRUTH),
        TestSet(
            name="VideoLQ",
            clips=50,
            metrics=("ilniqe", "dover", "own_warping_error"),
            has_truth=False,
        ),
    )
}

# Table 1 of arXiv 2501.02976v1: a line a set and metric, in the order of `metrics`.
METHODS = (
    *("Real-ESRGAN", "DBVSR", "RealBasicVSR", "RealViformer", "ResShift", "StableSR"),
    *("Upscale-A-Video", "MGLD-VSR", "STAR"),
)
_TABLE = {
    "UDM10": """
22.41 19.65 23.64 24.00 22.90 23.50 21.29 23.74 23.91
.6476 .4747 .6842 .6896 .5451 .6599 .5967 .6826 .7164
.2769 .4566 .2514 .2325 .4036 .2785 .3006 .2195 .1885
.4831 .0959 .5039 .5055 .3252 .3490 .5309 .4896 .5422
11.17 12.56 5.14 3.57 12.69 8.89 2.83 6.03 2.68
""",
    "REDS30": """
19.56 14.85 20.85 20.86 19.93 20.32 19.71 20.57 20.29
.4862 .2941 .5469 .5377 .4261 .5043 .4315 .5113 .5411
.3376 .5915 .2899 .2597 .4422 .3857 .3443 .2240 .2804
.3182 .0600 .3483 .3400 .2221 .2519 .2857 .3857 .4017
19.1 18.00 8.32 6.06 17.40 22.14 15.65 12.28 7.30
""",
    "OpenVid30": """
24.62 21.14 24.63 26.21 24.29 24.91 24.41 24.73 25.30
.7778 .5887 .7759 .8080 .6070 .7633 .7167 .7686 .8371
.1994 .4207 .2297 .1881 .3902 .2102 .2479 .2074 .1011
.6992 .1819 .7345 .7275 .5435 .6368 .7201 .7191 .7393
8.46 12.11 4.12 2.52 9.78 8.87 4.72 4.82 1.82
""",
    "VideoLQ": """
27.95 27.19 26.29 26.11 25.92 29.97 24.49 23.94 25.35
.4967 .3392 .5285 .4804 .4113 .4775 .4833 .5319 .5431
8.00 7.75 6.52 5.10 8.33 9.26 10.89 7.82 6.38
""",
}


@dataclass(frozen=True, kw_only=True)
class TestClip:
    """truth: None in a set without ground truth. low_quality: None where it must be made."""

    name: str
    truth: Path | None
    low_quality: Path | None


def set_called(name: str) -> TestSet:
    """ValueError for a name that is none of the paper's sets."""
    if name not in SETS:
        raise ValueError(f"no test set is called {name}: choose among {', '.join(SETS)}")
    return SETS[name]


def paper(set_name: str) -> dict[str, dict[str, float]]:
    """The paper's figures of a set: metric -> method -> value."""
    lines = _TABLE[set_name].split("\n")[1:-1]
    rows = (dict(zip(METHODS, map(float, line.split()), strict=True)) for line in lines)
    return dict(zip(SETS[set_name].metrics, rows, strict=True))


def clips_of(test_set: TestSet, folder: Path) -> list[TestClip]:
    """The set's clips, by name, as they lie in `folder`.

    Clips are videos or folders of images: in `folder` itself, or in a folder of it that goes by a
    usual name (GT, val_sharp, LQ, Input ...), or, as UDM10 was first published, in
    `folder/CLIP/truth`. Low-quality input made by plain blur or bicubic (BDx4, BIx4) is not the
    paper's and is left alone. ValueError if there is no clip, or input and truth do not match.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder: name the one that holds {test_set.name}")
    inputs = _below(folder, _LOW_QUALITY)
    truths = {}
    if test_set.has_truth:
        truths = _below(folder, _TRUTH) or {
            path.parent.name: path for path in sorted(folder.glob("*/truth")) if path.is_dir()
        }
    if not truths and not inputs:
        found = clips_in(folder)
        truths, inputs = (found, {}) if test_set.has_truth else ({}, found)
    if truths and inputs and truths.keys() != inputs.keys():
        alone = ", ".join(sorted(truths.keys() ^ inputs.keys()))
        raise ValueError(f"{folder} has input or ground truth alone of {alone}: complete them")
    if test_set.has_truth and not truths:
        raise ValueError(f"{folder} has no ground truth: put it into {folder / 'GT'}")
    return [
        TestClip(name=name, truth=truths.get(name), low_quality=inputs.get(name))
        for name in truths or inputs
    ]


def _below(folder: Path, names: Sequence[str]) -> dict[str, Path]:
    path = next((folder / name for name in names if (folder / name).is_dir()), None)
    return clips_in(path) if path else {}


def write_low_quality(
    clips: Sequence[TestClip],
    out: Path,
    *,
    preset: str = "heavy",
    seed: int = 0,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> list[Path]:
    """Make the low-quality input that the set lacks: `out/CLIP.mkv`, and CLIP.mkv.json tells how.

    The n-th clip has the seed `seed` + n, whichever others there are; a file that is there is
    kept. on_progress: called with the clip's name, what is done and the total.
    """
    if preset not in PRESETS:
        raise ValueError(f"no recipe is called {preset}: choose among {', '.join(PRESETS)}")
    out.mkdir(parents=True, exist_ok=True)
    files = []
    for number, clip in enumerate(clips):
        if clip.low_quality is not None or clip.truth is None:
            continue
        path = out / f"{clip.name}.mkv"
        files.append(path)
        if not path.exists():
            told = on_progress and partial(on_progress, clip.name)
            degrade_file(clip.truth, path, PRESETS[preset], seed + number, on_progress=told)
    return files


def pairs_of(clips: Sequence[TestClip], restored: Path) -> list[Pair]:
    """What was restored, with its ground truth; clips that were not restored are left out."""
    found = clips_in(restored)
    pairs = [
        Pair(name=clip.name, restored=found[clip.name], reference=clip.truth)
        for clip in clips
        if clip.name in found
    ]
    if not pairs:
        names = ", ".join(clip.name for clip in clips[:3])
        raise ValueError(f"{restored} has no clip of the set: name results as its clips ({names})")
    return pairs


def beside_the_paper(test_set: TestSet, evaluations: Sequence[Evaluation]) -> str:
    """A table: our means, STAR's in the paper, and the best of the other methods there."""
    means = overall(evaluations)
    lines = [
        f"{test_set.name}: {len(evaluations)} of {test_set.clips} clips",
        f"{'':{_WIDE}} {'here':>9} {'STAR':>9}  best other (the paper's Table 1)",
    ]
    for name, row in paper(test_set.name).items():
        value = means.get(name, math.nan)
        here = "-" if math.isnan(value) else f"{value:.4g}"
        others = {method: figure for method, figure in row.items() if method != "STAR"}
        best = (max if METRICS[name].better == "higher" else min)(others, key=others.__getitem__)
        lines.append(
            f"{METRICS[name].title:{_WIDE}} {here:>9} {row['STAR']:>9g}  {others[best]:g} ({best})"
        )
    lines += [f"{METRICS[name].title}: {why}" for name, why in missing(evaluations).items()]
    return "\n".join(lines)


_WIDE = max(len(metric.title) for metric in METRICS.values())
