"""Families of the CogVideoX backbone."""

import re
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from ..color_fix import COLOR_FIXES
from ..diffusion.denoiser import Denoiser, dynamic_guidance, guided_velocity
from ..diffusion.samplers import SAMPLERS
from ..diffusion.scaled_linear import run_levels, scaled_linear_schedule
from ..models.cogvideox_dit import Block, CogVideoXDiT, rotary_table
from ..models.cogvideox_weights import CogVideoXConfig, in_diffusers_naming
from ..vae.cogvideox import CausalVideoVAE, causal_vae, decode_groups
from ..vae.cogvideox import in_diffusers_naming as vae_in_diffusers_naming
from ..windows.geometry import scaled_bytes
from .case import Case, Comparison, Comparisons, evaluate

Network = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def config_of(case: Case) -> CogVideoXConfig:
    """Returns the configuration of the network of a case."""
    config = case.config
    modules = config["modules"]
    return CogVideoXConfig(
        in_dim=config["in_channels"],
        context_dim=modules["patch_embed_config"]["params"]["text_hidden_size"],
        dim=config["hidden_size"],
        num_heads=config["num_attention_heads"],
        num_layers=config["num_layers"],
        time_dim=config["time_embed_dim"],
        positions="rotary" if "Rotary" in modules["pos_embed_config"]["target"] else "sincos",
    )


def weights_of(case: Case) -> dict[str, Tensor]:
    """Returns the network's weights of a case in diffusers' naming."""
    prefix = "model.diffusion_model."
    return dict(
        in_diffusers_naming(
            {k.removeprefix(prefix): v for k, v in case.tensors.items() if k.startswith(prefix)}
        )
    )


def network_of(case: Case) -> CogVideoXDiT:
    """Returns the network of a case with its weights, for inference."""
    network = CogVideoXDiT(config_of(case))
    network.load_state_dict(weights_of(case))
    return network.eval()


def transformer(case: Case) -> Comparisons:
    """Replays a forward pass of the whole network."""
    network, config = network_of(case), config_of(case)
    tokens: list[Tensor] = []
    network.transformer_blocks[-1].register_forward_hook(
        lambda block, inputs, outputs: tokens.append(torch.cat(outputs[::-1], dim=1))
    )
    x, hint = rearrange(case["in.x"], "b f c h w -> b c f h w").split(config.in_dim, dim=1)
    t = case["in.timesteps"]
    sinusoid = network.time_proj(t)
    if "mid.time_sinusoid" in case.tensors:
        yield Comparison(sinusoid, case["mid.time_sinusoid"])
        yield Comparison(network.time_embedding(sinusoid), case["mid.time_emb"])
    out = rearrange(network(x, t, case["in.context"], hint), "b c f h w -> b f c h w")
    yield Comparison(out, case["out"])
    if "mid.before_final_ln" in case.tensors:
        yield Comparison(tokens[0][:, ::7], case["mid.before_final_ln"])


def layer(case: Case) -> Comparisons:
    """Replays one transformer block with the results of its parts."""
    config, number = config_of(case), case.sidecar["layer_id"]
    prefix = f"transformer_blocks.{number}."
    block = Block(config).eval()
    block.load_state_dict({k.removeprefix(prefix): v for k, v in weights_of(case).items()})
    grid = (case.sidecar["latent_frames"], *case.sidecar["patch_grid"])
    text, image = case["in.hidden"].tensor_split([case.sidecar["text_length"]], dim=1)
    rotary = None
    if config.positions == "rotary":
        rotary = rotary_table(config, grid, image.device)

    recorded: dict[str, Any] = {}  # inputs and output by name of the part
    mlp: list[Any] = []  # its outputs, last one first: text, image tokens
    for name, part in block.named_children():
        part.register_forward_hook(lambda _, x, out, n=name: recorded.update({n: (x, out)}))
    block.ff.register_forward_hook(lambda _, x, out: mlp.insert(0, out))
    image, text = block(image, text, case["in.emb"], grid, rotary)
    yield Comparison(torch.cat([text, image], dim=1), case["out.hidden"])
    inputs, gated = recorded["spa_local"]
    yield Comparison(inputs[0], case["mid.liem_spatial_in"])
    yield Comparison(gated, case["mid.liem_spatial_out"])
    f, h, w = grid
    tokens = rearrange(recorded["temp_local"][1], "b (f h w) d -> (b h w) f d", f=f, h=h, w=w)
    yield Comparison(tokens, case["mid.liem_temporal_out"])
    attended_image, attended_text = recorded["attn1"][1]
    yield Comparison(torch.cat([attended_text, attended_image], dim=1), case["mid.attn_out"])
    yield Comparison(torch.cat(mlp, dim=1), case["mid.mlp_out"])


