"""Memory and compute of a training run, counted with tensors on meta."""

from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ..backbones import NetworkConfig, build_network
from ..lora import LoraLayers, add_lora, lora_strength
from ..planning.cost import Geometry, encoding
from ..planning.meta_memory import LiveMetaTensors
from ..vae.cogvideox import CausalVideoVAE
from .adversarial import heads_of
from .checkpointing import recompute
from .distillation import DistillConfig
from .objective import Trains
from .pixels import PixelCrop
from .trainer import choose_trained
from .videos import PIXELS

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """Memory and compute of training.

    parameters, trained: how many there are and are trained. batch, accumulate: samples of a process
    in a part of a step, and parts of a step. shard: see `TrainExecution`.
    network: bytes that are sharded, by name: weights, gradients, states. others: bytes that every
    process has, by name. stages: bytes that are needed in turn, by name. buckets: bytes in which
    several processes exchange gradients. host: bytes in main memory of the first process.
    state, model: bytes of a state and of a model on disk. flops: of a sample, two for each
    multiply-add.
    """

    parameters: int
    trained: int
    batch: int
    accumulate: int
    shard: bool
    network: dict[str, int]
    others: dict[str, int]
    stages: dict[str, int]
    buckets: int
    host: int
    state: int
    model: int
    flops: int

    def memory(self, processes: int = 1) -> int:
        """Returns the bytes of the first process's device. processes: how many there are."""
        network, buckets = sum(self.network.values()), 0 if processes == 1 else self.buckets
        if self.shard:
            network, buckets = -(-network // processes), 0
        return network + buckets + sum(self.others.values()) + max(self.stages.values())

    def __str__(self) -> str:
        def sizes(parts: dict[str, int]) -> str:
            return ", ".join(f"{name} {size / GIB:.1f}" for name, size in parts.items() if size)

        return (
            f"{self.parameters / 1e6:,.1f} M parameters, {self.trained / 1e6:,.3f} M trained\n"
            f"GiB on the device: {sizes(self.network | self.others)}\n"
            f"GiB in turn: {sizes(self.stages)}\n"
            f"GiB elsewhere: buckets of several processes {self.buckets / GIB:.1f}, main memory "
            f"{self.host / GIB:.1f}, a state {self.state / GIB:.1f}, a model "
            f"{self.model / GIB:.1f}\n"
            f"{self.flops / 1e15:.3f} PFLOP a sample"
        )

    def hours(self, steps: int, rate: float) -> float:
        """Returns how long a number of steps takes. rate: FLOP a second of one GPU."""
        return self.flops * self.batch * self.accumulate * steps / rate / 3600

    def table(
        self,
        gpus: tuple[int, ...] = (1, 2, 4, 8),
        *,
        steps: int | None = None,
        rate: float | None = None,
    ) -> str:
        """Returns a line for each number of GPUs with its samples, work and memory.

        steps, rate: of the training, and FLOP a second of one GPU; with both, a line tells the
        hours, which do not depend on the number of GPUs.
        """
        lines = ["GPUs  samples a step  PFLOP a step and GPU  GiB on the first GPU"]
        for count in gpus:
            each = self.batch * self.accumulate
            work, memory = self.flops * each / 1e15, self.memory(count) / GIB
            lines.append(f"{count:4} {each * count:15} {work:21.2f} {memory:21.1f}")
        if steps is not None and rate is not None:
            hours = self.hours(steps, rate)
            lines.append(f"{steps} steps at {rate / 1e12:g} TFLOP/s a GPU: {hours:.1f} hours")
        return "\n".join(lines)


def plan_training(
    config: NetworkConfig,
    *,
    frames: int = 32,
    height: int = 90,
    width: int = 160,
    trains: Trains = "star",
    rank: int = 16,
    lora_layers: LoraLayers = "attention",
    lora_controlnet: bool = True,
    distill: DistillConfig | None = None,
    checkpointing: bool = True,
    bf16: bool = True,
    optimizer: Literal["adamw", "muon"] = "adamw",
    batch: int = 1,
    accumulate: int = 1,
    average_on_cpu: bool = False,
    shard: bool = False,
    vae: Geometry | None = None,
    crop: PixelCrop | None = None,
    text_encoder: int = 0,
) -> TrainingPlan:
    """Counts memory and FLOPs of the steps that `finetune` takes.

    Attention is assumed to save only its inputs and output, as fused kernels do. The text encoder's
    work, and what libraries allocate inside an operation, are not counted.

    frames, height, width: of a sample, in latents; the defaults are STAR's (32 frames of 720p).
    trains, checkpointing, bf16, optimizer, batch: see `TrainConfig`. rank, lora_layers,
    lora_controlnet: of a LoRA, see `add_lora`. distill: counts the teacher's evaluations too, which
    is taken to be guided, and what an adversarial loss adds. accumulate, average_on_cpu, shard: see
    `TrainExecution`. vae: sizes of the VAE, which stays on the device; None for none. crop: what is
    decoded for a loss in pixels; None for none.
    text_encoder: bytes of its weights.
    """
    counted = partial(
        _count,
        config,
        size=(batch, frames, height, width),
        dtype=torch.bfloat16 if bf16 else torch.float32,
        trains=trains,
        rank=rank,
        lora_layers=lora_layers,
        lora_controlnet=lora_controlnet,
        adversarial=distill is not None and bool(distill.adversarial),
    )
    step = counted(checkpointing=checkpointing)
    block = counted(checkpointing=False, backward=False).largest if checkpointing else 0
    parameters, trained, matrices = step.parameters, step.trained, step.trained_matrices
    narrow = step.frozen_matrices if bf16 else 0
    flops = step.flops
    if distill is not None:
        # Two prompts of the teacher, and the student where its phase has not ended by then.
        evaluations = 3 - distill.evaluations / distill.solver_steps
        flops += round(evaluations * step.forward)
    average = 4 * trained
    # Muon keeps one moment of a matrix, Adam two of everything.
    moments = 4 * (2 * trained - (matrices if optimizer == "muon" else 0))
    others = {"text encoder": text_encoder}
    stages = {
        # Autocasting keeps the trained matrices in bfloat16 until the backward pass has ended.
        "activations": step.saved + block + (2 * matrices if bf16 else 0),
        # AdamW's square roots of the second moments.
        "optimizer step": 4 * trained,
    }
    flops = flops // batch
    if vae is not None:
        built = vae_on_meta(vae)
        causal = isinstance(built, CausalVideoVAE)
        others["VAE"] = 4 * sum(p.numel() for p in built.model.parameters())
        factor, pixel_frames = vae.factor, (frames - 1) * vae.latent_frames + 1
        size = height * factor, width * factor
        once = encoding(vae, torch.float32, pixel_frames if causal else 1, *size)
        at_a_time = 2 * batch if causal else max(1, PIXELS // (size[0] * size[1]))
        clips = 2 * batch * pixel_frames * 3 * size[0] * size[1] * 4
        stages["encoding"] = at_a_time * once.peak + 2 * clips
        flops += 2 * once.flops * (1 if causal else pixel_frames)
        if crop is not None:
            kept, work = _decoding(vae, crop, (frames, height, width))
            stages["activations"] += kept
            flops += 4 * work  # of the result with its gradient, and of the clean clip
    return TrainingPlan(
        parameters=parameters,
        trained=trained,
        batch=batch,
        accumulate=accumulate,
        shard=shard,
        network={
            "weights": 4 * parameters - 2 * narrow,
            "gradients": 4 * trained,
            "optimizer": moments,
            "average": 0 if average_on_cpu else average,
        },
        others=others,
        stages=stages,
        buckets=4 * trained,
        host=average if average_on_cpu else 0,
        state=4 * trained + average + moments,
        model=2 * ((trained if trains == "lora" else parameters) - step.heads),
        flops=flops,
    )


class _Pass(NamedTuple):
    """The cost of a forward and a backward pass of a network in training.

    forward, flops: FLOPs of the first and of both. saved: bytes that autograd saves. largest: most
    of these that one block saves. The rest counts weights; heads: those of the adversarial loss.
    """

    forward: int
    flops: int
    saved: int
    largest: int
    parameters: int
    trained: int
    trained_matrices: int
    frozen_matrices: int
    heads: int


@cache
def _count(
    config: NetworkConfig,
    *,
    size: tuple[int, int, int, int],
    dtype: torch.dtype,
    trains: Trains,
    rank: int,
    lora_layers: LoraLayers,
    lora_controlnet: bool,
    adversarial: bool,
    checkpointing: bool,
    backward: bool = True,
) -> _Pass:
    """Counts a pass on latents. size: samples, frames, height and width. backward: takes time."""
    attention = _FusedAttention()
    heads: Any = heads_of(config, device="meta", dtype=dtype) if adversarial else None
    network: Any = build_network(config, attention=attention, device="meta", dtype=dtype)
    if trains == "lora":
        add_lora(network, rank, layers=lora_layers, controlnet=lora_controlnet)
    choose_trained(network, trains)
    network.eval()  # no dropout
    saved = _SavedTensors(network)
    if checkpointing:
        recompute(network)
    batch, *sides = size
    x = torch.empty(batch, config.in_dim, *sides, device="meta", dtype=dtype)
    y = x.new_empty(batch, config.context_length, config.context_dim)
    t = x.new_zeros(batch, dtype=torch.int64)
    with LiveMetaTensors() as live:
        with torch.autograd.graph.saved_tensors_hooks(saved.add, lambda tensor: tensor):
            v = network(x, t, y, x)
            forward = live.flops + attention.flops
            loss = v.float().square().mean()
            if heads is not None:
                with lora_strength(network, 0.0):
                    features = network.control_features(v, t, y, x)
                loss = loss + sum(opinion.mean() for opinion in heads(features))
        once = live.flops + attention.flops - forward
        if backward:
            loss.backward()
    weights = [*network.parameters(), *(heads.parameters() if heads else ())]
    matrices = [(p.numel(), p.requires_grad) for p in weights if p.ndim > 1]
    return _Pass(
        forward=forward,
        # The features of clean clips take no gradient.
        flops=live.flops + attention.flops + once,
        saved=saved.bytes,
        largest=saved.largest,
        parameters=sum(p.numel() for p in weights),
        trained=sum(p.numel() for p in weights if p.requires_grad),
        trained_matrices=sum(count for count, is_trained in matrices if is_trained),
        frozen_matrices=sum(count for count, is_trained in matrices if not is_trained),
        heads=sum(p.numel() for p in heads.parameters()) if heads else 0,
    )


def vae_on_meta(geometry: Geometry) -> Any:
    """Returns a VAE without weights, on the device "meta"."""
    with torch.device("meta"):
        vae: Any = geometry.build()
    vae.model.to("meta")  # some weights ignore the context
    return vae


def _decoding(geometry: Geometry, crop: PixelCrop, size: tuple[int, int, int]) -> tuple[int, int]:
    """Returns the bytes that decoding a crop of one sample saves, and its FLOPs.

    size: frames, height and width of the latents.
    """
    vae = vae_on_meta(geometry)
    vae.model.requires_grad_(False)
    frames, height, width = (
        min(side, part + around)
        for side, part, around in zip(
            size, (crop.frames, crop.height, crop.width), (0, *2 * [2 * crop.margin]), strict=True
        )
    )
    z = torch.empty(1, vae.latent_channels, frames, height, width, device="meta")
    saved = _SavedTensors(vae.model)
    with (
        LiveMetaTensors() as live,
        torch.autograd.graph.saved_tensors_hooks(saved.add, lambda tensor: tensor),
        torch.device("meta"),
    ):
        vae.decode_window(z.requires_grad_())
    return saved.bytes, live.flops


class _SavedTensors:
    """Counts the bytes that autograd saves, each storage once and without weights.

    largest: most bytes that one block of a network saves.
    """

    def __init__(self, network: nn.Module) -> None:
        self.known = {p.untyped_storage()._cdata for p in network.parameters()}
        self.alive: list[Tensor] = []  # or a new storage could get the address of a freed one
        self.bytes = self.largest = self._before = 0
        for block in getattr(network, "blocks", ()):
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
