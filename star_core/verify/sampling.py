"""Families of schedule, guidance, solvers and chunked sampling on I2VGen-XL."""

from collections.abc import Callable, Generator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..diffusion.denoiser import Denoiser
from ..diffusion.noise import ReferenceNoise, brownian_noise
from ..diffusion.samplers import SAMPLERS, SolverNoise, refuse_crashes
from ..diffusion.schedule import (
    cosine_interpolated_logsnr,
    logsnr_cosine_schedule,
    sampling_sigmas,
    sampling_timesteps,
    star_schedule,
)
from ..windows.chunking import chunked, overlapping_windows
from .case import Case, Comparison, Comparisons, evaluate
from .networks import network_of


def schedule(case: Case) -> Comparisons:
    """Replays the noise schedule and its conversions."""
    config = case.config
    ours = logsnr_cosine_schedule(**config)
    logsnr = cosine_interpolated_logsnr(config["n"], config["scale_min"], config["scale_max"])
    x_0, noise, t_int = case["x0"], case["eps"], case["t_int"]
    yield Comparison(logsnr, case["logsnr_before_rescale"])
    yield Comparison(ours.sigmas, case["sigmas"])

    # The last bit of sigma differs between processors. These are the effects of two such bits.
    eps = 2 * torch.finfo(torch.float32).eps

    def of_log(edm_sigma: Tensor) -> Tensor:
        return eps * (1 + edm_sigma.square()).nan_to_num(posinf=0)

    edm, queries, t = case["edm_sigma_of_t"], case["sigma_query"], case["t_of_edm_sigma"]
    alphas, table = case["alphas"], case["log_edm_sigma"]
    yield Comparison(ours.alphas, alphas, (eps / alphas).nan_to_num(posinf=0))
    yield Comparison(ours.log_edm_sigmas, table, of_log(table.exp()))
    yield Comparison(ours.edm_sigma(case["t_query"]), edm, (edm * of_log(edm)).nan_to_num())
    slope = table.diff()[t.long().clamp(max=len(table) - 2)]
    yield Comparison(ours.t(queries), t, of_log(queries) / slope)
    yield Comparison(ours.add_noise(x_0, noise, t_int), case["xt"])
    velocity = case["velocity"]  # computed as (alpha x_t - x_0) / sigma
    rounding = eps * x_0.abs() / ours.sigma(t_int)
    yield Comparison(ours.velocity(x_0, noise, t_int), velocity, rounding)
    yield Comparison(ours.x_0(case["xt"], velocity, t_int), case["x0_from_v"])


