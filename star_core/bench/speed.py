"""Measures how fast the network runs on this machine: `python -m star_core bench`.

Speed is also given as a share of the rate of matrix multiplication, which compares machines and
sizes. Multiplication, the network and the same network with plain torch layers are measured in
turn, round after round, so that other load slows all three alike; figures are medians.
"""

import json
import multiprocessing
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ..allocator import keep_freed_memory
from ..devices import synchronize
from ..models.slicing import Slicing
from ..models.unet import ControlledVideoUNet, UNetConfig

TEXT_TOKENS = 77
PLAIN_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.GroupNorm, nn.LayerNorm)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A network and the size of its latents: (1, config.in_dim, frames, height, width)."""

    name: str
    config: UNetConfig
    frames: int
    height: int
    width: int

    def network(self, device: str, dtype: torch.dtype) -> ControlledVideoUNet:
        """Returns the network with random weights, or without any on the device "meta"."""
        network = ControlledVideoUNet(self.config, device="meta", dtype=dtype).eval()
        network.requires_grad_(False)
        if device != "meta":
            network.to_empty(device=device)
            generator = torch.Generator(device).manual_seed(0)
            for parameter in network.parameters():
                parameter.normal_(std=0.02, generator=generator)
        return network

    def inputs(self, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns x, t, y and hint of one forward pass; t on the CPU, as in a run."""
        size = (1, self.config.in_dim, self.frames, self.height, self.width)
        x = torch.ones(size, device=device, dtype=dtype)
        y = torch.ones(1, TEXT_TOKENS, self.config.context_dim, device=device, dtype=dtype)
        return x, torch.full((1,), 500, device="meta" if device == "meta" else "cpu"), y, x


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """Figures of one case.

    parameters: number of weights. flops: of a forward pass, two for each multiply-add. seconds: of
    a forward pass. share_of_peak: its rate as a share of that of matrix multiplication.
    plain_seconds, plain_share_of_peak: the same with every layer a plain torch layer.
    share_to_plain: ratio of the two shares, above 1 if this package's layers are faster.
    sliced_to_whole: ratio of the times with and without slices, each the shortest of all rounds.
    memory: peak bytes of a forward pass beyond those in use before it; None if the system has no
    /proc.
    """

    name: str
    parameters: int
    flops: int
    seconds: float
    share_of_peak: float
    plain_seconds: float
    plain_share_of_peak: float
    share_to_plain: float
    sliced_to_whole: float
    memory: int | None


@contextmanager
def plain_layers(network: nn.Module) -> Iterator[None]:
    """Turns every layer of the network into the torch.nn class that it derives from, inside."""
    ours: list[tuple[nn.Module, type[nn.Module], type[nn.Module]]] = [
        (layer, type(layer), plain)
        for layer in network.modules()
        for plain in PLAIN_LAYERS
        if isinstance(layer, plain) and type(layer) is not plain
    ]
    for layer, _, plain in ours:
        layer.__class__ = plain
    try:
        yield
    finally:
        for layer, own, _ in ours:
            layer.__class__ = own


def count_flops(case: Case) -> int:
    """Counts the FLOPs of one forward pass on meta, two for each multiply-add."""
    network = case.network("meta", torch.float32)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), plain_layers(network):
        network(*case.inputs("meta", torch.float32))
    return counter.get_total_flops()


def seconds(work: Callable[[], object], device: str) -> float:
    """Returns the time that a function takes, until the device has finished."""
    synchronize(torch.device(device))
    start = time.perf_counter()
    work()
    synchronize(torch.device(device))
    return time.perf_counter() - start


def matmul_size(device: str, dtype: torch.dtype) -> int:
    """Returns the side of square matrices whose product takes a tenth of a second, up to 16384."""
    side = 2048
    while side < 16384:
        a = torch.ones(side, side, device=device, dtype=dtype)
        seconds(lambda a=a: a @ a, device)  # warms up
        if seconds(lambda a=a: a @ a, device) > 0.1:
            break
        side *= 2
    return side


