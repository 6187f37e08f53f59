"""STAR's sampling in the host's terms: NOISE, SIGMAS, SAMPLER, and patches of a MODEL."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import comfy.model_management as mm
import comfy.samplers
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ..star_core.degradation.recommend import Recommendation
from ..star_core.diffusion.denoiser import guided_velocity
from ..star_core.diffusion.levels import guidance_of, levels_of, trained_schedule
from ..star_core.diffusion.noise import FrameNoise, brownian_noise
from ..star_core.diffusion.samplers import SAMPLERS, SolverNoise
from ..star_core.diffusion.shortcuts import DeepFeatures, in_step
from ..star_core.parity import DEFAULT
from ..star_core.planning.plan import Plan
from ..star_core.sampling_defaults import SamplingDefaults
from ..star_core.star_checkpoint import ModelFile
from ..star_core.windows.chunking import (
    ChunkConfig,
    Merge,
    WindowMode,
    chunked,
    overlapping_windows,
    usual_overlap,
)
from ..star_core.windows.tiling import Tile
from .host import told
from .host_features import check_host
from .host_model import DEEP, PURE_NOISE, WINDOW, WORK_OPTIONS, Slicing, features_of, star_of

Options = dict[str, Any]

SOLVER_NOISE: dict[str, Callable[[int, tuple[int, ...], Tensor], SolverNoise]] = {
    "frame": lambda seed, shape, sigmas: FrameNoise(seed).solver(shape, sigmas),
    "brownian": lambda seed, shape, sigmas: brownian_noise(shape, sigmas, seed),
}


def sampling_of(
    model: ModelPatcher, degradation: Recommendation | None = None, **inputs: Any
) -> SamplingDefaults:
    """How to sample a MODEL: as its file says, as `degradation` recommends, as the user has set.

    inputs: fields of SamplingDefaults as the node's inputs have them, see `host.told`. A number of
    steps is one of evenly spaced steps.
    """
    own, chosen = star_of(model).sampling, told(**inputs)
    if degradation is not None:
        own = replace(own, noise_level=degradation.noise_level, cfg=degradation.cfg)
    if "steps" in chosen:
        own = replace(own, solver_mode="normal")
    return replace(own, **chosen)


def chunk_of(star: ModelFile, frames: int, overlap: int) -> ChunkConfig:
    """Windows of so many frames, -1 for the model's own; overlap -1 for the usual share of them."""
    length = star.sampling.chunk_frames if frames < 0 else frames
    if overlap < 0:
        overlap = usual_overlap(length, DEFAULT.overlap, star.latents.frames)
    return ChunkConfig.near(length, overlap, star.latents.frames)


class FrameNoiseSource:
    """The host's NOISE: `core.noise.FrameNoise` for the latents to be sampled."""

    def __init__(self, seed: int) -> None:
        self.seed, self.noise = seed, FrameNoise(seed)

    def generate_noise(self, input_latent: Options) -> Tensor:
        return self.noise.initial(tuple(input_latent["samples"].shape))


def finite_sigmas(sampling: SamplingDefaults) -> Tensor:
    """STAR's noise levels with a trailing 0; pure noise has the host's finite stand-in."""
    return levels_of(sampling).sigmas.clamp(max=PURE_NOISE)


