"""The paper's evaluation: its four test sets, their low-quality input, and its table of results.

docs/metrics.md lists what is unknown about the original.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ..checkpoints.tensors import first_names
from ..degradation import PRESETS
from ..degradation.files import degrade_file
from ..metrics import METRICS
from .clip_folders import Pair, clips_in
from .evaluate import Evaluation
from .report import missing, overall

# The folders of clips in the published archives and in other papers' releases.
_TRUTH = ("GT", "GT-Video", "gt", "val_sharp", "val/val_sharp", "HR", "HQ", "hq")
_LOW_QUALITY = ("LQ", "LQ-Video", "lq", "Input")


@dataclass(frozen=True, kw_only=True)
class TestSet:
    """A test set of the paper.

    clips: their number. metrics: those of the paper's Table 1, as keys of `metrics.METRICS`.
    has_truth: False for real low-quality video without a ground truth.
    """

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

# Table 1 of arXiv 2501.02976v1: one line for each metric of a set, in the order of `metrics`.
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
    """A clip of a test set.

    truth: None in a set without ground truth. low_quality: the input, None if it must be made.
    """

    name: str
    truth: Path | None
    low_quality: Path | None


def set_called(name: str) -> TestSet:
    """Returns the test set with a name. Raises ValueError for an unknown name."""
    if name not in SETS:
        raise ValueError(f"no test set is called {name}: choose among {', '.join(SETS)}")
    return SETS[name]


def paper(set_name: str) -> dict[str, dict[str, float]]:
    """Returns the paper's values for a set: metric -> method -> value."""
    lines = _TABLE[set_name].split("\n")[1:-1]
    rows = (dict(zip(METHODS, map(float, line.split()), strict=True)) for line in lines)
    return dict(zip(SETS[set_name].metrics, rows, strict=True))


def clips_of(test_set: TestSet, folder: Path) -> list[TestClip]:
    """Returns the set's clips in `folder`, by name.

    Clips are videos or folders of images in `folder` itself, in a subfolder with a usual name (GT,
    val_sharp, LQ, Input ...), or, as UDM10 was first published, in `folder/CLIP/truth`. Low-quality
    input made by blur or bicubic downscaling (BDx4, BIx4) is not the paper's and is ignored. Raises
    ValueError if there is no clip, or if input and ground truth do not match.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder: name the one that contains {test_set.name}")
    inputs = _clips_below(folder, _LOW_QUALITY)
    truths = {}
    if test_set.has_truth:
        truths = _clips_below(folder, _TRUTH) or {
            path.parent.name: path for path in sorted(folder.glob("*/truth")) if path.is_dir()
        }
    if not truths and not inputs:
        clips = clips_in(folder)
        truths, inputs = (clips, {}) if test_set.has_truth else ({}, clips)
    if truths and inputs and truths.keys() != inputs.keys():
        unpaired = first_names(sorted(truths.keys() ^ inputs.keys()))
        raise ValueError(f"{folder} has input or ground truth alone of {unpaired}: complete them")
    if test_set.has_truth and not truths:
        raise ValueError(f"{folder} has no ground truth: put it into {folder / 'GT'}")
    return [
        TestClip(name=name, truth=truths.get(name), low_quality=inputs.get(name))
        for name in truths or inputs
    ]


def _clips_below(folder: Path, names: Sequence[str]) -> dict[str, Path]:
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
    """Makes the missing low-quality input of clips; returns its paths, `out/CLIP.mkv`.

    `CLIP.mkv.json` records the parameters. The n-th clip always has the seed `seed` + n. Existing
    files are not written again. preset: a key of `degradation.PRESETS`; ValueError for another one.
    on_progress: called with the clip's name, the frames done and their number.
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
            report = on_progress and partial(on_progress, clip.name)
            degrade_file(clip.truth, path, PRESETS[preset], seed + number, on_progress=report)
    return files


def pairs_of(clips: Sequence[TestClip], restored: Path) -> list[Pair]:
    """Pairs the results in a folder with the ground truths; clips without a result are ignored.

    Raises ValueError if there is no result.
    """
    results = clips_in(restored)
    pairs = [
        Pair(name=clip.name, restored=results[clip.name], reference=clip.truth)
        for clip in clips
        if clip.name in results
    ]
    if not pairs:
        names = ", ".join(clip.name for clip in clips[:3])
        raise ValueError(
            f"{restored} has no clip of the set: name results like its clips ({names})"
        )
    return pairs


def beside_the_paper(test_set: TestSet, evaluations: Sequence[Evaluation]) -> str:
    """Returns a table of these means, STAR's in the paper, and the best of other methods there."""
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