@torch.inference_mode()
def measure(case: Case, *, rounds: int, device: str, dtype: torch.dtype, side: int) -> Measurement:
    """Measures a case. side: of the square matrices whose product gives the peak rate."""
    flops = count_flops(case)
    network, inputs = case.network(device, dtype), case.inputs(device, dtype)
    matrix = torch.ones(side, side, device=device, dtype=dtype)

    def plain() -> None:
        with plain_layers(network):
            network(*inputs)

    def sliced() -> None:
        with network.working(slicing=Slicing()):
            network(*inputs)

    works: dict[str, Callable[[], object]] = {
        "peak": lambda: matrix @ matrix,
        "ours": lambda: network(*inputs),
        "plain": plain,
        "sliced": sliced,
    }
    times: dict[str, list[float]] = {name: [] for name in works}
    for index in range(rounds + 1):  # the first round warms up
        order = list(works) if index % 2 else list(works)[::-1]
        for name in order:
            elapsed = seconds(works[name], device)
            if index:
                times[name].append(elapsed)
    rates = [2 * side**3 / elapsed for elapsed in times["peak"]]
    shares = {
        name: [flops / elapsed / rate for elapsed, rate in zip(times[name], rates, strict=True)]
        for name in ("ours", "plain")
    }
    return Measurement(
        name=case.name,
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        flops=flops,
        seconds=median(times["ours"]),
        share_of_peak=median(shares["ours"]),
        plain_seconds=median(times["plain"]),
        plain_share_of_peak=median(shares["plain"]),
        share_to_plain=median(a / b for a, b in zip(shares["ours"], shares["plain"], strict=True)),
        sliced_to_whole=min(times["sliced"]) / min(times["ours"]),
        memory=memory_of_forward(case, device, dtype),
    )


def memory_of_forward(case: Case, device: str, dtype: torch.dtype) -> int | None:
    """Returns the peak bytes of a forward pass beyond those in use before; None without /proc.

    It is measured in a process of its own, because a process's peak never falls.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=keep_freed_memory) as pool:
        return pool.submit(_memory_of_forward, case, device, dtype).result()


@torch.inference_mode()
def _memory_of_forward(case: Case, device: str, dtype: torch.dtype) -> int | None:
    network, inputs = case.network(device, dtype), case.inputs(device, dtype)
    if device.startswith("cuda"):
        before = torch.cuda.memory_allocated()
        network(*inputs)
        return torch.cuda.max_memory_allocated() - before
    try:
        before = resident("VmRSS")
        network(*inputs)
        return resident("VmHWM") - before
    except OSError:  # no /proc: not Linux
        return None


def resident(field: str) -> int:
    """Returns resident bytes of this process: the present ones ("VmRSS") or the peak ("VmHWM").

    OSError on systems without /proc.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def cases(tiny: UNetConfig) -> list[Case]:
    """Returns the built-in model, of configuration `tiny`, and STAR's width at a smaller depth."""
    wide = UNetConfig(dim_mult=(1, 2), num_res_blocks=1, attn_scales=(1.0, 0.5))
    return [
        Case(name="tiny, 8 frames of 64x64 latents", config=tiny, frames=8, height=66, width=64),
        Case(name="320 channels, 4 frames of 16x16", config=wide, frames=4, height=18, width=16),
    ]


def run(
    tiny: UNetConfig,
    *,
    rounds: int = 5,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    as_json: bool = False,
) -> None:
    """Measures all cases and prints their figures.

    tiny: configuration of the built-in model. as_json: whether to print one JSON object. ValueError
    for fewer than one round.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    side = matmul_size(device, dtype)
    measured = [
        measure(case, rounds=rounds, device=device, dtype=dtype, side=side) for case in cases(tiny)
    ]
    if as_json:
        machine = {"threads": torch.get_num_threads(), "torch": torch.__version__}
        settings = {"device": device, "dtype": str(dtype), "rounds": rounds, "matmul_side": side}
        print(json.dumps({**machine, **settings, "cases": [asdict(m) for m in measured]}))
        return
    print(
        f"{device}, {torch.get_num_threads()} threads, {dtype}, torch {torch.__version__}; "
        f"medians of {rounds} rounds; peak: product of {side}x{side} matrices"
    )
    for m in measured:
        memory = "not known on this system" if m.memory is None else f"{m.memory / 2**20:,.0f} MiB"
        print(
            f"{m.name} ({m.parameters / 1e6:,.1f} M parameters)\n"
            f"  forward          {m.seconds:8.3f} s, {m.flops / 1e9:,.1f} GFLOP\n"
            f"  share of peak    {m.share_of_peak:8.3f}\n"
            f"  plain layers     {m.plain_seconds:8.3f} s, share {m.plain_share_of_peak:.3f}\n"
            f"  ratio of shares  {m.share_to_plain:8.3f}\n"
            f"  in slices        {m.sliced_to_whole:8.3f} of the time\n"
            f"  memory           {memory} on top of the weights"
        )