def spacing(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments that `sampling_timesteps` and `sampling_sigmas` share.

    settings: of a case, in its own names.
    """
    return {
        "solver_mode": settings["solver_mode"],
        "noise_level": settings.get("t_max", 899) + 1,
        "t_min": settings.get("t_min", 0),
        "spacing": settings.get("discretization", "trailing"),
        "exact": False,
    }


def timesteps(case: Case) -> Comparisons:
    """Replays timesteps and noise levels of sampling."""
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
    """Returns a denoiser with the guidance settings of a case."""
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
    """Replays guidance with stored outputs of the network."""
    timesteps: list[Tensor] = []

    def network(x: Tensor, t: Tensor, y: Tensor, hint: Tensor | None) -> Tensor:
        timesteps.append(t)
        return case["cond_out"] if y.any() else case["uncond_out"]

    denoiser = denoiser_of(
        case,
        network,
        positive=torch.ones(1, 1, 1),
        negative=torch.zeros(1, 1, 1),
        hint=None,
    )
    # The by-products mu, var and eps are not used by any solver.
    yield Comparison(denoiser(case["xt"], star_schedule().edm_sigma(case["t"])), case["x0"])
    yield Comparison(timesteps[0], case["t"])
    yield Comparison(len(timesteps), case.sidecar["network_calls"])


def brownian_tree(case: Case) -> Comparisons:
    """Replays Brownian noise."""
    noise = brownian_noise(tuple(case.sidecar["shape"]), case["sigmas"], case.sidecar["seed"])
    yield from draws(case["draws"], noise, case["sigmas"])


def draws(expected: Tensor, noise: SolverNoise, sigmas: Tensor) -> Comparisons:
    """Compares solver noise at successive noise levels with stored draws."""
    for step, draw in enumerate(expected):
        yield Comparison(noise(step, sigmas[step], sigmas[step + 1]), draw)


def bank(stored: Tensor) -> SolverNoise:
    """Returns solver noise that takes stored draws in order, at whichever step it is called."""
    remaining = iter(stored)
    return lambda step, sigma, sigma_next: next(remaining)


def solver(case: Case, sampler: str, noise: SolverNoise) -> Comparisons:
    """Replays a solver with an analytic denoiser."""
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
    """Replays DPM++ 2M SDE with stored noise."""
    return solver(case, "dpmpp_2m_sde", bank(case["noise_bank"]))


def solver_heun(case: Case) -> Comparisons:
    """Replays Heun's solver with stored noise."""
    # The reference draws noise at every step, whether it is used or not.
    return solver(case, "heun", lambda step, sigma, sigma_next: case["eps_draws"][step])


def chunk_indices(case: Case) -> Comparisons:
    """Replays the windows of clips, and which of them make the reference crash."""
    for frames, length, expected, status in case.sidecar["data"]:
        yield Comparison(reference_windows(frames, length), as_ranges(expected))
        yield Comparison(crashes(frames, length), status != "ok")


def reference_windows(frames: int, length: int) -> list[range]:
    """Returns the reference's windows of `length` frames with half overlap."""
    return overlapping_windows(frames, length, length // 2, mode="reference")


def as_ranges(spans: list[list[int]]) -> list[range]:
    """Turns (start, stop) pairs into ranges."""
    return [range(start, stop) for start, stop in spans]


def crashes(frames: int, length: int) -> bool:
    """Returns whether the reference crashes with these windows."""
    try:
        refuse_crashes(frames=frames, chunk_length=length, sampler="dpmpp_2m_sde", evaluations=2)
    except ValueError:
        return True
    return False


def toy_network(case: Case) -> Callable[..., Tensor]:
    """Returns the analytic network that the case describes as 'v = formula; remarks'."""
    formula = case.in_text("network", r"^v = ([^;]+)")

    def network(x: Tensor, t: Tensor, y: Tensor, hint: Tensor) -> Tensor:
        t = t.float().reshape(-1, 1, 1, 1, 1)
        return evaluate(formula, {"xt": x, "t": t, "y": y, "h": hint})

    return network


def chunk_merge(case: Case) -> Comparisons:
    """Replays chunked denoising with an analytic network."""
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
    """Replays chunked sampling and returns the final latents.

    hint, initial: latents of the hint and the initial noise (1 c f h w). noise_of: sigmas -> noise
    of the solver, which is drawn after `initial`.
    """
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
        # No noise is drawn at an infinite level.
        yield from draws(case["brownian_draws"], noise, sigmas[sigmas.isfinite()])

    frames = hint.shape[2]
    windows = reference_windows(frames, settings.get("max_chunk_len") or frames)
    if settings.get("chunk_inds"):
        yield Comparison(windows, as_ranges(settings["chunk_inds"]))
    denoiser = denoiser_of(case, network, case["y"], case["neg_y"], hint=hint)
    denoise = chunked(denoiser, windows, "cut")
    return SAMPLERS[sampler](denoise, noised, sigmas, noise=noise)


def sample_sr_toy(case: Case) -> Comparisons:
    """Replays chunked sampling with an analytic network and stored noise."""
    noise = bank(case["noise_bank"])
    out = yield from sample_sr(
        case, toy_network(case), case["hint"], case["eps"], lambda sigmas: noise
    )
    yield Comparison(out, case["out"])


def sample_sr_tinynet(case: Case) -> Comparisons:
    """Replays chunked sampling with a small network and the reference's noise."""
    network = network_of(case.neighbour(case.in_text("what", r"\b(unet_\w+)")))
    seed, hint = int(case.in_text("what", r"manual_seed\((\d+)\)")), case["hint"]
    source = ReferenceNoise(seed, frame_major=False)
    initial = source.initial(hint.shape)
    out = yield from sample_sr(
        case, network, hint, initial, lambda sigmas: source.solver(hint.shape, sigmas)
    )
    yield Comparison(out, case["out"])
