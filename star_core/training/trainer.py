"""Trains STAR's network, on one process or many, resumable.

Every sample has a generator of its own, derived from the seed and the sample's number. So a resumed
run draws the same samples as an uninterrupted one, and several processes together the same as one.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from ..backbones import Network
from .objective import (
    Batch,
    Objective,
    Prompts,
    Samples,
    TrainConfig,
    Trains,
    draw_batch,
    number_of,
)

logger = logging.getLogger(__name__)

OnStep = Callable[[int, int, dict[str, float]], None]


def choose_trained(network: Network, trains: Trains) -> None:
    """Turns gradients and dropout on in the parts of a network that are trained, off in all others.

    trains: see `TrainConfig`; "lora" expects that the network has its LoRA (`lora.add_lora`).
    """
    network.eval().requires_grad_(False)
    if trains == "all":
        network.train().requires_grad_(True)
    elif trains == "star":
        for name, parameter in network.named_parameters():
            if any(part in name for part in network.star_parts):
                parameter.requires_grad_(True)
        for name, part in network.named_children():
            part.train(f"{name}." in network.star_parts)
    else:
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(".lora_" in name)


def learning_rate(step: int, config: TrainConfig) -> float:
    """Returns the learning rate of a step (from 0): linear warm-up, then cosine decay to zero."""
    rate = config.learning_rate * min(1.0, (step + 1) / config.warmup)
    start = config.steps if config.decay_from is None else config.decay_from
    if step >= start:
        fraction = torch.tensor((step - start) / max(1, config.steps - start))
        rate *= 0.5 * (1 + torch.cos(torch.pi * fraction).item())
    return rate


class Muon(torch.optim.Muon):
    """Torch's Muon for weights of any shape: all dimensions but the first are flattened.

    weights: the parameters. lr, weight_decay: on the scale of AdamW's.
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
            # The matrix shares the weight's memory.
            matrix.grad = None if weight.grad is None else weight.grad.flatten(1)
        super().step(closure)


def make_optimizers(
    named: Mapping[str, nn.Parameter], config: TrainConfig
) -> list[torch.optim.Optimizer]:
    """Returns AdamW, or with config.optimizer "muon" AdamW and Muon.

    Muon gets the weights that, flattened to matrices, have both sides longer than 16. named: the
    trained parameters by name.
    """
    lr, decay = config.learning_rate, config.weight_decay
    rest, matrices = list(named.values()), []
    if config.optimizer == "muon":
        matrices = [p for p in rest if p.ndim > 1 and min(len(p), p[0].numel()) > 16]
        ids = {id(p) for p in matrices}
        rest = [p for p in rest if id(p) not in ids]
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(rest, lr=lr, weight_decay=decay)]
    if matrices:
        optimizers.append(Muon(matrices, lr=lr, weight_decay=decay))
    return optimizers


def assign(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
    """Copies values into the parameters of the same names, in place."""
    for name, parameter in parameters.items():
        parameter.detach().copy_(values[name])


def train(
    data: Samples,
    objective: Objective,
    out: Path,
    *,
    write: Callable[[Path, Any, Prompts | None, int], None],
    validate: Callable[[Any, Prompts | None, int], dict[str, float]] | None = None,
    on_step: OnStep | None = None,
    every: int = 500,
) -> None:
    """Trains the network of an objective, or resumes from `out`/state.pt.

    Several processes, started by torchrun or accelerate, each take `config.batch` samples of a
    step; the first one writes.

    write: called as write(out, network, prompts, step) every `every` steps and at the end, with
    the averaged weights in place. validate: called as validate(network, prompts, step) before
    that; the figures that it returns are logged.
    Learned prompts are trained if all of the network is.
    on_step: called as on_step(step, steps, parts of the loss) after each step. An exception from
    it ends training; the steps since the last checkpoint are lost.

    ValueError if accelerate is not installed.
    """
    accelerator = start_accelerate()
    device = accelerator.device
    out.mkdir(parents=True, exist_ok=True)
    network, prompts, config = objective.network, objective.prompts, objective.config
    choose_trained(network, config.trains)
    if prompts is not None:
        prompts.requires_grad_(config.trains == "all")
    if config.checkpointing:
        from .checkpointing import recompute

        recompute(network)
    objective.to(device)
    named = {name: p for name, p in objective.named_parameters() if p.requires_grad}
    optimizers = make_optimizers(named, config)
    average = {name: parameter.detach().float().clone() for name, parameter in named.items()}
    update_average = get_ema_multi_avg_fn(config.ema)
    state_file, first = out / "state.pt", 0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True, map_location=device)
        assign(named, state["trained"])
        for optimizer, stored in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(stored)
        average, first = state["average"], state["step"]
        logger.info("resuming at step %d", first)
    wrapped, *optimizers = accelerator.prepare(objective, *optimizers)
    log = Log(out / "log") if accelerator.is_main_process else None

    def save(step: int) -> None:
        trained = {name: parameter.detach().clone() for name, parameter in named.items()}
        assign(named, average)
        figures = validate(network, prompts, step) if validate else {}
        write(out, network, prompts, step)
        assign(named, trained)
        if log:
            log.scalars(step, figures)
        state = {
            "step": step,
            "trained": trained,
            "average": average,
            "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        }
        temporary = state_file.with_suffix(".part")
        torch.save(state, temporary)
        temporary.replace(state_file)

    processes, rank = accelerator.num_processes, accelerator.process_index
    for step in range(first, config.steps):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, config)
        begin = (step * processes + rank) * config.batch
        batch = draw_batch(data, range(begin, begin + config.batch), config)
        for optimizer in optimizers:
            optimizer.zero_grad()
        with torch.random.fork_rng():
            # Dropout takes no generator.
            torch.manual_seed(number_of(config.seed, "dropout", begin))
            on_device: list[Any] = [v.to(device) if isinstance(v, Tensor) else v for v in batch]
            loss, parts = wrapped(Batch(*on_device))
            accelerator.backward(loss)
        parts["gradient"] = float(accelerator.clip_grad_norm_(list(named.values()), config.clip))
        for optimizer in optimizers:
            optimizer.step()
        values = [parameter.detach().float() for parameter in named.values()]
        update_average([average[name] for name in named], values, step)
        if log and (step + 1) % 10 == 0:
            log.scalars(step + 1, parts)
        if on_step is not None:
            on_step(step + 1, config.steps, parts)
        if (step + 1) % every == 0 or step + 1 == config.steps:
            if accelerator.is_main_process:
                save(step + 1)
            accelerator.wait_for_everyone()
    if log:
        log.close()


def start_accelerate() -> Any:
    """Returns an `Accelerator`; ValueError if accelerate is not installed."""
    try:
        from accelerate import Accelerator
    except ImportError as error:
        raise ValueError("training needs accelerate: `pip install accelerate`") from error
    return Accelerator()


class Log:
    """Writes scalars for TensorBoard if that is installed."""

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard.writer import SummaryWriter
        except ImportError:
            logger.info("run `pip install tensorboard` to have curves in %s", folder)
            self.writer = None
        else:
            self.writer = SummaryWriter(str(folder))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Adds values by name at a step."""
        if self.writer:
            for name, value in values.items():
                self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Closes the file."""
        if self.writer:
            self.writer.close()
