"""Optimizers, their learning rate, and the moving average of the weights."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from .objective import TrainConfig
from .sharding import local

HAS_MUON = hasattr(torch.optim, "Muon")  # since torch 2.9


def learning_rate(step: int, config: TrainConfig) -> float:
    """Returns the learning rate of a step (from 0): linear warm-up, then cosine decay to zero."""
    rate = config.learning_rate * min(1.0, (step + 1) / max(1, config.warmup))
    start = config.steps if config.decay_from is None else config.decay_from
    if step >= start:
        fraction = torch.tensor((step - start) / max(1, config.steps - start))
        rate *= 0.5 * (1 + torch.cos(torch.pi * fraction).item())
    return rate


class Muon(torch.optim.Muon if HAS_MUON else torch.optim.Optimizer):  # pyright: ignore
    """Torch's Muon for weights of any shape: all dimensions but the first are flattened.

    weights: the parameters. lr, weight_decay: on the scale of AdamW's. Needs torch 2.9.
    """

    def __init__(self, weights: Sequence[nn.Parameter], *, lr: float, weight_decay: float) -> None:
        self.weights = weights
        self.matrices = [nn.Parameter(weight.detach().flatten(1)) for weight in weights]
        super().__init__(
            self.matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"
        )

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Resets the gradients; those of the weights themselves become None."""
        super().zero_grad(set_to_none)
        for weight in self.weights:
            weight.grad = None

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Updates the weights by their gradients."""
        for weight, matrix in zip(self.weights, self.matrices, strict=True):
            # The matrix shares the weight's memory, which wrapping a module may have moved.
            matrix.data = weight.detach().flatten(1)
            matrix.grad = None if weight.grad is None else weight.grad.flatten(1)
        super().step(closure)


def make_optimizers(
    named: Mapping[str, nn.Parameter], config: TrainConfig
) -> list[torch.optim.Optimizer]:
    """Returns AdamW, or with config.optimizer "muon" AdamW and Muon.

    Muon gets the weights that, flattened to matrices, have both sides longer than 16. named: the
    trained parameters by name. ValueError if this version of torch has no Muon.
    """
    lr, decay = config.learning_rate, config.weight_decay
    rest, matrices = list(named.values()), []
    if config.optimizer == "muon":
        if not HAS_MUON:
            raise ValueError(
                f"torch {torch.__version__} has no Muon: install torch 2.9 or newer, or choose "
                "--optimizer adamw"
            )
        if any(hasattr(p, "to_local") for p in rest):
            raise ValueError("Muon needs whole matrices: leave out --shard or --optimizer muon")
        matrices = [p for p in rest if p.ndim > 1 and min(len(p), p[0].numel()) > 16]
        ids = {id(p) for p in matrices}
        rest = [p for p in rest if id(p) not in ids]
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(rest, lr=lr, weight_decay=decay)]
    if matrices:
        optimizers.append(Muon(matrices, lr=lr, weight_decay=decay))
    return optimizers


class MovingAverage:
    """The exponential moving average of parameters, or of this process's parts, in float32.

    parameters: by name. decay: share of the average that a step keeps. device: where the average
    is kept; None for where the parameters are.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        decay: float,
        device: torch.device | str | None = None,
    ) -> None:
        # Their data is looked up anew each time: wrapping a module may move it.
        self.parameters = parameters
        self.values = {
            name: torch.empty_like(part, dtype=torch.float32, device=device).copy_(part)
            for name, part in zip(parameters, map(local, parameters.values()), strict=True)
        }
        self._update = get_ema_multi_avg_fn(decay)

    def update(self, step: int) -> None:
        """Moves the average towards the parameters. step: number of the step, from 0."""
        for name, value in self.values.items():  # one by one: a copy on its device may be needed
            self._update([value], [local(self.parameters[name]).to(value)], step)

    def exchange(self) -> None:
        """Exchanges average and parameters, with a copy of one parameter at a time."""
        for name, value in self.values.items():
            parameter = local(self.parameters[name])
            kept = parameter.clone()
            parameter.copy_(value)
            value.copy_(kept)