def star_sampler(name: str, noise: str, start_of_run: bool = True) -> comfy.samplers.KSAMPLER:
    """A solver of the core as a SAMPLER.

    start_of_run: multiply the start by the first noise level as STAR does (see
    `diffusion.samplers`), right for noised latents only. noise: a key of SOLVER_NOISE.
    """
    for what, value, known in (("sampler", name, SAMPLERS), ("noise", noise, SOLVER_NOISE)):
        if value not in known:
            raise ValueError(f"unknown {what} {value!r}: use {' or '.join(known)}")

    def sample(model, x: Tensor, sigmas: Tensor, extra_args=None, callback=None, disable=None):
        extra_args = extra_args or {}
        finite = sigmas.cpu()  # solvers branch on them at every step
        if len(finite) < 2:  # nothing to do
            return x
        start = x / ((finite[0] ** 2 + 1).sqrt() if start_of_run else finite[0])
        levels = torch.where(finite < PURE_NOISE, finite, torch.inf)

        def denoise(x_in: Tensor, sigma: Tensor) -> Tensor:
            sigma = sigma.clamp(max=PURE_NOISE)
            x = x_in * (sigma**2 + 1).sqrt()
            return model(x, sigma.to(x).expand(len(x)), **extra_args)

        def on_step(step: int, total: int, x_0: Tensor) -> None:
            if callback is not None:
                sigma = finite[step - 1]
                callback(
                    {"i": step - 1, "x": x_0, "denoised": x_0, "sigma": sigma, "sigma_hat": sigma}
                )

        draws = SOLVER_NOISE[noise](extra_args.get("seed") or 0, tuple(x.shape), levels)
        return SAMPLERS[name](denoise, start, levels, noise=draws, on_step=on_step)

    return comfy.samplers.KSAMPLER(sample)


def patch_chunks(
    model: ModelPatcher, chunk: ChunkConfig, merge: Merge, mode: WindowMode = "balanced"
) -> ModelPatcher:
    """A MODEL that predicts x_0 window by window.

    The windows lie outside guidance, so that its statistics are those of a window, as in STAR.
    """
    model = model.clone()
    length, overlap = chunk.in_latents(star_of(model).latents.frames)

    def predict(executor, x: Tensor, sigma: Tensor, model_options: Options, seed=None) -> Tensor:
        windows = overlapping_windows(x.shape[2], length, overlap, mode=mode)

        def predict_window(x: Tensor, sigma: Tensor, window: range) -> Tensor:
            mm.throw_exception_if_processing_interrupted()
            return executor(x, sigma, _options_of(window, model_options), seed)

        return chunked(predict_window, windows, merge)(x, sigma)

    def reserve(executor, model, noise_shape, *args, **kwargs):
        windows = overlapping_windows(noise_shape[2], length, overlap, mode=mode)
        frames = max(map(len, windows))
        return executor(model, [*noise_shape[:2], frames, *noise_shape[3:]], *args, **kwargs)

    _wrap(model, WrappersMP.PREDICT_NOISE, "star_chunks", predict)
    _wrap(model, WrappersMP.PREPARE_SAMPLING, "star_chunks", reserve)
    return model


def _wrap(model: ModelPatcher, kind: str, key: str, wrapper: Callable) -> None:
    """Puts a wrapper in the place of an earlier one of the same key."""
    model.remove_wrappers_with_key(kind, key)
    model.add_wrapper_with_key(kind, key, wrapper)


def _options_of(window: range, model_options: Options) -> Options:
    """The options of a call for one window.

    EasyCache and LazyCache compare a call with the one before it: each window has its own.
    """
    options = model_options["transformer_options"]
    mine: Options = {WINDOW: window}
    if (cache := options.get("easycache")) is not None:
        caches = options.setdefault("star_caches", {})
        if window not in caches:
            own = caches[window] = cache.clone()
            own.start_t, own.end_t = cache.start_t, cache.end_t
        mine["easycache"] = caches[window]
    return {**model_options, "transformer_options": {**options, **mine}}


def patch_guidance(
    model: ModelPatcher, rescale: float, start_percent: float = 0.0, end_percent: float = 1.0
) -> ModelPatcher:
    """A MODEL whose guidance is rescaled and runs between two shares of the noise levels.

    The scale swings where that is how the model was made to be guided.
    """
    model = model.clone()
    own = star_of(model).sampling
    schedule = trained_schedule(own)

    def scale_of(args: Options, t: Tensor) -> float:
        steps = args["model_options"].get("transformer_options", {}).get("sample_sigmas", ())
        known = replace(own, cfg=args["cond_scale"], steps=max(len(steps) - 1, 1))
        scale = guidance_of(known)
        return scale(t) if callable(scale) else scale

    def guide(args: Options) -> Tensor:
        if args["cond_scale"] == 1:
            return args["cond"]
        x, sampling = args["input"], args["model"].model_sampling
        x_t, t = sampling.calculate_input(args["sigma"], x), sampling.timestep(args["sigma"])
        v_c, v_u = (
            schedule.velocity_between(x_t, args[which], t)
            for which in ("cond_denoised", "uncond_denoised")
        )
        v = guided_velocity(v_c, v_u, scale_of(args, t), rescale)
        return x - schedule.x_0(x_t, v, t)

    if rescale or own.cfg_mode == "dynamic":
        model.set_model_sampler_cfg_function(guide)
    sampling = model.get_model_object("model_sampling")
    begin, end = sampling.percent_to_sigma(start_percent), sampling.percent_to_sigma(end_percent)
    if (start_percent, end_percent) != (0.0, 1.0):
        _guide_where(model, lambda sigma: bool(end <= sigma <= begin))
    return model


