"""Families of the I2VGen-XL backbone."""

import re
from collections.abc import Callable, Generator, Mapping
from dataclasses import fields
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from ..behaviour import REFERENCE
from ..chunking import chunked, overlapping_windows
from ..color_fix import COLOR_FIXES
from ..diffusion.denoiser import Denoiser
from ..diffusion.samplers import SAMPLERS, SolverNoise, refuse_crashes
from ..diffusion.schedule import (
    cosine_interpolated_logsnr,
    logsnr_cosine_schedule,
    sampling_sigmas,
    sampling_timesteps,
    star_schedule,
)
from ..geometry import Padding, crop, output_size, pad, reference_padding, upsample
from ..models.liem import SpatialLIEM, TemporalLIEM
from ..models.unet import ControlledVideoUNet, UNetConfig
from ..models.unet_blocks import (
    BasicTransformerBlock,
    Downsample,
    Factory,
    ResBlock,
    SpatialTransformer,
    TemporalTransformer,
    Upsample,
    sinusoidal_embedding,
)
from ..noise import ReferenceNoise, brownian_noise
from ..text import DEFAULT_PROMPT, NEGATIVE_PROMPT, POSITIVE_PROMPT, join_prompt
from ..vae import VideoVAE, vae_from_config
from .case import Case, Comparison, Comparisons, evaluate
from .degradation import degradation_ops

# Network


def liem_spatial(case: Case) -> Comparisons:
    yield Comparison(case.fill(SpatialLIEM())(case["x"]), case["out"])


def liem_temporal(case: Case) -> Comparisons:
    yield Comparison(case.fill(TemporalLIEM())(case["x"]), case["out"])


def time_embedding(case: Case) -> Comparisons:
    yield Comparison(sinusoidal_embedding(case["t"], case.sidecar["dim"]), case["out"])


def resample(case: Case) -> Comparisons:
    channels = case.config["channels"]
    down = case.fill(Downsample(channels, make=Factory()), "w.down.")
    up = case.fill(Upsample(channels, make=Factory()), "w.up.")
    yield Comparison(down(case["x"]), case["down_out"])
    yield Comparison(up(case["x"]), case["up_out"])


def resblock(case: Case) -> Comparisons:
    config = case.config
    block = ResBlock(
        config["channels"], config["out_channels"], config["emb_channels"], make=Factory()
    )
    yield Comparison(case.fill(block)(case["x"], case["emb"], config["frames"]), case["out"])


def spatial_block(case: Case) -> Comparisons:
    config = case.config
    block = BasicTransformerBlock(
        config["dim"],
        config["heads"],
        config["dim_head"],
        context_dim=config["context_dim"],
        make=Factory(),
    )
    out = case.fill(block)(case["x"], case["context"], height=config["h"])
    yield Comparison(out, case["out"])


def temporal_block(case: Case) -> Comparisons:
    config = case.config
    block = BasicTransformerBlock(
        config["dim"], config["heads"], config["dim_head"], make=Factory()
    )
    yield Comparison(case.fill(block)(case["x"]), case["out"])


def spatial_transformer(case: Case) -> Comparisons:
    config = case.config
    transformer = SpatialTransformer(
        config["in_channels"],
        config["heads"],
        config["dim_head"],
        context_dim=config["context_dim"],
        make=Factory(),
    )
    yield Comparison(case.fill(transformer)(case["x"], case["context"]), case["out"])


def temporal_transformer(case: Case) -> Comparisons:
    config = case.config
    transformer = TemporalTransformer(
        config["in_channels"], config["heads"], config["dim_head"], make=Factory()
    )
    yield Comparison(case.fill(transformer)(case["x"]), case["out"])


def network_of(case: Case) -> ControlledVideoUNet:
    known = {field.name for field in fields(UNetConfig)}
    config = UNetConfig(**{key: value for key, value in case.config.items() if key in known})
    return case.fill(ControlledVideoUNet(config))


