"""Trains STAR's network, on one process or many, resumable.

Every sample has a generator of its own, derived from the seed and the sample's number. So a resumed
run draws the same samples as an uninterrupted one, and several processes together the same as one.
"""

import logging
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..backbones import Network
from .loading import Batches
from .objective import (
    Batch,
    Objective,
    Prompts,
    Samples,
    Trains,
    number_of,
)
from .optimizers import MovingAverage, learning_rate, make_optimizers
from .processes import gathered
from .sharding import gather_into, local, local_state, shard, skeleton, whole
from .states import States, check_names, load_optimizers, run_description

logger = logging.getLogger(__name__)

OnStep = Callable[[int, int, dict[str, float]], None]
LOG_EVERY = 10  # steps
RECENT = 100  # steps in which at most `TrainExecution.most_skipped` may be skipped


@dataclass(frozen=True, kw_only=True)
class TrainExecution:
    """How the steps of a training run are computed and kept.

    workers: processes with one thread that draw samples ahead, for each training process; 0 draws
    in the training process.
    accumulate: parts that each process splits its share of a step into, `TrainConfig.batch` samples
    each, so that a step has accumulate · batch · processes samples.
    average_on_cpu: whether the moving average is kept in main memory.
    shard: whether weights, gradients and optimizer states are spread over the processes.
    keep: states that are kept, the newest ones.
    most_skipped: training ends if of 100 steps more than these have gradients that are not finite.
    """

    workers: int = 0
    accumulate: int = 1
    average_on_cpu: bool = False
    shard: bool = False
    keep: int = 2
    most_skipped: int = 10

    def __post_init__(self) -> None:
        for name in ("accumulate", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.workers < 0:
            raise ValueError(f"workers must be at least 0, got {self.workers}")


DEFAULT_EXECUTION = TrainExecution()


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


def narrow_frozen(module: nn.Module) -> None:
    """Converts the matrices and kernels that are not trained to bfloat16, in place.

    Autocasting would convert them at each use; the result is the same in half the memory.
    """
    for parameter in module.parameters():
        if not parameter.requires_grad and parameter.ndim > 1:
            parameter.data = parameter.data.to(torch.bfloat16)


def assign(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
    """Copies values into the parameters of the same names, or this process's parts, in place."""
    for name, parameter in parameters.items():
        local(parameter).copy_(values[name])


def train(
    data: Samples,
    objective: Objective,
    out: Path,
    *,
    write: Callable[[Path, Any, Prompts | None, int], None],
    validate: Callable[[Any, Prompts | None, int], dict[str, float]] | None = None,
    on_step: OnStep | None = None,
    every: int = 500,
    execution: TrainExecution = DEFAULT_EXECUTION,
    facts: Mapping[str, Any] | None = None,
) -> None:
    """Trains the network of an objective, or resumes from the newest state in `out`.

    Several processes, started by torchrun or accelerate, each take `config.batch` samples of a
    step; the first one writes. A step whose gradient is not finite changes nothing and is counted.

    write: called as write(out, network, prompts, step) every `every` steps and at the end, with
    the averaged weights in place, by the first process. validate: called as
    validate(network, prompts, step) before that, by all processes; the figures that it returns are
    logged.
    Learned prompts are trained if all of the network is.
    on_step: called as on_step(step, steps, parts of the loss) after each step by the first process.
    An exception from it ends training; the steps since the last state are lost.
    every: steps between two states. execution: how steps are computed and kept.
    facts: what else the result depends on, such as the files; resuming with others is refused.

    ValueError if accelerate is not installed, if `every` is below 1, if a state in `out` cannot be
    read, belongs to another run or is beyond the last step, and if too many steps are not finite.
    """
    if every < 1:
        raise ValueError(f"--every must be at least 1 step, got {every}")
    accelerator = start_accelerate()
    device = accelerator.device
    processes, rank = accelerator.num_processes, accelerator.process_index
    out.mkdir(parents=True, exist_ok=True)
    network, prompts, config = objective.network, objective.prompts, objective.config
    choose_trained(network, config.trains)
    if prompts is not None:
        prompts.requires_grad_(config.trains == "all")
    if config.bf16:
        narrow_frozen(network)
    if config.checkpointing:
        from .checkpointing import recompute

        recompute(network)
    complete = None
    if execution.shard:
        trained = (name for name, p in objective.named_parameters() if p.requires_grad)
        if not all(name.startswith("network.") for name in trained):
            raise ValueError(
                "only the network can be sharded, not learned prompts or adversarial heads: leave "
                "out --shard"
            )
        if accelerator.is_main_process:
            complete = skeleton(network)
        shard(network.to(device), device)
    objective.to(device)
    named = {name: p for name, p in objective.named_parameters() if p.requires_grad}
    optimizers = make_optimizers(named, config)
    average = None
    keeps = accelerator.is_main_process or execution.shard
    if keeps:  # the others need no average: only the first process writes
        average = MovingAverage(named, config.ema, "cpu" if execution.average_on_cpu else None)
    samples = config.batch * execution.accumulate * processes
    shards = processes if execution.shard else 1
    description = run_description(config, samples, {"shards": shards, **(facts or {})})
    part = f"-{rank}" if execution.shard else ""
    states = States(out, description, keep=execution.keep, part=part)
    first = skipped = 0
    if state := states.load():
        check_names(named, state["trained"])
        assign(named, state["trained"])
        load_optimizers(optimizers, state["optimizers"])
        if average:
            for name, value in average.values.items():
                value.copy_(state["average"][name])
        first, skipped = state["step"], state["skipped"]
        del state  # and with it the mapped file
        logger.info("resuming at step %d", first)
    if first > config.steps:
        raise ValueError(
            f"{out} has a state of step {first} already: ask for more than {config.steps} steps, "
            "or choose another folder"
        )
    wrapped: Any = objective
    if not execution.shard:
        wrapped, *optimizers = accelerator.prepare(objective, *optimizers)
    log = Log(out / "log") if accelerator.is_main_process else None

    def share_weights() -> None:
        """Gives all processes the weights of the first one."""
        if processes > 1 and validate and not execution.shard:
            for parameter in named.values():
                torch.distributed.broadcast(parameter.detach(), src=0)

    def finish(step: int) -> None:
        """Validates and writes the averaged weights."""
        if average:
            average.exchange()
        share_weights()
        figures = validate(network, prompts, step) if validate else {}
        if execution.shard:
            gather_into(complete, network)
        if accelerator.is_main_process:
            write(out, complete or network, prompts, step)
        if complete:
            complete.to("meta")
        if average:
            average.exchange()
        share_weights()
        if log and figures:
            log.scalars(step, figures)
            logger.info("step %d: %s", step, _in_words(figures))
        accelerator.wait_for_everyone()

    if first == config.steps:
        finish(first)

    def begin_of(step: int, part: int) -> int:
        """Returns the number of the first sample of a part."""
        return ((step * execution.accumulate + part) * processes + rank) * config.batch

    numbers = [
        range(begin, begin + config.batch)
        for step in range(first, config.steps)
        for part in range(execution.accumulate)
        for begin in [begin_of(step, part)]
    ]
    loader = Batches(data, numbers, config, workers=execution.workers)
    batches = iter(loader)
    recent: deque[bool] = deque(maxlen=RECENT)
    began, logged, waited = time.monotonic(), first, 0.0
    for step in range(first, config.steps):
        rate = learning_rate(step, config)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.zero_grad()
        losses: list[dict[str, float]] = []
        for part in range(execution.accumulate):
            asked = time.monotonic()
            batch = next(batches)
            waited += time.monotonic() - asked
            is_last = part + 1 == execution.accumulate
            with (
                torch.random.fork_rng(),
                nullcontext() if is_last else accelerator.no_sync(wrapped),
            ):
                # Dropout takes no generator.
                torch.manual_seed(number_of(config.seed, "dropout", begin_of(step, part)))
                on_device: list[Any] = [v.to(device) if isinstance(v, Tensor) else v for v in batch]
                loss, parts = wrapped(Batch(*on_device))
                accelerator.backward(loss / execution.accumulate)
            losses.append(parts)
        # Processes share their gradients, so all of them find the same norm.
        norm = float(whole(accelerator.clip_grad_norm_(list(named.values()), config.clip)))
        recent.append(not math.isfinite(norm))
        if recent[-1]:
            skipped += 1
            logger.warning(
                "step %d is skipped: its gradient is not finite (%d so far)", step + 1, skipped
            )
        else:
            for optimizer in optimizers:
                optimizer.step()
            if average:
                average.update(step)
        if sum(recent) > execution.most_skipped:
            good = [path.name for path in states.paths()]
            raise ValueError(
                f"{sum(recent)} of the last {len(recent)} steps up to {step + 1} have gradients "
                "that are not finite: lower --learning-rate, leave out --bf16 or check the data. "
                + (f"The last good state is {out / good[-1]}" if good else "No state was kept yet")
            )
        parts = mean_parts(losses) | {"gradient": norm}
        if log and (step + 1) % LOG_EVERY == 0:
            seconds = time.monotonic() - began
            speed = samples * (step + 1 - logged) / max(seconds, 1e-9)
            run = {
                "learning rate": rate,
                "samples a second": speed,
                "share of time waiting for data": waited / max(seconds, 1e-9),
                "skipped steps": skipped,
            }
            log.scalars(step + 1, parts | run)
            began, logged, waited = time.monotonic(), step + 1, 0.0
        if on_step is not None and accelerator.is_main_process:
            on_step(step + 1, config.steps, parts)
        if (step + 1) % every == 0 or step + 1 == config.steps:
            if average:
                state = {
                    "step": step + 1,
                    "skipped": skipped,
                    "trained": {name: local(p) for name, p in named.items()},
                    "average": average.values,
                    "optimizers": [local_state(optimizer) for optimizer in optimizers],
                }
                states.save(step + 1, state)
            finish(step + 1)
    if replaced := sum((Counter(each) for each in gathered([loader.replaced])), Counter()):
        logger.warning(
            "clips that could not be used: %d; others took their place %d times",
            len(replaced),
            replaced.total(),
        )
    if log:
        log.close()


def mean_parts(losses: list[dict[str, float]]) -> dict[str, float]:
    """Returns the means of the parts of the loss over all processes, by name.

    losses: of this process. A part that is nowhere a number is nan.
    """
    losses = gathered(losses)
    names = dict.fromkeys(name for parts in losses for name in parts)
    finite = {
        name: [p[name] for p in losses if name in p and math.isfinite(p[name])] for name in names
    }
    return {name: sum(v) / len(v) if v else math.nan for name, v in finite.items()}


def start_accelerate() -> Any:
    """Returns an `Accelerator`; ValueError if accelerate is not installed."""
    try:
        from accelerate import Accelerator
        from accelerate.utils import InitProcessGroupKwargs
    except ImportError as error:
        raise ValueError("training needs accelerate: `pip install accelerate`") from error
    # The others wait while the first process writes, and where clips of validation are unequal.
    patience = InitProcessGroupKwargs(timeout=timedelta(hours=2))
    return Accelerator(kwargs_handlers=[patience])


def _in_words(figures: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in figures.items())


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
