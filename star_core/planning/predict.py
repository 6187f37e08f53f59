"""What a plan takes, before it runs, and the plan that fits into the memory there is.

Nothing here was measured beforehand. Bytes and FLOPs are those of the code itself on shapes alone
(`footprint`), and solver, windows and guidance are rehearsed with a network that does nothing.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from typing import Any, Literal

import torch
from torch import Tensor

from ..backbones import backbone_of
from ..diffusion.denoiser import Denoiser
from ..diffusion.levels import guidance_of
from ..diffusion.samplers import SAMPLERS
from ..pipeline import Settings
from ..windows.chunking import ChunkConfig, chunked
from .cost import (
    Cost,
    Pass,
    decoding,
    encoding,
    flops_of,
    network_bytes,
    peak_of,
    reusing,
    vae_bytes,
)
from .meta_memory import META, LiveMetaTensors
from .plan import Plan, Task

Stage = Literal["prompt", "encode", "denoise", "decode"]


@dataclass(frozen=True)
class Bytes:
    """Most bytes of a stage, weights included. device: where the work is done. host: what waits in
    main memory meanwhile, without the frames of the video."""

    device: int
    host: int


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a plan takes.

    memory: of each stage. flops: of each stage, two per multiply-add. passes: forward passes
    of the network on a window of frames.
    """

    memory: dict[Stage, Bytes]
    flops: dict[Stage, int]
    passes: int

    @property
    def peak(self) -> int:
        """Most bytes on the device."""
        return max(stage.device for stage in self.memory.values())

    @property
    def peak_on_cpu(self) -> int:
        """Most bytes where the device's memory is main memory."""
        return max(stage.device + stage.host for stage in self.memory.values())


def predict(plan: Plan) -> Prediction:
    """Takes a few seconds for a full-size network."""
    task = plan.task
    memory: dict[Stage, Bytes] = {
        "encode": encode_memory(plan),
        "denoise": denoise_memory(plan),
        "decode": decode_memory(plan),
    }
    if task.text_encoder:  # comes first, and is gone when the rest begins
        waiting = network_bytes(task.config, task.dtype) + vae_bytes(task.vae, task.dtype)
        backbone = backbone_of(task.config)
        size = (backbone.text_dtype or task.dtype).itemsize
        memory["prompt"] = Bytes(backbone.text_parameters * size, waiting)
    encode, decode = _vae_flops(plan)
    return Prediction(
        memory=memory,
        flops={"encode": encode, "denoise": denoise_flops(plan), "decode": decode},
        passes=sum(rehearsed(plan).calls.values()),
    )


def fitting(
    task: Task,
    memory: int | None = None,
    *,
    offload: bool = True,
    chunk: ChunkConfig | None = None,
) -> Plan:
    """The least curtailed plan that fits into `memory` bytes; if none does, the smallest.

    offload: whether it may. memory None: whatever it takes. chunk: windows as they are wanted, None
    for `Task.usual_chunk`.
    """
    plan = Plan(task=task, chunk=chunk or task.usual_chunk())
    if memory is None or all(
        stage(plan).device <= memory for stage in (encode_memory, decode_memory, denoise_memory)
    ):
        return plan
    if offload:
        plan = replace(plan, slicing=replace(plan.slicing, offload=True))
    plan = _fitting_denoising(plan, memory)
    while max(encode_memory(plan).device, decode_memory(plan).device) > memory:
        if (smaller := plan.smaller_decoding()) is None:
            break
        plan = smaller
    return plan


def _fitting_denoising(plan: Plan, memory: int) -> Plan:
    needed = denoise_memory(plan).device
    if needed <= memory:
        return plan
    plans = [plan]
    while (smaller := plans[-1].smaller_denoising()) is not None:
        plans.append(smaller)
    # Each question takes a second, so the first is about the plan that fits if memory is
    # proportional to what is worked on at a time.
    weights = network_bytes(plan.task.config, plan.task.dtype)
    share = max(memory - weights, 0) / (needed - weights)
    last = len(plans) - 1
    at = next((i for i, p in enumerate(plans) if p.latents <= share * plan.latents), last)
    while at < last and denoise_memory(plans[at]).device > memory:
        at += 1
    while at > 1 and denoise_memory(plans[at - 1]).device <= memory:
        at -= 1
    return plans[at]