def schedule(case: Case) -> Comparisons:
    """Replays the tables of the noise schedule and its timesteps."""
    for shift in case.sidecar["shifts"]:
        table = scaled_linear_schedule(shift)
        yield Comparison(table.alphas, case[f"full1000.shift{shift:g}"])
        for steps in case.sidecar["ns"]:
            name = f"n{steps}.shift{shift:g}"
            run = run_levels(steps, shift=shift)
            sigmas = run.sigmas[:-1]
            t = run.schedule.model_timestep(sigmas)
            alphas = run.schedule.alphas[t]
            nearest = (table.alphas - alphas[:, None]).abs().argmin(dim=1)
            yield Comparison(1 / (1 + sigmas.double() ** 2).sqrt(), case[f"a.{name}"])
            yield Comparison(t, case[f"timesteps.n{steps}"])
            yield Comparison(alphas, case[f"a_quant.{name}"])
            yield Comparison(nearest, case[f"quant_idx.{name}"])


def dynamic_cfg(case: Case) -> Comparisons:
    """Replays dynamic guidance scales and guided velocities."""
    for steps, scale, exponent in case.sidecar["combos"]:
        name = f"n{steps}.s{scale:g}.e{exponent}"
        t = run_levels(steps).schedule.model_timestep(run_levels(steps).sigmas[:-1])
        scales = [
            dynamic_guidance(each[None], scale=scale, steps=steps, exponent=exponent) for each in t
        ]
        yield Comparison(torch.tensor(scales, dtype=torch.float64), case[f"scale.{name}"])
        expected = case[f"guided.{name}"]
        every = [
            guided_velocity(case[f"c.{name}"], case[f"u.{name}"], each, None) for each in scales
        ]
        for each in expected:  # the sidecar does not name the steps
            error = torch.stack([(ours - each).abs().amax() for ours in every])
            yield Comparison(every[int(error.argmin())], each)


def sampled(case: Case, network: Network, context: Tensor) -> Comparisons:
    """Replays sampling with a network and a text embedding (1 l d)."""
    settings = case.sidecar
    steps = settings["num_steps"]
    run = run_levels(steps, shift=settings["shift_scale"])
    timesteps: list[Tensor] = []

    def recording(x: Tensor, t: Tensor, y: Tensor, hint: Tensor | None) -> Tensor:
        timesteps.append(t)
        assert hint is not None
        return network(x, t, y, hint)

    denoise = Denoiser(
        network=recording,
        schedule=run.schedule,
        positive=context,
        negative=torch.zeros_like(context),
        hint=rearrange(case["in.lq"], "b f c h w -> b c f h w"),
        guidance_scale=lambda t: dynamic_guidance(
            t, scale=settings["cfg_scale"], steps=steps, exponent=settings["cfg_exp"]
        ),
        guidance_rescale=None,
    )
    estimates: list[Tensor] = []
    # The reference draws noise twice in each step and discards the first draw.
    draws = rearrange(case["in.draws"], "n b f c h w -> n b c f h w")
    out = SAMPLERS["dpmpp_2m_sde_renewed"](
        denoise,
        rearrange(case["in.noise"], "b f c h w -> b c f h w"),
        run.sigmas,
        noise=lambda step, sigma, sigma_next: draws[2 * step],
        on_step=lambda step, total, x_0: estimates.append(x_0),
    )
    yield Comparison(rearrange(out, "b c f h w -> b f c h w"), case["out"])
    predictions = rearrange(torch.stack(estimates), "n b c f h w -> n b f c h w")
    yield Comparison(predictions, case["denoised"])
    if "net_timesteps" in case.tensors:
        yield Comparison(torch.stack(timesteps[::2]).float(), case["net_timesteps"][:, :1])


def sampler(case: Case) -> Comparisons:
    """Replays sampling with an analytic network."""
    formula = case.in_text("formula", r"^v = (.+)$")
    formula = re.sub(r"mean\(ctx[^)]*\)", "ctx", formula)

    def network(x: Tensor, t: Tensor, y: Tensor, hint: Tensor) -> Tensor:
        t = t.float().reshape(-1, 1, 1, 1, 1)
        context = y.mean((1, 2)).reshape(-1, 1, 1, 1, 1)
        return evaluate(formula, {"xn": x, "lq": hint, "t": t, "ctx": context})

    return sampled(case, network, case["in.context"])


