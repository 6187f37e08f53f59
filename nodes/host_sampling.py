"""STAR's sampling in the host's types: NOISE, SIGMAS, SAMPLER, and patches of a MODEL."""

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
from ..star_core.diffusion.shortcuts import DeepFeatures, clear_unless_in_step
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
from .host import overrides
from .host_features import check_host
from .host_model import (
    DEEP,
    PURE_NOISE,
    WINDOW,
    WORK_OPTIONS,
    Slicing,
    features_for,
    sampling_defaults,
    star_of,
)

Options = dict[str, Any]

SOLVER_NOISE: dict[str, Callable[[int, tuple[int, ...], Tensor], SolverNoise]] = {
    "frame": lambda seed, shape, sigmas: FrameNoise(seed).solver(shape, sigmas),
    "brownian": lambda seed, shape, sigmas: brownian_noise(shape, sigmas, seed),
}


def sampling_of(
    model: ModelPatcher, degradation: Recommendation | None = None, **inputs: Any
) -> SamplingDefaults:
    """Returns the sampling settings of a MODEL.

    The user's values come before those that `degradation` recommends, and these before those of
    its LoRAs and the file. inputs: fields of SamplingDefaults, values of `host.model_default`
    inputs. If `steps` is set, the steps are evenly spaced.
    """
    sampling, values = sampling_defaults(model), overrides(**inputs)
    if degradation is not None:
        sampling = replace(sampling, noise_level=degradation.noise_level, cfg=degradation.cfg)
    if "steps" in values:
        sampling = replace(sampling, solver_mode="normal")
    return replace(sampling, **values)


def chunk_of(star: ModelFile, frames: int, overlap: int) -> ChunkConfig:
    """Returns the windows of two inputs; -1 stands for the model's length and the usual overlap."""
    length = star.sampling.chunk_frames if frames < 0 else frames
    if overlap < 0:
        overlap = usual_overlap(length, DEFAULT.overlap, star.latents.frames)
    return ChunkConfig.near(length, overlap, star.latents.frames)


class FrameNoiseSource:
    """The host's NOISE that draws from `star_core.diffusion.noise.FrameNoise`."""

    def __init__(self, seed: int) -> None:
        self.seed, self.noise = seed, FrameNoise(seed)

    def generate_noise(self, input_latent: Options) -> Tensor:
        return self.noise.initial(tuple(input_latent["samples"].shape))


def finite_sigmas(sampling: SamplingDefaults) -> Tensor:
    """Returns STAR's noise levels with a final 0; pure noise has the host's finite value."""
    return levels_of(sampling).sigmas.clamp(max=PURE_NOISE)


def star_sampler(name: str, noise: str, start_of_run: bool = True) -> comfy.samplers.KSAMPLER:
    """Returns a solver of the core as a SAMPLER; ValueError for an unknown name.

    name: a key of SAMPLERS. noise: a key of SOLVER_NOISE. start_of_run: scale the noised latents as
    STAR does (see `diffusion.samplers`); False for the latents of another sampler.
    """
    for what, value, known in (("sampler", name, SAMPLERS), ("noise", noise, SOLVER_NOISE)):
        if value not in known:
            raise ValueError(f"unknown {what} {value!r}: use {' or '.join(known)}")

    def sample(model, x: Tensor, sigmas: Tensor, extra_args=None, callback=None, disable=None):
        extra_args = extra_args or {}
        finite = sigmas.cpu()  # solvers branch on them at every step
        if len(finite) < 2:
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

        solver_noise = SOLVER_NOISE[noise](extra_args.get("seed") or 0, tuple(x.shape), levels)
        return SAMPLERS[name](denoise, start, levels, noise=solver_noise, on_step=on_step)

    return comfy.samplers.KSAMPLER(sample)


