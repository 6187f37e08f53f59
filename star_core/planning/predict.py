"""Predicts what a plan takes before it runs, and finds the plan that fits into the memory.

Nothing is fitted to measurements: bytes and FLOPs are those of the code itself on the meta device
(`cost`), and the solver, the windows and guidance run with a network that does nothing.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..backbones import backbone_of
from ..diffusion.denoiser import Denoiser
from ..diffusion.levels import guidance_of
from ..diffusion.samplers import SAMPLERS
from ..memory import SLICES
from ..settings import Settings
from ..windows.chunking import ChunkConfig, chunked
from .cost import Bytes, Cost, Pass, decoding, encoding, pass_cost, peak_of, weight_bytes
from .meta_memory import META, LiveMetaTensors
from .plan import Plan, Task

VAEStage = Literal["encode", "decode"]
Stage = Literal["prompt", "encode", "denoise", "decode"]
VAE_COST = {"encode": encoding, "decode": decoding}
STAGES_OF_VAE: tuple[VAEStage, VAEStage] = ("encode", "decode")


class Work(NamedTuple):
    """The work of operations: FLOPs, two per multiply-add, and bytes read and written."""

    flops: int
    traffic: int


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The predicted memory and compute of a plan.

    memory: most bytes of each stage, with weights, without the frames of the video. work: of each
    stage. passes: forward passes of the network on a window of frames.
    """

    memory: dict[Stage, Bytes]
    work: dict[Stage, Work]
    passes: int

    @property
    def flops(self) -> dict[Stage, int]:
        """FLOPs of each stage."""
        return {stage: work.flops for stage, work in self.work.items()}

    @property
    def peak(self) -> int:
        """Most bytes on the device."""
        return max(stage.device for stage in self.memory.values())


def predict(plan: Plan) -> Prediction:
    """Returns what a plan takes. Lasts a few seconds for a full-size network."""
    task, backbone = plan.task, backbone_of(plan.task.config)
    memory: dict[Stage, Bytes] = {
        "encode": vae_memory(plan, "encode"),
        "denoise": denoise_memory(plan),
        "decode": vae_memory(plan, "decode"),
    }
    if task.text_encoder:  # runs first and is unloaded before the rest begins
        device = backbone.text_parameters * (backbone.text_dtype or task.dtype).itemsize
        memory["prompt"] = Bytes(
            device, sum(weight_bytes(task.config, task.vae, task.dtype, task.vae_type))
        )
    work: dict[Stage, Work] = {
        "encode": _vae_work(plan, "encode"),
        "denoise": denoise_work(plan),
        "decode": _vae_work(plan, "decode"),
    }
    return Prediction(memory=memory, work=work, passes=_rehearse(plan)[0].total())