def unet(case: Case) -> Comparisons:
    network = network_of(case)
    x, t, y, hint = (case[key] for key in ("x", "t", "y", "hint"))
    yield Comparison(network(x, t, y, hint), case["out"])
    # the controls are larger than the output; their noise floor is measured apart
    floor = case.sidecar.get("fp32_vs_fp64_max_abs_control")
    atol = None if floor is None else 10 * floor
    with_hint, without = (network.VideoControlNet(x, t, y, h) for h in (hint, None))
    for prefix, controls in (("control.", with_hint), ("control_nohint.", without)):
        for key in case.tensors:
            if key.startswith(prefix):
                index = key.removeprefix(prefix)
                control = controls[-1 if index == "last" else int(index)]
                yield Comparison(control, case[key], atol)


# Schedule and solvers


def schedule(case: Case) -> Comparisons:
    config = case.config
    ours = logsnr_cosine_schedule(**config)
    logsnr = cosine_interpolated_logsnr(config["n"], config["scale_min"], config["scale_max"])
    x_0, noise, t = case["x0"], case["eps"], case["t_int"]
    yield Comparison(logsnr, case["logsnr_before_rescale"])
    yield Comparison(ours.sigmas, case["sigmas"])
    yield Comparison(ours.alphas, case["alphas"])
    yield Comparison(ours.log_edm_sigmas, case["log_edm_sigma"])
    yield Comparison(ours.edm_sigma(case["t_query"]), case["edm_sigma_of_t"])
    yield Comparison(ours.t(case["sigma_query"]), case["t_of_edm_sigma"])
    yield Comparison(ours.add_noise(x_0, noise, t), case["xt"])
    yield Comparison(ours.velocity(x_0, noise, t), case["velocity"])
    yield Comparison(ours.x_0(case["xt"], case["velocity"], t), case["x0_from_v"])