def patch_chunks(
    model: ModelPatcher, chunk: ChunkConfig, merge: Merge, mode: WindowMode = "balanced"
) -> ModelPatcher:
    """Returns a copy of a MODEL that predicts x_0 window by window.

    Guidance is computed within each window, so that its statistics are those of a window, as in
    STAR.
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
    """Adds a wrapper and removes an earlier one with the same key."""
    model.remove_wrappers_with_key(kind, key)
    model.add_wrapper_with_key(kind, key, wrapper)


def _options_of(window: range, model_options: Options) -> Options:
    """Returns the options of a call for one window.

    EasyCache and LazyCache compare a call with the previous one, so each window needs its own.
    """
    options = model_options["transformer_options"]
    changed: Options = {WINDOW: window}
    if (cache := options.get("easycache")) is not None:
        caches = options.setdefault("star_caches", {})
        if window not in caches:
            copy = caches[window] = cache.clone()
            copy.start_t, copy.end_t = cache.start_t, cache.end_t
        changed["easycache"] = caches[window]
    return {**model_options, "transformer_options": {**options, **changed}}


def patch_guidance(
    model: ModelPatcher, rescale: float, start_percent: float = 0.0, end_percent: float = 1.0
) -> ModelPatcher:
    """Returns a copy of a MODEL whose guidance is rescaled and limited to an interval.

    start_percent, end_percent: ends of the interval as fractions of the noise levels. The guidance
    scale varies with the timestep for a model whose default `cfg_mode` is dynamic.
    """
    model = model.clone()
    defaults = sampling_defaults(model)
    schedule = trained_schedule(defaults)

    def scale_of(args: Options, t: Tensor) -> float:
        steps = args["model_options"].get("transformer_options", {}).get("sample_sigmas", ())
        sampling = replace(defaults, cfg=args["cond_scale"], steps=max(len(steps) - 1, 1))
        scale = guidance_of(sampling)
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

    if rescale or defaults.cfg_mode == "dynamic":
        model.set_model_sampler_cfg_function(guide)
    sampling = model.get_model_object("model_sampling")
    begin, end = sampling.percent_to_sigma(start_percent), sampling.percent_to_sigma(end_percent)
    if (start_percent, end_percent) != (0.0, 1.0):
        _guide_where(model, lambda sigma: bool(end <= sigma <= begin))
    return model


def _guide_where(model: ModelPatcher, inside: Callable[[Tensor], bool]) -> None:
    """Limits guidance to the noise levels () for which `inside` is true."""

    def predict(executor, x: Tensor, sigma: Tensor, model_options: Options, seed=None) -> Tensor:
        guider = executor.class_obj
        check_host(guider, "cfg")
        if inside(sigma[0]):
            return executor(x, sigma, model_options, seed)
        scale = guider.cfg
        guider.cfg = 1.0  # the host then skips the negative prompt
        try:
            return executor(x, sigma, model_options, seed)
        finally:
            guider.cfg = scale

    _wrap(model, WrappersMP.PREDICT_NOISE, "star_guidance", predict)


def patch_work(model: ModelPatcher, **work: Any) -> ModelPatcher:
    """Returns a copy of a MODEL with other options of the network; earlier patches stay.

    work: arguments of `ControlledVideoUNet.working`, and `reuse` of Shortcuts.
    """
    model = model.clone()
    options = model.model_options["transformer_options"]
    options[WORK_OPTIONS] = {**options.get(WORK_OPTIONS, {}), **work}
    _wrap(model, WrappersMP.OUTER_SAMPLE, "star_work", _sample_with_options)
    _wrap(model, WrappersMP.CALC_COND_BATCH, "star_work", _synchronize_reuse)
    return model


def _sample_with_options(executor, *args, **kwargs) -> Tensor:
    """Samples with memory reserved for the network's options, and features of this run alone."""
    guider = executor.class_obj
    check_host(guider, "model_options", "model_patcher")
    model_options, star = guider.model_options, guider.model_patcher.model
    options, before = model_options["transformer_options"], star.work_options
    work = options[WORK_OPTIONS]
    features = cache(lambda key: DeepFeatures(max_age=work.get("reuse", 0)))
    guider.model_options = {**model_options, "transformer_options": {**options, DEEP: features}}
    star.work_options = work
    try:
        return executor(*args, **kwargs)
    finally:
        guider.model_options, star.work_options = model_options, before


def _synchronize_reuse(
    executor, model, conds, x_in, timestep, model_options: Options
) -> list[Tensor]:
    """Lets all prompts of a step reuse features or none; later they may come one by one."""
    prompts = [cond["uuid"] for group in conds for cond in group or ()]
    clear_unless_in_step(features_for(prompts, model_options["transformer_options"]))
    return executor(model, conds, x_in, timestep, model_options)


def patch_plan(model: ModelPatcher, plan: Plan) -> ModelPatcher:
    """Returns a copy of a MODEL that works in the windows, slices and tiles of a plan."""
    model = patch_chunks(model, plan.chunk, plan.task.behaviour.merge)
    return patch_work(model, tile=plan.network_tile, slicing=plan.slicing)


def patch_tiles(
    model: ModelPatcher, tile: Tile | None, *, factor: int, offload: bool = False
) -> ModelPatcher:
    """Returns a copy of a MODEL whose network works in overlapping tiles, merged at every step.

    tile: in pixels of the result. factor: pixels per latent of the VAE. offload: keep skip
    connections in system RAM. ValueError for a tile that is too small.
    """
    step = 2 ** star_of(model).config.downsamplings
    latents = tile and tile.in_latents(factor, step=step)
    return patch_work(model, tile=latents, slicing=Slicing(offload=offload))
