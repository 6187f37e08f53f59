"""One test vector: its sidecar, its tensors and its tolerances."""

import ast
import json
import operator
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)


class Comparison(NamedTuple):
    """A result and its reference. Everything but floating point tensors must be equal.

    atol: absolute tolerance, of all elements or of each; None for the sidecar's.
    """

    ours: Any
    theirs: Any
    atol: float | Tensor | None = None


Comparisons = Iterator[Comparison]


@dataclass(frozen=True, eq=False)
class Case:
    """A test vector. path: of NAME.json. sidecar: its content.

    NAME.safetensors, read on demand, holds inputs, outputs and weights.
    """

    path: Path
    sidecar: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Name of the file without suffix."""
        return self.path.stem

    @property
    def config(self) -> dict[str, Any]:
        """Configuration of the network."""
        return self.sidecar["config"]

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """All tensors by key; floating point ones are float32."""
        return {
            key: tensor.float() if tensor.is_floating_point() else tensor
            for key, tensor in load_file(self.path.with_suffix(".safetensors")).items()
        }

    def __getitem__(self, key: str) -> Tensor:
        return self.tensors[key]

    def in_text(self, key: str, pattern: str) -> str:
        """Returns the group of a pattern that a setting's text matches, or raises ValueError."""
        match = re.search(pattern, self.sidecar[key])
        if match is None:
            raise ValueError(f"{key!r} does not match {pattern}: {self.sidecar[key]}")
        return match[1]

    def neighbour(self, name: str) -> "Case":
        """Loads another case of the same folder."""
        return load_case(self.path.with_name(f"{name}.json"))

    def fill(self, module: Module, prefix: str = "w.") -> Module:
        """Loads this case's weights, whose keys begin with `prefix`, and returns the module."""
        weights = {
            key.removeprefix(prefix): tensor
            for key, tensor in self.tensors.items()
            if key.startswith(prefix)
        }
        module.load_state_dict(weights)
        return module.eval()

    @property
    def rtol(self) -> float | None:
        """Relative tolerance of the sidecar; None if it has none."""
        return self._tolerance("rtol")

    @property
    def atol(self) -> float | None:
        """Absolute tolerance of the sidecar; None if it has none."""
        return self._tolerance("atol")

    def _tolerance(self, name: str) -> float | None:
        stated = self.sidecar.get("tolerance", {})
        return self.sidecar.get(f"suggested_{name}", stated.get(name))

    def worst(self, comparison: Comparison) -> tuple[float, float]:
        """Returns error and tolerance of the element with the largest ratio of the two.

        ValueError for different shapes.
        """
        ours, theirs, atol = comparison
        if not (isinstance(theirs, Tensor) and theirs.is_floating_point()):
            equal = torch.equal(ours, theirs) if isinstance(theirs, Tensor) else ours == theirs
            return (0.0 if equal else 1.0), 0.0
        if ours.shape != theirs.shape:
            raise ValueError(f"shape {tuple(ours.shape)} instead of {tuple(theirs.shape)}")
        if theirs.numel() == 0:
            return 0.0, 0.0
        ours, theirs = ours.double(), theirs.double()
        rtol, atol = self.rtol, self.atol if atol is None else atol
        if rtol is None and atol is None:
            finite = theirs[theirs.isfinite()]
            rtol, atol = 1e-4, 1e-5 * finite.abs().max().item() if finite.numel() else 0.0
        tolerance = (rtol or 0.0) * theirs.nan_to_num(posinf=0, neginf=0).abs()
        tolerance = tolerance + (0.0 if atol is None else atol)
        same = (ours == theirs) | (ours.isnan() & theirs.isnan())
        error = torch.where(same, 0.0, (ours - theirs).abs().nan_to_num(nan=sys.float_info.max))
        at = torch.where(error == 0, 0.0, error / tolerance).argmax()
        return error.flatten()[at].item(), tolerance.flatten()[at].item()


def load_case(path: Path) -> Case:
    """Reads a sidecar; ValueError if the file is none."""
    try:
        sidecar = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path.name} is not JSON: {error}") from error
    if not isinstance(sidecar, dict):
        raise ValueError(f"{path.name} is not the description of a test vector")
    return Case(path, sidecar)


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sin": torch.sin,
    "cos": torch.cos,
    "tanh": torch.tanh,
    "exp": torch.exp,
    "log": torch.log,
    "log1p": torch.log1p,
    "sqrt": torch.sqrt,
    "abs": torch.abs,
    "mean": torch.mean,
    "std": torch.std,
    "mean_over_frames": lambda x: x.mean(2, keepdim=True),
    "mean_over_channel_and_frame": lambda x: x.mean((1, 2), keepdim=True),
}
OPERATORS: dict[type, Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
    ast.USub: operator.neg,
}


def evaluate(formula: str, values: Mapping[str, Tensor]) -> Any:
    """Evaluates an analytic network, a formula of numbers, names and FUNCTIONS.

    values: tensors by name. ValueError for anything else in the formula.
    """

    def value(node: ast.AST) -> Any:
        match node:
            case ast.Constant(value=float() | int() as number):
                return number
            case ast.Name(id=name) if name in values:
                return values[name]
            case ast.UnaryOp(op=op, operand=operand) if type(op) in OPERATORS:
                return OPERATORS[type(op)](value(operand))
            case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
                return OPERATORS[type(op)](value(left), value(right))
            case ast.Call(func=ast.Name(id=name), args=[argument]) if name in FUNCTIONS:
                return FUNCTIONS[name](value(argument))
        raise ValueError(f"cannot evaluate {ast.unparse(node)} in {formula!r}")

    return value(ast.parse(formula.strip(), mode="eval").body)