def fitting(
    task: Task,
    memory: int | None = None,
    *,
    offload: bool = True,
    chunk: ChunkConfig | None = None,
    gpu: bool = False,
) -> Plan:
    """Returns the plan that fits into the memory with the least change, or the smallest of all.

    memory: bytes on the device, None for no limit. offload: whether the plan may offload. chunk:
    windows of frames to begin with, None for `Task.usual_chunk`. gpu: see `suited_to_gpu`.
    """

    def network(plan: Plan) -> bool:
        return memory is None or denoise_memory(plan).device <= memory

    def vae(plan: Plan) -> bool:
        return memory is None or all(
            vae_memory(plan, each).device <= memory for each in STAGES_OF_VAE
        )

    plan = Plan(task=task, chunk=chunk or task.usual_chunk())
    for fits, smaller in ((network, Plan.smaller_denoising), (vae, Plan.smaller_decoding)):
        plans = [plan]
        while after := smaller(plans[-1], offload=offload):
            plans.append(after)
        # Most plans fit after few changes, so the first plans are tried first.
        bound, last = 1, len(plans) - 1
        while bound <= last and not fits(plans[bound - 1]):
            bound *= 2
        plan = plans[bisect_left(plans, True, bound // 2, min(bound, last), key=fits)]
    return suited_to_gpu(plan, memory) if gpu else plan


def suited_to_gpu(plan: Plan, memory: int | None) -> Plan:
    """Returns the plan with what a GPU needs beyond memory that suffices.

    Tiles of the VAE become smaller where a tensor would have more than 2^31 values, with which some
    kernels cannot work. Slices of the network become as large as fits, because many small
    operations keep a GPU waiting for the host.

    memory: bytes on the device; None leaves the slices.
    """
    while _largest_of_vae(plan) > 2**31 and (tiled := plan.smaller_decoding(offload=False)):
        plan = tiled
    for each in SLICES if memory else ():
        larger = replace(plan, slicing=replace(each, offload=plan.offload))
        if each.temporal_pixels <= plan.slicing.temporal_pixels:
            break
        if memory and denoise_memory(larger).device <= memory:
            return larger
    return plan


def _largest_of_vae(plan: Plan) -> int:
    """Returns the number of values of the VAE's largest tensor."""
    vae, dtype = plan.task.vae, plan.task.vae_type
    return max(
        VAE_COST[stage](vae, dtype, max(vae_calls(plan, stage)), *side).largest
        for stage in STAGES_OF_VAE
        for side in set(plan.vae_tiles)
    )


def vae_calls(plan: Plan, stage: VAEStage) -> Counter[int]:
    """Returns the numbers of frames that are encoded or decoded together, with how often each."""
    if stage == "encode":
        return Counter(plan.task.vae.encoded(plan.span, hold=plan.chunk.hold))
    return Counter(map(len, plan.span.decode_windows))


def vae_memory(plan: Plan, stage: VAEStage) -> Bytes:
    """Returns the most bytes while frames are encoded or decoded."""
    vae, tiles, calls = plan.task.vae, plan.vae_tiles, vae_calls(plan, stage)
    frames, (clip, frame, previous) = max(calls), _host_bytes(plan)
    if stage == "encode":
        # Mean and variance of each latent.
        values = 2 * vae.latent_channels * (-(-(frames - 1) // vae.latent_frames) + 1)
        size, host, idle = 4 * values / vae.factor**2, clip + previous, frames * frame
    else:
        # The clip before and after, and the previous window, whose last frames are blended.
        size, host, idle = 4 * 3 * frames, 3 * clip, frames * frame * (calls.total() > 1)
    if vae.latent_frames > 1:  # long windows are in main memory
        host, idle = host + idle, 0
    cost, dtype = VAE_COST[stage], plan.task.vae_type
    peak = max(cost(vae, dtype, frames, *side).peak for side in set(tiles))
    peak += _blended(tiles, plan.task.padded, size) + idle
    return _with_weights(plan, peak, host, "vae")


def denoise_memory(plan: Plan) -> Bytes:
    """Returns the most bytes while a clip is denoised."""
    task, tiles, frames = plan.task, plan.network_tiles, max(plan.windows)
    (_, device, kept), (clip, _, previous) = _rehearse(plan), _host_bytes(plan)
    passes = _passes(plan, frames)
    peaks = [peak_of(forward, plan.slicing) for forward in set(passes)]
    device += max(peak.device for peak in peaks)
    device += _blended(tiles, task.latents, task.dtype.itemsize * task.config.in_dim * frames)
    # The clip that is restored, frame by frame and as a whole.
    host = 2 * clip + max(peak.host for peak in peaks) + previous
    if kept:
        window = task.shortcuts.attention_window
        features = sum(pass_cost(forward, window, reuse=True)[1] for forward in passes)
        features = features * kept // frames
        device, host = device + features * (not plan.offload), host + features * plan.offload
    return _with_weights(plan, device, host, "network")


def skip_traffic(plan: Plan) -> int:
    """Returns how many bytes of skip connections a pass sends to main memory and fetches again."""
    return sum(peak_of(forward, plan.slicing).host for forward in _passes(plan, max(plan.windows)))


def _passes(plan: Plan, frames: int) -> list[Pass]:
    """Returns the forward passes over a window of frames, one for each tile."""
    model = {"config": plan.task.config, "dtype": plan.task.dtype, "frames": frames}
    return [Pass(height=height, width=width, **model) for height, width in plan.network_tiles]


def _blended(tiles: Sequence[tuple[int, int]], whole: tuple[int, int], size: float) -> int:
    """Bytes of the blended frame and the previous tile, `size` bytes a place; 0 without tiles."""
    return sum(int(size * h * w) for h, w in (whole, max(tiles))) if len(tiles) > 1 else 0


def _latent_bytes(task: Task, frames: int) -> int:
    height, width = task.latents
    return 4 * task.config.in_dim * frames * height * width


def _host_bytes(plan: Plan) -> tuple[int, int, int]:
    """Returns the bytes of a group's latents, of a frame, and of frames of the previous window.

    The last are 0 unless windows are decoded by themselves: then its result is stored, and the
    part of it that is blended into the next.
    """
    (height, width), groups = plan.task.padded, plan.span.groups
    clip = _latent_bytes(plan.task, max(group.windows[-1].stop for group in groups))
    frame = 4 * 3 * height * width
    blends = plan.task.vae.latent_frames > 1 and len(groups) > 1
    return clip, frame, 2 * frame * max(len(group.frames) for group in groups) * blends


def _with_weights(plan: Plan, device: int, host: int, part: Literal["network", "vae"]) -> Bytes:
    """Adds the weights of the part that works and of the one that is idle."""
    task = plan.task
    network, vae = weight_bytes(task.config, task.vae, task.dtype, task.vae_type)
    working, idle = (network, vae) if part == "network" else (vae, network)
    if plan.offload:
        return Bytes(working + device, idle + host)
    return Bytes(working + idle + device, host)


def denoise_work(plan: Plan) -> Work:
    """Returns the work of all passes of the network."""
    window = plan.task.shortcuts.attention_window
    return _total(
        (times, pass_cost(forward, window, reuse=reused)[0])
        for (frames, reused), times in _rehearse(plan)[0].items()
        for forward in _passes(plan, frames)
    )


def _vae_work(plan: Plan, stage: VAEStage) -> Work:
    cost, vae, dtype = VAE_COST[stage], plan.task.vae, plan.task.vae_type
    return _total(
        (times, cost(vae, dtype, frames, *side))
        for frames, times in vae_calls(plan, stage).items()
        for side in plan.vae_tiles
    )


def _total(costs: Iterable[tuple[int, Cost]]) -> Work:
    """Adds up costs that occur several times each."""
    parts = [(times * cost.flops, times * cost.traffic) for times, cost in costs]
    return Work(*map(sum, zip(*parts, strict=True))) if parts else Work(0, 0)


Calls = Counter[tuple[int, bool]]


def _rehearse(plan: Plan) -> tuple[Calls, int, int]:
    """Runs the solver, the windows and guidance with a network that does nothing.

    Returns the calls of the network by frames and whether deep features are reused, the most bytes
    beside the network's own while it works, and for how many frames deep features are kept. What a
    cache of evaluations will leave out is not known beforehand: all are counted.
    """
    groups = [_rehearse_group(plan.task, tuple(group.windows)) for group in plan.span.groups]
    calls, held, kept = zip(*groups, strict=True)
    return sum(calls, Counter()), max(held), max(kept)


@cache
@torch.inference_mode()
def _rehearse_group(task: Task, windows: tuple[range, ...]) -> tuple[Calls, int, int]:
    sampling, size = task.sampling, (1, task.config.in_dim, windows[-1].stop, *task.latents)
    schedule, sigmas = Settings(sampling=sampling, behaviour=task.behaviour).levels
    calls: Calls = Counter()
    kept: dict[int, int] = {}  # frames, by the features of each window and prompt
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

    def denoise(x_in: Tensor, sigma: Tensor, window: range) -> Tensor:
        nonlocal t  # the network's own is a meta tensor without a value
        t = schedule.model_timestep(sigma).reshape(1)
        return denoiser(x_in, sigma, window)

    hint = torch.empty(size, device=META)  # not counted: it is in main memory
    with LiveMetaTensors() as live:
        prompt = torch.empty(1, task.config.context_length, task.config.context_dim, device=META)
        denoiser = Denoiser(
            network=network,
            schedule=schedule,
            positive=prompt,
            negative=prompt,
            hint=hint,
            guidance_scale=guidance_of(sampling),
            guidance_rescale=sampling.cfg_rescale,
            dtype=task.dtype,
            shortcuts=replace(task.shortcuts, cache=0.0),
        )
        if len(sigmas) > 1:
            SAMPLERS[sampling.sampler](
                chunked(denoise, windows, task.behaviour.merge),
                torch.empty(size, device=META),
                sigmas,
                noise=lambda step, sigma, sigma_next: torch.empty(size, device=META),
            )
    if task.shortcuts.cache:  # the last prediction of each window
        held += _latent_bytes(task, sum(map(len, windows)))
    return calls, held, sum(kept.values())
