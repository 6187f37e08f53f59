"""Memory and compute of full-size training, counted with tensors on meta."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ..backbones import Network, NetworkConfig, build_network
from ..lora import add_lora
from .checkpointing import recompute
from .objective import Trains
from .trainer import choose_trained

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """Memory and compute of one process for one sample.

    parameters, trained: how many there are and are trained. weights: bytes of the network, bfloat16
    if frozen and float32 if trained. states: bytes of gradients, Adam's two moments and the moving
    average. activations: bytes saved for the backward pass. block: largest number of bytes that
    one recomputed block saves; 0 without checkpointing. flops: two for each multiply-add.
    """

    parameters: int
    trained: int
    weights: int
    states: int
    activations: int
    block: int
    flops: int

    @property
    def memory(self) -> int:
        """Bytes of all parts together."""
        return self.weights + self.states + self.activations + self.block

    def __str__(self) -> str:
        sizes = ("weights", "states", "activations", "block", "memory")
        figures = ", ".join(f"{name} {getattr(self, name) / GIB:.1f} GiB" for name in sizes)
        return (
            f"{self.parameters / 1e6:,.1f} M parameters, {self.trained / 1e6:,.3f} M trained\n"
            f"{figures}\n{self.flops / 1e15:.3f} PFLOP a sample"
        )

    def table(self, gpus: tuple[int, ...] = (1, 2, 4, 8), batch: int = 8) -> str:
        """Returns a line for each number of GPUs with the share of a batch that each processes."""
        lines = ["GPUs  samples in turn  PFLOP a step and GPU  GiB a GPU"]
        for count in gpus:
            turns = -(-batch // count)
            work, memory = self.flops * turns / 1e15, self.memory / GIB
            lines.append(f"{count:4} {turns:16} {work:21.2f} {memory:10.1f}")
        return "\n".join(lines)


def plan_training(
    config: NetworkConfig,
    *,
    frames: int = 32,
    height: int = 90,
    width: int = 160,
    trains: Trains = "star",
    rank: int = 16,
    checkpointing: bool = True,
) -> TrainingPlan:
    """Counts memory and FLOPs of a training step in bfloat16 with data parallelism.

    Attention is assumed to save only its inputs and output, as fused kernels do. VAE, text encoder
    and losses in pixels are not counted.

    frames, height, width: of a sample, in latents; the defaults are STAR's (32 frames of 720p).
    trains, checkpointing: see `TrainConfig`. rank: of a LoRA.
    """

    def run(checkpointing: bool) -> tuple["_SavedTensors", int, Network]:
        attention = _FusedAttention()
        network = build_network(config, attention=attention, device="meta", dtype=torch.bfloat16)
        if trains == "lora":
            add_lora(network, rank)
        choose_trained(network, trains)
        network.eval()  # no dropout
        saved = _SavedTensors(network)
        if checkpointing:
            recompute(network)
        options: dict[str, Any] = {"device": "meta", "dtype": torch.bfloat16}
        x = torch.empty(1, config.in_dim, frames, height, width, **options)
        y = torch.empty(1, config.context_length, config.context_dim, **options)
        t = torch.zeros(1, device="meta", dtype=torch.int64)
        with FlopCounterMode(display=False) as counter:
            with torch.autograd.graph.saved_tensors_hooks(saved.add, lambda tensor: tensor):
                v = network(x, t, y, x)
            v.float().square().mean().backward()
        return saved, counter.get_total_flops() + attention.flops, network

    saved, flops, network = run(checkpointing)
    block = run(False)[0].largest if checkpointing else 0
    sizes = [(p.numel(), p.requires_grad) for p in network.parameters()]
    trained = sum(size for size, grad in sizes if grad)
    parameters = sum(size for size, _ in sizes)
    return TrainingPlan(
        parameters=parameters,
        trained=trained,
        weights=2 * (parameters - trained) + 4 * trained,
        states=16 * trained,
        activations=saved.bytes,
        block=block,
        flops=flops,
    )


class _SavedTensors:
    """Counts the bytes that autograd saves, each storage once and without weights.

    largest: most bytes that one block saves.
    """

    def __init__(self, network: Network) -> None:
        self.known = {p.untyped_storage()._cdata for p in network.parameters()}
        self.alive: list[Tensor] = []  # or a new storage could get the address of a freed one
        self.bytes = self.largest = self._before = 0
        for block in network.blocks:
            block.register_forward_pre_hook(self._begin)
            block.register_forward_hook(self._end)

    def _begin(self, *_: Any) -> None:
        self._before = self.bytes

    def _end(self, *_: Any) -> None:
        self.largest = max(self.largest, self.bytes - self._before)

    def add(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.known:
            self.known.add(storage._cdata)
            self.alive.append(tensor)
            self.bytes += storage.nbytes()
        return tensor


class _FusedAttention:
    """Stands in for a fused kernel: same shapes and FLOPs, attention scores are not saved."""

    def __init__(self) -> None:
        self.flops = 0

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
        attention = self

        class Fused(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                out = torch.empty_like(q)
                ctx.save_for_backward(q, k, v, out)
                ctx.flops = 4 * q.shape[0] * q.shape[1] * k.shape[1] * q.shape[2]
                attention.flops += ctx.flops
                return out

            @staticmethod
            def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
                # The scores are recomputed: five products, the forward pass has two.
                attention.flops += ctx.flops * 5 // 2
                return tuple(torch.empty_like(x) for x in ctx.saved_tensors[:3])

        return Fused.apply(q, k, v)
