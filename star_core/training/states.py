"""The states that a training run resumes from: the last few, each with its configuration."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .objective import TrainConfig
from .sharding import like

# A run may go on with other values of these; `batch` counts in the samples of a step.
MAY_CHANGE = {"steps", "decay_from", "learning_rate", "clip", "checkpointing", "batch"}


def run_description(config: TrainConfig, samples: int, data: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what a run's result depends on, by name, as plain values.

    samples: of a step, on all processes together. data: facts of model and data.
    """

    def plain(value: Any) -> Any:
        return value if isinstance(value, int | float | str | None) else str(value)

    def flat(values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
        result = {}
        for name, value in values.items():
            if isinstance(value, Mapping):
                result |= flat(value, f"{prefix}{name}.")
            else:
                result[prefix + name] = plain(value)
        return result

    return flat({**asdict(config), "samples of a step": samples, **data}, "")


class States:
    """The states of a run, `folder`/state-STEP.pt, of which the newest `keep` are left.

    description: from `run_description`. part: of the file names, where each process has its own.
    """

    def __init__(
        self, folder: Path, description: Mapping[str, Any], *, keep: int, part: str = ""
    ) -> None:
        self.folder, self.description = folder, dict(description)
        self.keep, self.part = keep, part

    def paths(self) -> list[Path]:
        """Returns the files of the states, the newest last."""
        pattern = re.compile(rf"state-(\d+){re.escape(self.part)}\.pt")
        found = [(pattern.fullmatch(path.name), path) for path in self.folder.glob("state-*.pt")]
        return [path for _, path in sorted((int(match[1]), path) for match, path in found if match)]

    def load(self) -> dict[str, Any] | None:
        """Returns the newest state, memory-mapped on the CPU, or None if there is none.

        ValueError if it cannot be read or belongs to a run with another configuration.
        """
        paths = self.paths()
        if not paths:
            return None
        path = paths[-1]
        try:
            state = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
            stored = state["description"]
        except Exception as error:  # a damaged file can raise anything
            before = f"then resumes from {paths[-2].name}" if paths[:-1] else "then begins anew"
            raise ValueError(
                f"{path} is truncated or damaged ({type(error).__name__}): delete it, training "
                f"{before}"
            ) from None
        different = [
            f"{name} was {stored.get(name)} and is {self.description.get(name)}"
            for name in sorted(stored.keys() | self.description.keys())
            if name not in MAY_CHANGE and stored.get(name) != self.description.get(name)
        ]
        if different:
            raise ValueError(
                f"{path} belongs to another run ({', '.join(different)}): give the same options, "
                "or choose another folder"
            )
        return state

    def save(self, step: int, state: Mapping[str, Any]) -> None:
        """Writes the state of a step, and deletes the oldest ones beyond `keep`."""
        path = self.folder / f"state-{step:07d}{self.part}.pt"
        temporary = path.with_suffix(".part")
        try:
            torch.save({"description": self.description, **state}, temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        for old in self.paths()[: -self.keep]:
            old.unlink()


def load_optimizers(
    optimizers: Iterable[torch.optim.Optimizer], stored: Iterable[dict[str, Any]]
) -> None:
    """Loads the states of optimizers one after the other; `stored` may be memory-mapped."""
    for optimizer, values in zip(optimizers, stored, strict=True):
        optimizer.load_state_dict(values)
        for parameter, state in optimizer.state.items():
            for name, value in state.items():
                if isinstance(value, torch.Tensor):
                    # A copy, or it would stay a view of the file.
                    state[name] = like(value.clone(), parameter)


def check_names(parameters: Mapping[str, nn.Parameter], stored: Mapping[str, Any]) -> None:
    """Raises ValueError unless a state has the parameters that are trained."""
    if different := parameters.keys() ^ stored.keys():
        raise ValueError(
            f"the state is that of another network ({sorted(different)[0]!r} differs): choose "
            "another folder"
        )