def encode_memory(plan: Plan) -> Bytes:
    task, tiles = plan.task, plan.vae_tiles
    frames = max(plan.encoded)
    peak = max(encoding(task.vae, task.dtype, frames, *side).peak for side in set(tiles))
    if len(tiles) > 1:  # what is joined, and the tile before
        latents = -(-(frames - 1) // task.vae.latent_frames) + 1
        values = 2 * task.vae.latent_channels * latents / task.vae.factor**2  # of a pixel
        peak += sum(int(4 * values * h * w) for h, w in (task.padded, max(tiles)))
    host = _pixel_bytes(plan, frames) + task.latent_bytes(_longest_piece(plan))
    return _with_weights(plan, peak, host + _windows_before(plan), "vae")


def decode_memory(plan: Plan) -> Bytes:
    task, tiles = plan.task, plan.vae_tiles
    windows = plan.span.decode_windows
    frames = max(map(len, windows))
    peak = max(decoding(task.vae, task.dtype, frames, *side).peak for side in set(tiles))
    joined, tile = (4 * 3 * frames * h * w for h, w in (task.padded, max(tiles)))
    if len(tiles) > 1:  # what is joined, and the tile before
        peak += joined + tile
    # The clip before and after, and the window before, of which frames are carried on.
    host = 3 * task.latent_bytes(_longest_piece(plan)) + joined * (len(windows) > 1)
    return _with_weights(plan, peak, host, "vae")


def denoise_memory(plan: Plan) -> Bytes:
    task, run, tiles = plan.task, rehearsed(plan), plan.network_tiles
    frames = max(plan.windows)
    passes = [_pass(task, frames, side) for side in tiles]
    peaks = [peak_of(forward, plan.slicing) for forward in set(passes)]
    device = run.held + max(peak.device for peak in peaks)
    if len(tiles) > 1:  # what is joined, and the tile before
        values = task.config.in_dim * frames
        device += sum(task.dtype.itemsize * values * h * w for h, w in (task.latents, max(tiles)))
    # The clip that is restored, frame by frame and as a whole.
    host = 2 * task.latent_bytes(_longest_piece(plan)) + max(peak.host for peak in peaks)
    host += _windows_before(plan)
    if run.kept:
        window = task.shortcuts.attention_window
        kept = sum(reusing(forward, window).kept for forward in passes) * run.kept // frames
        device, host = (device, host + kept) if plan.offload else (device + kept, host)
    return _with_weights(plan, device, host, "network")


def _longest_piece(plan: Plan) -> int:
    """In latents."""
    return max(group.windows[-1].stop for group in plan.span.groups)


def _pixel_bytes(plan: Plan, frames: int) -> int:
    height, width = plan.task.padded
    return 4 * 3 * frames * height * width


def _windows_before(plan: Plan) -> int:
    """Of frames: where pieces are decoded by themselves, each holds what the one before restored,
    and what of that it blends into."""
    groups, each = plan.span.groups, plan.task.vae.latent_frames
    if each == 1 or len(groups) == 1:
        return 0
    return 2 * _pixel_bytes(plan, max(len(group.frames) for group in groups))


def traffic(plan: Plan) -> int:
    """Bytes of skips that a pass over a window sends to main memory and fetches again."""
    frames = max(plan.windows)
    passes = [_pass(plan.task, frames, side) for side in plan.network_tiles]
    return sum(peak_of(forward, plan.slicing).host for forward in passes)


def _with_weights(plan: Plan, device: int, host: int, at_work: str) -> Bytes:
    task = plan.task
    weights = {
        "network": network_bytes(task.config, task.dtype),
        "vae": vae_bytes(task.vae, task.dtype),
    }
    working = weights.pop(at_work)
    waiting = sum(weights.values())
    if plan.offload:
        return Bytes(working + device, waiting + host)
    return Bytes(working + waiting + device, host)


def _pass(task: Task, frames: int, side: tuple[int, int]) -> Pass:
    height, width = side
    return Pass(config=task.config, dtype=task.dtype, frames=frames, height=height, width=width)


def denoise_flops(plan: Plan) -> int:
    """Of all passes of the network."""
    task, window = plan.task, plan.task.shortcuts.attention_window
    total = 0
    for (frames, reused), calls in rehearsed(plan).calls.items():
        for side, number in Counter(plan.network_tiles).items():
            forward = _pass(task, frames, side)
            flops = reusing(forward, window).flops if reused else flops_of(forward, window)
            total += calls * number * flops
    return total


def _vae_flops(plan: Plan) -> tuple[int, int]:
    """Of encoding and of decoding."""
    task, tiles = plan.task, Counter(plan.vae_tiles)
    windows = Counter(map(len, plan.span.decode_windows))

    def flops(cost: Callable[..., Cost], clips: Counter[int]) -> int:
        return sum(
            number * times * cost(task.vae, task.dtype, frames, *side).flops
            for (side, number), (frames, times) in product(tiles.items(), clips.items())
        )

    return flops(encoding, plan.encoded), flops(decoding, windows)


@dataclass(frozen=True)
class Rehearsal:
    """Calls of the network, by frames and whether deep features are reused.

    held: most bytes beside the network's own while it works. kept: frames whose deep features are
    kept at once, those of both prompts counted.
    """

    calls: Counter[tuple[int, bool]]
    held: int
    kept: int


def rehearsed(plan: Plan) -> Rehearsal:
    """The solver, the windows and guidance as they are, with a network that does nothing."""
    groups = [_piece(plan.task, tuple(group.windows)) for group in plan.span.groups]
    calls: Counter[tuple[int, bool]] = Counter()
    for group in groups:
        calls += group.calls
    held, kept = max(group.held for group in groups), max(group.kept for group in groups)
    return Rehearsal(calls, held, kept)


@cache
@torch.inference_mode()
def _piece(task: Task, windows: tuple[range, ...]) -> Rehearsal:
    """Of frames that are denoised together."""
    sampling = task.sampling
    schedule, sigmas = Settings(sampling=sampling, behaviour=task.behaviour).levels
    frames = windows[-1].stop
    size = (1, task.config.in_dim, frames, *task.latents)
    calls: Counter[tuple[int, bool]] = Counter()
    kept: dict[int, int] = {}
    held, t = 0, torch.zeros(1)

    def network(x: Tensor, _t: Tensor, _y: Tensor, _hint: Tensor, deep: Any = None) -> Tensor:
        nonlocal held
        held = max(held, live.live)
        reused = deep is not None and deep.recall(None, t) is not None
        if deep is not None and not reused:
            deep.keep(None, t, torch.empty(0))
            kept[id(deep)] = x.shape[2]
        calls[x.shape[2], reused] += 1
        return torch.empty_like(x)

    with LiveMetaTensors() as live:
        prompt = torch.empty(1, task.config.context_length, task.config.context_dim, device=META)
        denoiser = Denoiser(
            network=network,
            schedule=schedule,
            positive=prompt,
            negative=prompt,
            hint=torch.empty(size, device=META),
            guidance_scale=guidance_of(sampling),
            guidance_rescale=sampling.cfg_rescale,
            dtype=task.dtype,
            shortcuts=task.shortcuts,
        )

        def denoise(x_in: Tensor, sigma: Tensor, window: range) -> Tensor:
            nonlocal t
            t = schedule.model_timestep(sigma).reshape(1)
            return denoiser(x_in, sigma, window)

        if len(sigmas) > 1:
            SAMPLERS[sampling.sampler](
                chunked(denoise, windows, task.behaviour.merge),
                torch.empty(size, device=META),
                sigmas,
                noise=lambda step, sigma, sigma_next: torch.empty(size, device=META),
            )
    # The hint waits on the host.
    return Rehearsal(calls, max(held - task.latent_bytes(frames), 0), sum(kept.values()))