def spacing(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments that `sampling_timesteps` and `sampling_sigmas` share, from a case's names."""
    return {
        "solver_mode": settings["solver_mode"],
        "noise_level": settings.get("t_max", 899) + 1,
        "t_min": settings.get("t_min", 0),
        "discretization": settings.get("discretization", "trailing"),
        "exact": False,
    }


def timesteps(case: Case) -> Comparisons:
    for row in case.sidecar["data"]:
        sampler, steps = row["solver"], row["steps"]
        levels = sampling_timesteps(steps=steps + (sampler == "dpmpp_2m_sde"), **spacing(row))
        sigmas = sampling_sigmas(star_schedule(), steps=steps, sampler=sampler, **spacing(row))
        model_timesteps = star_schedule().model_timestep(sigmas[:-1])
        yield Comparison(levels, torch.tensor(row["raw_steps"]))
        yield Comparison(sigmas, torch.tensor([float(sigma) for sigma in row["sigmas"]]))
        yield Comparison(model_timesteps.tolist(), row["model_timesteps"])
        yield Comparison(len(sigmas) - 1, row["model_evals_dpmpp"])


def denoiser_of(
    case: Case,
    network: Callable[..., Tensor],
    positive: Tensor,
    negative: Tensor,
    hint: Tensor | None,
) -> Denoiser:
    return Denoiser(
        network=network,
        schedule=star_schedule(),
        positive=positive,
        negative=negative,
        hint=hint,
        guidance_scale=case.sidecar["guide_scale"],
        guidance_rescale=case.sidecar["guide_rescale"],
        percentile=case.sidecar.get("percentile"),
        clamp=case.sidecar.get("clamp"),
    )


def guidance(case: Case) -> Comparisons:
    seen: list[Tensor] = []

    def network(x: Tensor, t: Tensor, y: Tensor, hint: Tensor | None) -> Tensor:
        seen.append(t)
        return case["cond_out"] if y.any() else case["uncond_out"]

    denoiser = denoiser_of(
        case,
        network,
        positive=torch.ones(1, 1, 1),
        negative=torch.zeros(1, 1, 1),
        hint=None,
    )
    # the by-products mu, var and eps reach no solver
    yield Comparison(denoiser(case["xt"], star_schedule().edm_sigma(case["t"])), case["x0"])
    yield Comparison(seen[0], case["t"])
    yield Comparison(len(seen), case.sidecar["network_calls"])


def brownian_tree(case: Case) -> Comparisons:
    noise = brownian_noise(tuple(case.sidecar["shape"]), case["sigmas"], case.sidecar["seed"])
    yield from draws(case["draws"], noise, case["sigmas"])


def draws(expected: Tensor, noise: SolverNoise, sigmas: Tensor) -> Comparisons:
    for step, draw in enumerate(expected):
        yield Comparison(noise(step, sigmas[step], sigmas[step + 1]), draw)


def bank(stored: Tensor) -> SolverNoise:
    """Solver noise from a list: the k-th draw, whichever step makes it."""
    remaining = iter(stored)
    return lambda step, sigma, sigma_next: next(remaining)


def solver(case: Case, sampler: str, noise: SolverNoise) -> Comparisons:
    inputs: list[Tensor] = []

    def denoise(x_in: Tensor, sigma: Tensor) -> Tensor:
        inputs.append(x_in)
        return evaluate(case.sidecar["denoiser"], {"x_in": x_in, "sigma": sigma})

    sample, settings = SAMPLERS[sampler], case.sidecar["kwargs"]
    out = sample(denoise, case["noise"], case["sigmas"], noise=noise, **settings)
    yield Comparison(out, case["out"])
    if "model_inputs" in case.tensors:
        yield Comparison(torch.stack(inputs), case["model_inputs"])
    if "model_calls" in case.sidecar:
        yield Comparison(len(inputs), case.sidecar["model_calls"])


def solver_dpmpp_2m_sde(case: Case) -> Comparisons:
    return solver(case, "dpmpp_2m_sde", bank(case["noise_bank"]))


def solver_heun(case: Case) -> Comparisons:
    # the reference draws at every step, needed or not
    return solver(case, "heun", lambda step, sigma, sigma_next: case["eps_draws"][step])


# Chunks and sampling


def chunk_indices(case: Case) -> Comparisons:
    for frames, length, expected, status in case.sidecar["data"]:
        yield Comparison(reference_windows(frames, length), as_ranges(expected))
        yield Comparison(crashes(frames, length), status != "ok")


def reference_windows(frames: int, length: int) -> list[range]:
    return overlapping_windows(frames, length, length // 2, mode="reference")


def as_ranges(spans: list[list[int]]) -> list[range]:
    return [range(start, stop) for start, stop in spans]


def crashes(frames: int, length: int) -> bool:
    try:
        refuse_crashes(frames=frames, chunk_length=length, sampler="dpmpp_2m_sde", evaluations=2)
    except ValueError:
        return True
    return False


def toy_network(case: Case) -> Callable[..., Tensor]:
    """The analytic network that the case describes: 'v = formula; remarks'."""
    formula = case.in_text("network", r"^v = ([^;]+)")

    def network(x: Tensor, t: Tensor, y: Tensor, hint: Tensor) -> Tensor:
        t = t.float().reshape(-1, 1, 1, 1, 1)
        return evaluate(formula, {"xt": x, "t": t, "y": y, "h": hint})

    return network


def chunk_merge(case: Case) -> Comparisons:
    denoiser = denoiser_of(case, toy_network(case), case["y"], case["neg_y"], hint=case["hint"])
    denoise = chunked(denoiser, as_ranges(case.sidecar["chunk_inds"]), "cut")
    yield Comparison(denoise(case["xt"], case["sigma"]), case["x0"])
    t = star_schedule().model_timestep(case["sigma"])
    yield Comparison(t.tolist(), [case.sidecar["t_int"]])


def sample_sr(
    case: Case,
    network: Callable[..., Tensor],
    hint: Tensor,
    initial: Tensor,
    noise_of: Callable[[Tensor], SolverNoise],
) -> Generator[Comparison, None, Tensor]:
    """Returns the final latents; noise_of: sigmas -> the solver's noise, drawn after `initial`."""
    settings = case.sidecar
    t_max = torch.tensor([settings.get("t_max", 899)])
    noised = star_schedule().add_noise(hint, initial, t_max)
    yield Comparison(noised, case["noised_lr"])

    sampler = settings.get("solver", "dpmpp_2m_sde")
    sigmas = sampling_sigmas(
        star_schedule(), steps=settings["steps"], sampler=sampler, **spacing(settings)
    )
    noise = noise_of(sigmas)
    if "brownian_draws" in case.tensors:
        # none is drawn from an infinite level
        yield from draws(case["brownian_draws"], noise, sigmas[sigmas.isfinite()])

    frames = hint.shape[2]
    windows = reference_windows(frames, settings.get("max_chunk_len") or frames)
    if settings.get("chunk_inds"):
        yield Comparison(windows, as_ranges(settings["chunk_inds"]))
    denoiser = denoiser_of(case, network, case["y"], case["neg_y"], hint=hint)
    denoise = chunked(denoiser, windows, "cut")
    return SAMPLERS[sampler](denoise, noised, sigmas, noise=noise)


def sample_sr_toy(case: Case) -> Comparisons:
    noise = bank(case["noise_bank"])
    out = yield from sample_sr(
        case, toy_network(case), case["hint"], case["eps"], lambda sigmas: noise
    )
    yield Comparison(out, case["out"])


def sample_sr_tinynet(case: Case) -> Comparisons:
    network = network_of(case.neighbour(case.in_text("what", r"\b(unet_\w+)")))
    seed, hint = int(case.in_text("what", r"manual_seed\((\d+)\)")), case["hint"]
    source = ReferenceNoise(seed, frame_major=False)
    initial = source.initial(hint.shape)
    out = yield from sample_sr(
        case, network, hint, initial, lambda sigmas: source.solver(hint.shape, sigmas)
    )
    yield Comparison(out, case["out"])


# Prompts, video to latents and back


def prompts(case: Case) -> Comparisons:
    theirs = case.sidecar["data"]
    yield Comparison(POSITIVE_PROMPT, theirs["positive"])
    yield Comparison(NEGATIVE_PROMPT, theirs["negative"])
    caption = join_prompt(DEFAULT_PROMPT, POSITIVE_PROMPT, REFERENCE.prompt_separator)
    yield Comparison(caption, DEFAULT_PROMPT + theirs["positive"])


def vae_of(case: Case) -> VideoVAE:
    vae = vae_from_config(case.config)
    case.fill(vae.model)
    return vae


def vae_chunking(case: Case) -> Comparisons:
    vae, noise = vae_of(case), case["encode_noise"]
    window = int(case.in_text("what", r"vae_decode_chunk\(z, (\d+)\)"))
    decoded = vae.decode(case["z"], window=window, overlap=0)
    yield Comparison(rearrange(decoded, "b c f h w -> (b f) c h w"), case["decoded"])
    pixels = rearrange(case["pixels"], "b f c h w -> b c f h w")
    yield Comparison(vae.encode(pixels, noise=lambda i: noise[i : i + 1]), case["latents"])


def preprocess(case: Case) -> Comparisons:
    """Up-sampling and padding are said by the names of the results: up4, padded_3_2_1_4."""
    rgb = rearrange(case["frames_bgr_u8"].flip(-1), "f h w c -> f c h w")
    video = rgb / 255 * 2 - 1
    yield Comparison(video, case["video"])
    size = video.shape[3], video.shape[2]
    (up,) = (key for key in case.tensors if re.fullmatch(r"up\d+", key))
    scale = float(up.removeprefix("up"))
    video = upsample(video, output_size(*size, scale), "bilinear")
    yield Comparison(video, case[up])
    (padded,) = (key for key in case.tensors if key.startswith("padded_"))
    margins = Padding(*(int(side) for side in padded.split("_")[1:]))
    yield Comparison(pad(video, margins, "white"), case[padded])
    frames = unit_range(case["post_in"])
    yield Comparison(as_255(frames), case["post_out"])


def unit_range(video: Tensor) -> Tensor:
    """(1 c f h w) in [-1, 1] -> frames (f c h w) in [0, 1]."""
    return rearrange(video / 2 + 0.5, "1 c f h w -> f c h w").clamp(0, 1)


def padding(case: Case) -> Comparisons:
    for height, width, expected, size in case.sidecar["data"]:
        left, right, top, bottom = ours = reference_padding(height, width)
        yield Comparison(list(ours), expected)
        yield Comparison([top + height + bottom, left + width + right], size)


def color_fix(case: Case, name: str) -> Comparisons:
    target = rearrange(case["target"] / 255, "f h w c -> f c h w")
    fixed = COLOR_FIXES[name](target, case["source"] / 2 + 0.5)
    yield Comparison(as_255(fixed), case["out"])


def as_255(frames: Tensor) -> Tensor:
    """(f c h w) in [0, 1] -> (f h w c) from 0 to 255."""
    return 255 * rearrange(frames, "f c h w -> f h w c")


def adain(case: Case) -> Comparisons:
    return color_fix(case, "adain")


def wavelet(case: Case) -> Comparisons:
    return color_fix(case, "wavelet")


def e2e(case: Case) -> Comparisons:
    settings = case.sidecar
    network = network_of(case.neighbour(case.in_text("what", r"\b(unet_\w+)")))
    vae = vae_of(case.neighbour(case.in_text("what", r"\b(vae_\w+)")))
    source = ReferenceNoise(settings["seed"])
    height, width = settings["target_res"]
    margins = Padding(*settings["padding_l_r_t_b"])

    up = upsample(case["video"], (width, height), "bilinear")
    padded = rearrange(pad(up, margins, "white"), "f c h w -> 1 c f h w")
    shape = tuple(case["latents"].shape)
    latents = vae.encode(padded, noise=lambda i: source.posterior(i, (*shape[:2], *shape[3:])))
    yield Comparison(latents, case["latents"])
    initial = source.initial(shape)
    out = yield from sample_sr(
        case, network, latents, initial, lambda sigmas: source.solver(shape, sigmas)
    )
    yield Comparison(out, case["final_latents"])
    video = crop(vae.decode(out, window=3, overlap=0), margins)
    yield Comparison(video, case["out"])
    frames = unit_range(video)
    yield Comparison(as_255(frames), case["vid255"])
    fixed = COLOR_FIXES["adain"](frames, case["video"] / 2 + 0.5)
    yield Comparison(as_255(fixed), case["adain255"])


FAMILIES = {
    "adain": adain,
    "brownian_tree": brownian_tree,
    "chunk_indices": chunk_indices,
    "chunk_merge": chunk_merge,
    "degradation": None,
    "degradation_ops": degradation_ops,
    "df_loss": None,
    "e2e": e2e,
    "guidance": guidance,
    "liem_spatial": liem_spatial,
    "liem_temporal": liem_temporal,
    "padding": padding,
    "preprocess": preprocess,
    "prompts": prompts,
    "resample": resample,
    "resblock": resblock,
    "sample_sr_tinynet": sample_sr_tinynet,
    "sample_sr_toy": sample_sr_toy,
    "schedule": schedule,
    "solver_dpmpp_2m_sde": solver_dpmpp_2m_sde,
    "solver_heun": solver_heun,
    "spatial_block": spatial_block,
    "spatial_transformer": spatial_transformer,
    "temporal_block": temporal_block,
    "temporal_transformer": temporal_transformer,
    "time_embedding": time_embedding,
    "timesteps": timesteps,
    "unet": unet,
    "vae_chunking": vae_chunking,
    "wavelet": wavelet,
}
