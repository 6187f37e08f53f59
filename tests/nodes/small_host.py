"""The built-in model in the host, a small scene for it, and what the core makes of that."""

import importlib
from dataclasses import replace
from typing import Any

import torch

from star_core.demo import DATA, DEGRADED
from star_core.diffusion.denoiser import Denoiser
from star_core.diffusion.noise import FrameNoise, brownian_noise
from star_core.diffusion.samplers import SAMPLERS
from star_core.diffusion.schedule import sampling_sigmas, star_schedule
from star_core.diffusion.shortcuts import Shortcuts
from star_core.model import BUILT_IN
from star_core.models.slicing import Slicing
from star_core.sampling_defaults import SamplingDefaults
from star_core.star_checkpoint import load_model, open_model
from star_core.vae.load import load_frame_vae
from star_core.video_io import open_video
from star_core.windows.chunking import ChunkConfig, chunked, overlapping_windows
from star_core.windows.geometry import upsample
from star_core.windows.tiling import Tile

SHAPE = (1, 32, 9, 10, 12)


NONE = Shortcuts()


class Host:
    """The pack's modules and a small scene: latents of a clip, the MODEL, its conditioning."""

    def __init__(self, pack) -> None:
        def module(name: str) -> Any:
            return importlib.import_module(f".nodes.{name}", pack.__name__)

        self.model_file, self.sampling = module("host_model"), module("host_sampling")
        self.conditions, self.strength = module("host_conditioning"), 1.0
        checkpoints = importlib.import_module(".star_core.star_checkpoint", pack.__name__)
        self.star = checkpoints.open_model(BUILT_IN["tiny"][0])
        self.model = self.model_file.load_patcher(self.star)
        generator = torch.Generator().manual_seed(4)
        degraded = torch.stack(list(open_video(DATA / DEGRADED, frames=(0, SHAPE[2]))))
        video = upsample(degraded[:, :3, 20:30, 80:92], (48, 40), "bicubic") * 2 - 1
        with torch.inference_mode():
            self.lq = load_frame_vae(BUILT_IN["tiny"][1]).encode(video.transpose(0, 1)[None])
        # the second prompt of the file was hardly trained; noise makes guidance visible
        shift = torch.randn(self.star.prompts.negative.shape, generator=generator)
        self.positive = self.star.prompts.positive.float()
        self.negative = self.positive + shift

    def conditioning(self, prompt):
        """As STAR Conditioning makes it."""
        latent, prompts = {"samples": self.raw}, ([[prompt, {}]], [[prompt, {}]])
        return self.conditions.with_hint(prompts, latent, self.strength)[0]

    @property
    def raw(self):
        """What a VAE of the host gives: not scaled."""
        return self.lq / self.star.latents.scale

    def run(self, model, sampler, sigmas, *, cfg=3.0, noise=None, seed=5, callback=None):
        import comfy.sample  # pyright: ignore[reportMissingImports]

        noise = FrameNoise(seed).initial(SHAPE) if noise is None else noise
        out = comfy.sample.sample_custom(
            model,
            noise,
            cfg,
            sampler,
            sigmas,
            self.conditioning(self.positive),
            self.conditioning(self.negative),
            self.raw,
            callback=callback,
            disable_pbar=True,
            seed=seed,
        )
        return out * self.star.latents.scale

    def ksampler(self, model, name, scheduler="normal", steps=10, cfg=3.0):
        import comfy.sample  # pyright: ignore[reportMissingImports]

        noise = comfy.sample.prepare_noise(self.raw, 3)
        out = comfy.sample.sample(
            model,
            noise,
            steps,
            cfg,
            name,
            scheduler,
            self.conditioning(self.positive),
            self.conditioning(self.negative),
            self.raw,
            disable_pbar=True,
            seed=3,
        )
        return out * self.star.latents.scale


def likeness(found, wanted) -> float:
    """Correlation of the previews of latents; nan, which no comparison accepts, if not finite."""
    rgb = torch.tensor(open_model(BUILT_IN["tiny"][0]).latents.rgb)
    pictures = [(latents.movedim(1, -1) @ rgb).flatten() for latents in (found, wanted)]
    return torch.corrcoef(torch.stack(pictures))[0, 1].item()


def core_result(
    host: Host,
    sampling: SamplingDefaults,
    chunk: ChunkConfig | None,
    merge,
    noise,
    tile: Tile | None = None,
    shortcuts: Shortcuts = NONE,
    strength: float = 1.0,
):
    """What `pipeline` computes, from the core's parts."""
    model = load_model(BUILT_IN["tiny"][0], dtype=torch.float32)
    schedule = star_schedule()
    sigmas = sampling_sigmas(
        schedule,
        solver_mode=sampling.solver_mode,
        steps=sampling.steps,
        noise_level=sampling.noise_level,
        sampler=sampling.sampler,
    )
    denoiser = Denoiser(
        network=model.network,
        schedule=schedule,
        positive=host.positive,
        negative=host.negative,
        hint=host.lq,
        guidance_scale=sampling.cfg,
        guidance_rescale=sampling.cfg_rescale,
        shortcuts=shortcuts,
    )

    def denoise(x_in, sigma, window):
        hint = host.lq[:, :, window.start : window.stop]
        return torch.lerp(hint, denoiser(x_in, sigma, window), strength)

    frames = SHAPE[2]
    windows = overlapping_windows(
        frames, chunk.length if chunk else frames, chunk.overlap if chunk else 0
    )
    draws = {
        "frame": lambda: FrameNoise(5).solver(SHAPE, sigmas),
        "brownian": lambda: brownian_noise(SHAPE, sigmas, 5),
    }[noise]()
    t = torch.tensor([sampling.noise_level - 1])
    start = schedule.add_noise(host.lq, FrameNoise(5).initial(SHAPE), t)
    how = model.network.working(
        slicing=Slicing(), tile=tile, attention_window=shortcuts.attention_window
    )
    with torch.inference_mode(), how:
        return SAMPLERS[sampling.sampler](
            chunked(denoise, windows, merge), start, sigmas, noise=draws
        )


FAST = SamplingDefaults(cfg=3.0)


NORMAL = replace(FAST, solver_mode="normal", steps=4)