def _guide_where(model: ModelPatcher, inside: Callable[[Tensor], bool]) -> None:
    """Guides at noise levels () that are `inside` only."""

    def predict(executor, x: Tensor, sigma: Tensor, model_options: Options, seed=None) -> Tensor:
        guider = executor.class_obj
        check_host(guider, "cfg")
        if inside(sigma[0]):
            return executor(x, sigma, model_options, seed)
        scale = guider.cfg
        guider.cfg = 1.0  # the host then leaves the negative prompt out
        try:
            return executor(x, sigma, model_options, seed)
        finally:
            guider.cfg = scale

    _wrap(model, WrappersMP.PREDICT_NOISE, "star_guidance", predict)


def patch_work(model: ModelPatcher, **how: Any) -> ModelPatcher:
    """A MODEL whose network works in another way, beside what earlier patches say of it.

    how: arguments of `ControlledVideoUNet.working`, and `reuse` of Shortcuts.
    """
    model = model.clone()
    options = model.model_options["transformer_options"]
    options[WORK_OPTIONS] = {**options.get(WORK_OPTIONS, {}), **how}
    _wrap(model, WrappersMP.OUTER_SAMPLE, "star_work", _sample_as_asked)
    _wrap(model, WrappersMP.CALC_COND_BATCH, "star_work", _keep_in_step)
    return model


def _sample_as_asked(executor, *args, **kwargs) -> Tensor:
    """A run of its own: its memory is asked for by how it works, its features end with it."""
    guider = executor.class_obj
    check_host(guider, "model_options", "model_patcher")
    model_options, star = guider.model_options, guider.model_patcher.model
    options, before = model_options["transformer_options"], star.how
    how = options[WORK_OPTIONS]
    features = cache(lambda key: DeepFeatures(within=how.get("reuse", 0)))
    guider.model_options = {**model_options, "transformer_options": {**options, DEEP: features}}
    star.how = how
    try:
        return executor(*args, **kwargs)
    finally:
        guider.model_options, star.how = model_options, before


def _keep_in_step(executor, model, conds, x_in, timestep, model_options: Options) -> list[Tensor]:
    """Prompts may be batched or not: all of them are seen here."""
    prompts = [cond["uuid"] for group in conds for cond in group or ()]
    in_step(features_of(prompts, model_options["transformer_options"]))
    return executor(model, conds, x_in, timestep, model_options)


def patch_plan(model: ModelPatcher, plan: Plan) -> ModelPatcher:
    """A MODEL that works in the windows, slices and tiles of a plan."""
    model = patch_chunks(model, plan.chunk, plan.task.behaviour.merge)
    return patch_work(model, tile=plan.network_tile, slicing=plan.slicing)


def patch_tiles(
    model: ModelPatcher, tile: Tile | None, *, factor: int, offload: bool = False
) -> ModelPatcher:
    """A MODEL that works in overlapping tiles, inside guidance and joined at every step.

    tile: in pixels of the result, of which a latent has `factor` a side. offload: skips wait in
    main memory. ValueError for a tile that is too small.
    """
    step = 2 ** star_of(model).config.downsamplings
    latents = tile and tile.in_latents(factor, step=step)
    return patch_work(model, tile=latents, slicing=Slicing(offload=offload))
