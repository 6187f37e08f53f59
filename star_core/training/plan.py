"""What full-size training takes, counted with tensors that have no data."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ..backbones import Network, NetworkConfig, build_network
from .checkpointing import recompute
from .lora import add_lora
from .objective import Trains
from .trainer import choose_trained

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """Of one process with one sample. Bytes, and FLOPs with two for a multiply-add.

    weights: of the network, bfloat16 where frozen and float32 where trained. states: gradients,
    Adam's two moments and the average. activations: what is kept for the way back. block: the most
    that a block, computed again, keeps; 0 without checkpointing.
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
        return self.weights + self.states + self.activations + self.block

    def __str__(self) -> str:
        sizes = ("weights", "states", "activations", "block", "memory")
        figures = ", ".join(f"{name} {getattr(self, name) / GIB:.1f} GiB" for name in sizes)
        return (
            f"{self.parameters / 1e6:,.1f} M parameters, {self.trained / 1e6:,.3f} M trained\n"
            f"{figures}\n{self.flops / 1e15:.3f} PFLOP a sample"
        )

    def table(self, gpus: tuple[int, ...] = (1, 2, 4, 8), batch: int = 8) -> str:
        """For each number of GPUs: samples of a batch that each has in turn, and its work."""
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
    """Of clips of `frames` latents height x width, in bfloat16 (STAR: 32 of 90x160, 720p).

    With attention that keeps its inputs and output alone, as fused kernels do. VAE, text encoder
    and losses in pixels are not counted. Data parallel: every GPU holds everything.
    """

    def run(again: bool) -> tuple["_Kept", int, Network]:
        attention = _FusedAttention()
        network = build_network(config, attention=attention, device="meta", dtype=torch.bfloat16)
        if trains == "lora":
            add_lora(network, rank)
        choose_trained(network, trains)
        network.eval()  # no dropout
        kept = _Kept(network)
        if again:
            recompute(network)
        like: dict[str, Any] = {"device": "meta", "dtype": torch.bfloat16}
        x = torch.empty(1, config.in_dim, frames, height, width, **like)
        y = torch.empty(1, config.context_length, config.context_dim, **like)
        t = torch.zeros(1, device="meta", dtype=torch.int64)
        with FlopCounterMode(display=False) as counter:
            with torch.autograd.graph.saved_tensors_hooks(kept.keep, lambda tensor: tensor):
                v = network(x, t, y, x)
            v.float().square().mean().backward()
        return kept, counter.get_total_flops() + attention.flops, network

    kept, flops, network = run(checkpointing)
    block = run(False)[0].largest if checkpointing else 0
    sizes = [(p.numel(), p.requires_grad) for p in network.parameters()]
    trained = sum(size for size, grad in sizes if grad)
    parameters = sum(size for size, _ in sizes)
    return TrainingPlan(
        parameters=parameters,
        trained=trained,
        weights=2 * (parameters - trained) + 4 * trained,
        states=16 * trained,
        activations=kept.bytes,
        block=block,
        flops=flops,
    )


class _Kept:
    """Counts what autograd keeps, every storage once and weights not; `largest` of one block."""

    def __init__(self, network: Network) -> None:
        self.known = {p.untyped_storage()._cdata for p in network.parameters()}
        self.alive: list[Tensor] = []  # or a new storage would get an old one's place
        self.bytes = self.largest = self._before = 0
        for block in network.blocks:
            block.register_forward_pre_hook(self._begin)
            block.register_forward_hook(self._end)

    def _begin(self, *_: Any) -> None:
        self._before = self.bytes

    def _end(self, *_: Any) -> None:
        self.largest = max(self.largest, self.bytes - self._before)

    def keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.known:
            self.known.add(storage._cdata)
            self.alive.append(tensor)
            self.bytes += storage.nbytes()
        return tensor


class _FusedAttention:
    """Stands in for a fused kernel: same shapes, same FLOPs, no scores kept."""

    def __init__(self) -> None:
        self.flops = 0

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
        attention = self

        class Fused(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                out = torch.empty_like(q)
                ctx.save_for_backward(q, k, v, out)
                ctx.work = 4 * q.shape[0] * q.shape[1] * k.shape[1] * q.shape[2]
                attention.flops += ctx.work
                return out

            @staticmethod
            def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
                # The scores are computed again: five products where forward has two.
                attention.flops += ctx.work * 5 // 2
                return tuple(torch.empty_like(x) for x in ctx.saved_tensors[:3])

        return Fused.apply(q, k, v)