def endtoend(case: Case) -> Comparisons:
    """Replays sampling with a small network."""
    return sampled(case, network_of(case), case["in.context"])


def color_fix(case: Case) -> Comparisons:
    """Replays both colour fixes."""
    source = case["in.source_m11"] / 2 + 0.5
    yield Comparison(COLOR_FIXES["adain"](case["in.sample01"], source), case["out.adain"])
    target = rearrange(case["in.wavelet_target_thwc255"] / 255, "f h w c -> f c h w")
    reference = case["in.wavelet_source_m11"] / 2 + 0.5
    fixed = 255 * rearrange(COLOR_FIXES["wavelet"](target, reference), "f c h w -> f h w c")
    yield Comparison(fixed, case["out.wavelet_thwc255"], atol=255 * (case.atol or 0))


def preprocess(case: Case) -> Comparisons:
    """Replays resizing of 8-bit frames."""
    frames = case["in.small_uint8"][: case.sidecar["num_frames"]]
    yield Comparison(2 * scaled_bytes(frames / 255, 4, "bicubic") - 1, case["out.small_x4_bicubic"])

    prose = case.sidecar["big_input"]  # two draws of a generator, and the region that is stored
    shapes = [
        tuple(map(int, shape.split(",")))
        for shape in re.findall(r"randint\(0,256,\(([\d,]+)\)\)", prose)
    ]
    random = np.random.RandomState(case.sidecar["seed"])
    big = torch.tensor([random.randint(0, 256, shape) for shape in shapes][-1])
    reduced = scaled_bytes(big / 255, 2 / 3, "bilinear")
    top, left = (
        (side - cropped) // 2
        for side, cropped in zip(
            reduced.shape[-2:], case.sidecar["out_full_shape"][-2:], strict=True
        )
    )
    rows, columns = (
        slice(int(first) + start, int(last) + start)
        for start, (first, last) in zip((top, left), re.findall(r"(\d+):(\d+)", prose), strict=True)
    )
    yield Comparison(2 * reduced[..., rows, columns] - 1, case["out.big_two_thirds_crop"])


def decode_chunks(case: Case) -> Comparisons:
    """Replays the groups of latent frames that the VAE decodes together."""
    for key, plan in case.tensors.items():
        groups = decode_groups(int(key.removeprefix("plan.T")))
        yield Comparison(torch.tensor([[group.start, group.stop] for group in groups]), plan)


def vae_of(case: Case) -> CausalVideoVAE:
    """Returns the VAE of a case, with weights drawn from normal noise seeded by each key."""
    settings = case.sidecar
    vae = causal_vae(
        {
            "block_out_channels": [settings["ch"] * m for m in settings["ch_mult"]],
            "layers_per_block": settings["num_res_blocks"],
            "latent_channels": settings["z_channels"],
            "scaling_factor": 1.0,
        }
    )

    def weight(key: str, shape: list[int]) -> Tensor:
        random = np.random.RandomState(zlib.crc32(key.encode()))
        r = torch.from_numpy(random.standard_normal(shape).astype(np.float32))
        if key.endswith("bias"):
            return 0.1 * r
        return 1 + 0.2 * r if r.ndim == 1 else r / r[0].numel() ** 0.5

    weights = {key: weight(key, shape) for key, shape in settings["sat_keys"].items()}
    vae.model.load_state_dict(vae_in_diffusers_naming(weights))
    vae.model.eval()
    return vae


def vae(case: Case) -> Comparisons:
    """Replays encoding and decoding by the VAE."""
    model = vae_of(case)
    yield Comparison(model.encode(case["in.video"]), case["out.moments"].chunk(2, dim=1)[0])
    sample = model.encode(case["in.video"], noise=case["in.posterior_noise"])
    yield Comparison(sample, case["out.z_sampled"])
    plan = [[group.start, group.stop] for group in decode_groups(case["in.z"].shape[2])]
    yield Comparison(plan, case.sidecar["decode_plan"])
    yield Comparison(model.decode(case["in.z"]), case["out.video"])


FAMILIES = {
    "color_fix": color_fix,
    "decode_chunks": decode_chunks,
    "dynamic_cfg": dynamic_cfg,
    "endtoend": endtoend,
    "layer": layer,
    "preprocess": preprocess,
    "sampler": sampler,
    "schedule": schedule,
    "transformer": transformer,
    "vae": vae,
}
