"""The paper's ablations at a small scale: LIEM and DF loss, each variant from scratch, by seeds.

Paper, tables 3 to 5. Here a network of 3 million parameters is trained for a few minutes and
measured on held-out clips.
"""

import importlib.util
import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from einops import rearrange
from torch import Tensor, nn

from ..degradation import HEAVY, degrade_video
from ..losses import DFLossConfig
from ..metrics import compare
from ..metrics.catalogue import Setup
from ..models.liem import SpatialLIEM
from ..models.unet_blocks import BasicTransformerBlock
from ..plots import spreads, write_figure
from ..vae.frame_vae import VideoVAE
from ..video_io import open_video
from .linear_decoder import linear_decoder
from .objective import Prompts, TrainingObjective
from .pairs import LatentPairs
from .tiny import NETWORK, RECIPE, SAMPLING, first_samples, new_network
from .trainer import OnStep, train
from .validation import Validation
from .videos import enlarged

Liem = Literal["none", "spatial", "temporal", "both", "after"]
METRICS = ("psnr", "ssim", "lpips", "warping_error")
RESULT = "result.json"
CROP = (4, 18, 20)


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A change to the base configuration. group: the table that it belongs to.

    liem: the blocks that have LIEM; "after" puts it behind attention instead of before it.
    """

    name: str
    group: str
    liem: Liem = "both"
    df: DFLossConfig = field(default_factory=DFLossConfig)


VARIANTS = (
    Variant(name="LIEM both, DF direct, alpha 2", group="base"),
    Variant(name="LIEM none", group="LIEM", liem="none"),
    Variant(name="LIEM spatial", group="LIEM", liem="spatial"),
    Variant(name="LIEM temporal", group="LIEM", liem="temporal"),
    Variant(name="LIEM after attention", group="LIEM", liem="after"),
    Variant(name="DF none", group="DF", df=DFLossConfig(beta=0.0)),
    Variant(name="DF unseparated", group="DF", df=DFLossConfig(order="unseparated")),
    Variant(name="DF inverse", group="DF", df=DFLossConfig(order="inverse")),
    Variant(name="DF alpha 0.5", group="alpha", df=DFLossConfig(alpha=0.5)),
    Variant(name="DF alpha 1", group="alpha", df=DFLossConfig(alpha=1.0)),
)


class LiemAfterAttention(BasicTransformerBlock):
    """A transformer block in which LIEM gates the output of attention instead of its input."""

    def forward(self, x: Tensor, context: Tensor | None = None, *, height=None, window=None):
        """Applies the block as `BasicTransformerBlock.forward` does; `window` is ignored."""
        if context is None or height is None:
            x = self.local1(self.attn1(self.norm1(x))) + x
            x = self.local2(self.attn2(self.norm2(x))) + x
        else:
            attended = rearrange(self.attn1(self.norm1(x)), "b (h w) d -> b d h w", h=height)
            x = rearrange(self.local1(attended), "b d h w -> b (h w) d") + x
            x = self.attn2(self.norm2(x), context) + x
        return self.ff(self.norm3(x)) + x


def place_liem(network: nn.Module, liem: Liem) -> None:
    """Removes LIEM from blocks that `liem` leaves out, or moves it behind attention; in place."""
    for block in list(network.modules()):
        if not isinstance(block, BasicTransformerBlock):
            continue
        spatial = isinstance(block.local1, SpatialLIEM)
        if liem == "after":
            block.__class__ = LiemAfterAttention
        elif liem not in ("both", "spatial" if spatial else "temporal"):
            for name in ("local1",) if spatial else ("local1", "local2"):
                setattr(block, name, nn.Identity())


@dataclass(frozen=True, kw_only=True)
class Ablation:
    """Settings that all runs share.

    pairs: folder of latent pairs to train on (`LatentPairs`). clips: held-out videos. out: folder
    for results. frames: number that is measured of each clip. metric_weights: folder of LPIPS'
    weights. A metric that cannot be computed is left out.
    """

    pairs: Path
    clips: Sequence[Path]
    out: Path
    steps: int = 250
    batch: int = 2
    bf16: bool = False
    seeds: Sequence[int] = (0, 1, 2)
    frames: int = 8
    metric_weights: Path | None = None


def ablate(
    ablation: Ablation,
    vae: VideoVAE,
    *,
    variants: Sequence[Variant] = VARIANTS,
    on_run: Callable[[int, int, str], None] | None = None,
    on_step: OnStep | None = None,
) -> str:
    """Trains and measures every variant with every seed, unless its result is stored already.

    Writes `ablation.out`/ablation.md, results.json and, if matplotlib is installed, ablation.png.
    An interrupted ablation resumes, within a run too.

    vae: of the latent pairs. on_run: called as on_run(done, runs, name) before each run. on_step:
    see `train`. Returns the table in Markdown.
    """
    runs = [(variant, seed) for seed in ablation.seeds for variant in variants]
    validation_set = [clip_pair(path, ablation.frames) for path in ablation.clips]
    results: dict[str, list[dict[str, float]]] = {}
    for index, (variant, seed) in enumerate(runs):
        if on_run:
            on_run(index, len(runs), f"{variant.name}, seed {seed}")
        folder = ablation.out / f"{variant.name.replace(' ', '_').replace(',', '')}-{seed}"
        file = folder / RESULT
        if not file.exists():
            run_variant(variant, seed, ablation, vae, validation_set, folder, on_step)
        results.setdefault(variant.name, []).append(json.loads(file.read_text()))
        (ablation.out / "ablation.md").write_text(table(results))
        if importlib.util.find_spec("matplotlib"):
            psnr = {name: [row["psnr"] for row in rows] for name, rows in results.items()}
            figure = spreads(psnr, title="PSNR, dB: each seed, and their mean")
            write_figure(figure, ablation.out / "ablation.png")
    (ablation.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    return table(results)


def run_variant(
    variant: Variant,
    seed: int,
    ablation: Ablation,
    vae: VideoVAE,
    validation_set: Sequence[tuple[Tensor, Tensor]],
    folder: Path,
    on_step: OnStep | None = None,
) -> None:
    """Trains one variant and writes the means over clips to `folder`/result.json.

    The averaged weights are measured. seed: of initial weights and samples. vae: of the latent
    pairs. validation_set: clean and degraded frames (f 3 h w) in [0, 1]. on_step: see `train`.
    """
    pairs = LatentPairs(ablation.pairs, CROP)
    network, prompts = new_network(replace(NETWORK, hint_prior=round(pairs.spread(), 2)), seed)
    place_liem(network, variant.liem)
    config = replace(
        RECIPE,
        steps=ablation.steps,
        batch=ablation.batch,
        seed=seed,
        df=variant.df,
        bf16=ablation.bf16,
        # DF loss has the largest weight at low noise levels.
        start=0.25,
        early=0.25,
        decay_from=ablation.steps // 2,
    )
    validation = Validation({}, vae, folder, sampling=SAMPLING)

    @torch.no_grad()
    def measure(out: Path, network: Any, prompts: Prompts | None, step: int) -> None:
        if step < config.steps:
            return
        network.eval()
        rows = []
        for clean, large in validation_set:
            restored = validation.restored(network, prompts, large)
            setup = Setup(weights=ablation.metric_weights)
            comparison = compare(
                list(restored), list(clean), metrics=METRICS, setup=setup, skip_missing=True
            )
            rows.append(comparison.means)
        figures = {key: statistics.fmean(row[key] for row in rows) for key in rows[0]}
        temporary = out / "result.part"
        temporary.write_text(json.dumps(figures) + "\n")
        temporary.replace(out / RESULT)

    kernel = linear_decoder(vae, first_samples(pairs, seed))
    train(
        pairs,
        TrainingObjective(network, config, prompts=prompts, pixel_kernel=kernel),
        folder,
        write=measure,
        on_step=on_step,
        every=max(1, ablation.steps // 4),
    )


def clip_pair(path: Path, frames: int) -> tuple[Tensor, Tensor]:
    """Returns a video's first frames, clean and degraded (heavy), both (f 3 h w) in [0, 1].

    Height and width are cropped to what the network accepts.
    """
    video = torch.stack([frame[:3] for frame in open_video(path, frames=(0, frames))])
    height, width = ((video.shape[-2] - 8) // 16 * 16 + 8, video.shape[-1] // 16 * 16)
    clean = video[..., :height, :width]
    small, _ = degrade_video(clean, HEAVY, 0)
    return clean, enlarged(small, (height, width), "bicubic")


def table(results: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """Returns a Markdown table with mean and standard deviation over seeds, a row for each variant.

    results: figures of each run by variant.
    """
    keys = [key for key in METRICS if all(key in row for rows in results.values() for row in rows)]
    lines = [
        f"| # | variant | seeds | {' | '.join(keys)} |",
        f"| --- | --- | --- | {' | '.join('---' for _ in keys)} |",
    ]
    for number, (name, rows) in enumerate(results.items()):
        cells = []
        for key in keys:
            values = [row[key] for row in rows]
            spread = statistics.stdev(values) if len(values) > 1 else math.nan
            cells.append(f"{statistics.fmean(values):.4g} ± {spread:.2g}")
        lines.append(f"| {number} | {name} | {len(rows)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
