"""How long a run takes on this machine, from the speeds that the command `bench` has stored."""

import json
import os
import platform
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..devices import device_name
from .plan import Task
from .predict import Prediction, Work


class Speed(NamedTuple):
    """Seconds for a FLOP and for a byte that operations read or write."""

    flop: float
    byte: float

    def seconds(self, work: Work) -> float:
        """Returns how long work takes."""
        return self.flop * work.flops + self.byte * work.traffic


def fitted(measured: Sequence[tuple[Work, float]]) -> Speed:
    """Returns the speed by which measured work takes the measured seconds, as nearly as possible.

    Least squares of relative errors, both numbers at least 0.
    """
    shares = torch.tensor(
        [[work.flops / time, work.traffic / time] for work, time in measured], dtype=torch.float64
    )
    ones = torch.ones(len(shares), dtype=torch.float64)

    def error(speed: torch.Tensor) -> float:
        return float((shares @ speed - ones).norm())

    both = torch.linalg.lstsq(shares, ones[:, None]).solution[:, 0]
    alone = (shares * ones[:, None]).sum(0) / shares.square().sum(0)
    candidates = [torch.stack([alone[0], ones[0] * 0]), torch.stack([ones[0] * 0, alone[1]])]
    candidates += [both] if both.min() >= 0 else []
    return Speed(*min(candidates, key=error).tolist())


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The measured speed of a device.

    speeds: by the type of computation. start: seconds of a run before and after its work. pixel:
    seconds to read, enlarge, correct and write a pixel of the result. channels_last: whether the
    network is faster with this memory layout of its kernels, see `devices.put_channels_last`.
    """

    speeds: Mapping[torch.dtype, Speed]
    start: float
    pixel: float
    channels_last: bool = False


def duration(prediction: Prediction, task: Task, machine: Machine | None) -> float | None:
    """Returns the seconds of a run. None without a machine, or if it lacks the task's types."""
    types = {"encode": task.vae_type, "denoise": task.dtype, "decode": task.vae_type}
    if machine is None or not {*types.values()} <= machine.speeds.keys():
        return None
    work = sum(
        machine.speeds[types[stage]].seconds(each) for stage, each in prediction.work.items()
    )
    width, height = task.size
    return machine.start + work + machine.pixel * task.frames * width * height


def stored_machine(device: torch.device) -> Machine | None:
    """Returns what `bench` has stored of a device of this machine, None if it has not run."""
    stored = _read().get(_key(device))
    if stored is None:
        return None
    found = {getattr(torch, name): Speed(*each) for name, each in stored["speeds"].items()}
    layout = stored.get("channels_last", False)
    return Machine(speeds=found, start=stored["start"], pixel=stored["pixel"], channels_last=layout)


def store_machine(device: torch.device, machine: Machine) -> Path:
    """Stores what was measured of a device; returns the file. OSError if it cannot be written.

    Speeds in types that were not measured stay as they were.
    """
    before = stored_machine(device)
    everything = {**(before.speeds if before else {}), **machine.speeds}
    named = {str(dtype).removeprefix("torch."): speed for dtype, speed in everything.items()}
    stored = {**asdict(machine), "speeds": named}
    file = _file()
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    part.write_text(json.dumps({**_read(), _key(device): stored}, indent=1), encoding="utf-8")
    part.replace(file)
    return file


def _read() -> dict[str, Any]:
    with suppress(OSError, ValueError):  # a damaged file is written anew by the next measurement
        return json.loads(_file().read_text(encoding="utf-8"))
    return {}


def _file() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "comfyui-star-vsr" / "machines.json"


def _key(device: torch.device) -> str:
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    return f"{platform.node()}, {device_name(device)}{threads}"
