"""Trains STAR's network, on one process or many, resumable.

Every sample has a generator of its own, derived from the seed and the sample's number. So a resumed
run sees what an uninterrupted one does, and several processes see together what one would.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..backbones import Network
from .objective import (
    Batch,
    Prompts,
    Samples,
    TrainConfig,
    TrainingObjective,
    Trains,
    draw_batch,
    number_of,
)
from .pixels import Decoder

logger = logging.getLogger(__name__)

OnStep = Callable[[int, int, dict[str, float]], None]


def choose_trained(network: Network, trains: Trains) -> None:
    """Gradients and dropout on in what is trained, off in all else.

    "lora" expects a network whose LoRA is in place already (`lora.add_lora`).
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
    rate = config.learning_rate * min(1.0, (step + 1) / config.warmup)
    start = config.steps if config.decay_from is None else config.decay_from
    if step >= start:
        fraction = torch.tensor((step - start) / max(1, config.steps - start))
        rate *= 0.5 * (1 + torch.cos(torch.pi * fraction).item())
    return rate


class Muon(torch.optim.Muon):
    """Torch's Muon on weights of any shape: everything but the first side is columns."""

    def __init__(self, weights: Sequence[nn.Parameter], *, lr: float, weight_decay: float) -> None:
        self.weights = weights
        self.matrices = [nn.Parameter(weight.detach().flatten(1)) for weight in weights]
        super().__init__(
            self.matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"
        )

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        for weight in self.weights:
            weight.grad = None

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for weight, matrix in zip(self.weights, self.matrices, strict=True):
            # The matrix shares the weight's memory.
            matrix.grad = None if weight.grad is None else weight.grad.flatten(1)
        super().step(closure)


def make_optimizers(
    named: Mapping[str, nn.Parameter], config: TrainConfig
) -> list[torch.optim.Optimizer]:
    """AdamW; with Muon beside it for matrices of which both sides are longer than 16."""
    lr, decay = config.learning_rate, config.weight_decay
    rest, matrices = list(named.values()), []
    if config.optimizer == "muon":
        matrices = [p for p in rest if p.ndim > 1 and min(len(p), p[0].numel()) > 16]
        taken = {id(p) for p in matrices}
        rest = [p for p in rest if id(p) not in taken]
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(rest, lr=lr, weight_decay=decay)]
    if matrices:
        optimizers.append(Muon(matrices, lr=lr, weight_decay=decay))
    return optimizers


class Average:
    """Exponential moving average of what is trained, by name, float32."""

    def __init__(self, tensors: Mapping[str, Tensor], decay: float) -> None:
        self.decay = decay
        self.values = {name: tensor.detach().float().clone() for name, tensor in tensors.items()}

    def update(self, tensors: Mapping[str, Tensor]) -> None:
        for name, value in self.values.items():
            value.lerp_(tensors[name].detach().float(), 1 - self.decay)

    def swapped(self, tensors: Mapping[str, Tensor]) -> Iterator[None]:
        """The tensors hold the average until the generator goes on."""
        own = {name: tensors[name].detach().clone() for name in self.values}
        for name, value in self.values.items():
            tensors[name].detach().copy_(value)
        yield
        for name, value in own.items():
            tensors[name].detach().copy_(value)


def train(
    data: Samples,
    network: Network,
    config: TrainConfig,
    out: Path,
    *,
    write: Callable[[Path, Any, Prompts | None, int], None],
    prompts: Prompts | None = None,
    decoder: Decoder | None = None,
    pixel_kernel: Tensor | None = None,
    perceptual: nn.Module | None = None,
    validate: Callable[[Any, Prompts | None, int], dict[str, float]] | None = None,
    on_step: OnStep | None = None,
    every: int = 500,
) -> None:
    """Trains, or goes on where `out`/state.pt stopped.

    Every `every` steps and at the end `write(out, network, prompts, step)` is called with the
    averaged weights in place, and `validate` likewise; the figures that it returns are logged.
    on_step(step, steps, parts) is called after each step; an exception from it ends training with
    nothing lost but the steps since the last checkpoint. Several processes, started by torchrun or
    accelerate, each take `batch` samples of a step; the first writes.
    """
    accelerator = start_accelerate()
    device = accelerator.device
    out.mkdir(parents=True, exist_ok=True)
    choose_trained(network, config.trains)
    if prompts is not None:
        prompts.requires_grad_(config.trains == "all")
    if config.checkpointing:
        from .checkpointing import recompute

        recompute(network)
    trained = TrainingObjective(
        network,
        config,
        prompts=prompts,
        decoder=decoder,
        pixel_kernel=pixel_kernel,
        perceptual=perceptual,
    ).to(device)
    named = {name: p for name, p in trained.named_parameters() if p.requires_grad}
    optimizers = make_optimizers(named, config)
    average = Average(named, config.ema)
    state_file, first = out / "state.pt", 0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True, map_location=device)
        for name, parameter in named.items():
            parameter.detach().copy_(state["trained"][name])
            average.values[name].copy_(state["average"][name])
        for optimizer, known in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(known)
        first = state["step"]
        logger.info("resuming at step %d", first)
    wrapped, *optimizers = accelerator.prepare(trained, *optimizers)
    log = Log(out / "log") if accelerator.is_main_process else None

    def save(step: int) -> None:
        for _ in average.swapped(named):
            figures = validate(network, prompts, step) if validate else {}
            write(out, network, prompts, step)
        if log:
            log.scalars(step, figures)
        state = {
            "step": step,
            "trained": {name: parameter.detach() for name, parameter in named.items()},
            "average": average.values,
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
            loss, parts = wrapped(Batch(*(moved(value, device) for value in batch)))
            accelerator.backward(loss)
        parts["gradient"] = float(accelerator.clip_grad_norm_(list(named.values()), config.clip))
        for optimizer in optimizers:
            optimizer.step()
        average.update(named)
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


def moved(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def start_accelerate() -> Any:
    try:
        from accelerate import Accelerator
    except ImportError as error:
        raise ValueError("training needs accelerate: `pip install accelerate`") from error
    return Accelerator()


class Log:
    """Scalars and pictures for TensorBoard, where it is installed."""

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard.writer import SummaryWriter
        except ImportError:
            logger.info("`pip install tensorboard` to have curves in %s", folder)
            self.writer = None
        else:
            self.writer = SummaryWriter(str(folder))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        if self.writer:
            for name, value in values.items():
                self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        if self.writer:
            self.writer.close()
