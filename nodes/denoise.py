"""Nodes between conditioning and decoding: windows, tiles, guidance, shortcuts, sampling."""

from comfy_api.latest import io

from ..star_core.diffusion.samplers import SAMPLERS
from ..star_core.diffusion.shortcuts import FAST, Shortcuts
from .host import (
    chunk_inputs,
    degradation_input,
    model_default,
    node_errors,
    seed_input,
    steps_inputs,
    tile_inputs,
    tile_of,
)
from .host_features import advanced, schema
from .host_model import star_of
from .host_sampling import (
    SOLVER_NOISE,
    FrameNoiseSource,
    chunk_of,
    finite_sigmas,
    patch_chunks,
    patch_guidance,
    patch_tiles,
    patch_work,
    sampling_of,
    star_sampler,
)
from .host_vae import star_vae

MERGES = ["smooth", "cut"]


class StarTemporalChunks(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="STAR_TemporalChunks",
            display_name="STAR Temporal Chunks",
            category="STAR/sampling",
            search_aliases=["context windows", "long video", "chunked", "sliding window"],
            description="Denoises a clip of any length in overlapping windows of frames, which "
            "are merged at every step. Memory depends on the window, not on the clip.",
            inputs=[
                io.Model.Input("model", tooltip="MODEL from STAR Load Model."),
                *chunk_inputs(),
                advanced(
                    io.Combo.Input(
                        "merge",
                        options=MERGES,
                        default="smooth",
                        tooltip="How shared frames are merged: smooth blends them; cut takes one "
                        "half from each window, as the original STAR does.",
                    )
                ),
            ],
            outputs=[io.Model.Output(tooltip="The model, which now denoises window by window.")],
        )

    @classmethod
    def execute(cls, model, chunk_frames, chunk_overlap, merge) -> io.NodeOutput:
        with node_errors("STAR Temporal Chunks"):
            chunk = chunk_of(star_of(model), chunk_frames, chunk_overlap)
            return io.NodeOutput(patch_chunks(model, chunk, merge))


class StarTiles(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="STAR_Tiles",
            display_name="STAR Tiles",
            category="STAR/sampling",
            search_aliases=["tiled diffusion", "out of memory", "low VRAM", "large frames"],
            description="Denoises frames of any size in overlapping tiles, which are merged at "
            "every step. Memory depends on the tile, not on the frame.",
            inputs=[
                io.Model.Input("model", tooltip="MODEL from STAR Load Model."),
                io.Vae.Input(
                    "vae",
                    tooltip="VAE from STAR Load Model. It defines how many pixels a latent covers.",
                ),
                *tile_inputs(
                    1024,
                    256,
                    note="Pixels are those of the result. Small tiles give the model less context.",
                ),
                io.Boolean.Input(
                    "offload",
                    default=False,
                    tooltip="Keeps skip connections in system RAM to save VRAM. The result does "
                    "not change.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="The model, which now denoises tile by tile.")],
        )

    @classmethod
    def execute(cls, model, vae, tile_size, tile_overlap, offload) -> io.NodeOutput:
        with node_errors("STAR Tiles"):
            star_of(model)
            factor = star_vae(vae).video_vae.factor
            tile = tile_of(tile_size, tile_overlap)
            return io.NodeOutput(patch_tiles(model, tile, factor=factor, offload=offload))


class StarGuidance(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="STAR_Guidance",
            display_name="STAR Guidance",
            category="STAR/sampling",
            search_aliases=["cfg", "rescale cfg", "guidance interval"],
            description="Rescales the guidance (cfg) and limits it to some of the steps. Use it "
            "with STAR's published models whenever cfg is above 1.",
            inputs=[
                io.Model.Input("model", tooltip="MODEL from STAR Load Model."),
                model_default(
                    io.Float,
                    "cfg_rescale",
                    max=1.0,
                    step=0.05,
                    tooltip="Moves the contrast of the guided prediction towards that of the "
                    "prediction without guidance. 0 keeps it; STAR uses 0.2.",
                ),
                io.Float.Input(
                    "start_percent",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Fraction of the noise levels at which guidance begins; 0 is the "
                    "first step.",
                ),
                io.Float.Input(
                    "end_percent",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Fraction of the noise levels at which guidance ends; 1 is the last "
                    "step. Steps without guidance take half the time.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="The model with this guidance, for CFGGuider.")],
        )

    @classmethod
    def execute(cls, model, cfg_rescale, start_percent, end_percent) -> io.NodeOutput:
        with node_errors("STAR Guidance"):
            sampling = sampling_of(model, cfg_rescale=cfg_rescale)
            return io.NodeOutput(
                patch_guidance(model, sampling.cfg_rescale, start_percent, end_percent)
            )


class StarFast(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="STAR_Fast",
            display_name="STAR Fast",
            category="STAR/sampling",
            search_aliases=["speed", "DeepCache", "window attention", "faster"],
            description="Skips part of the computation at the same number of steps. The effect on "
            "quality with STAR's published weights has not been measured.",
            inputs=[
                io.Model.Input("model", tooltip="MODEL from STAR Load Model."),
                io.Int.Input(
                    "attention_window",
                    default=FAST.attention_window or 0,
                    min=0,
                    max=1024,
                    tooltip="Limits full-resolution attention to windows of N x N latents, "
                    "shifted in every other layer. 0 uses whole frames.",
                ),
                io.Int.Input(
                    "reuse",
                    default=FAST.reuse,
                    min=0,
                    max=1000,
                    tooltip="Reuses deep features for up to N of the 1000 timesteps. 0 computes "
                    "them at every step.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="The model with these shortcuts.")],
        )

    @classmethod
    def execute(cls, model, attention_window, reuse) -> io.NodeOutput:
        with node_errors("STAR Fast"):
            star_of(model)
            shortcuts = Shortcuts(attention_window=attention_window or None, reuse=reuse)
            return io.NodeOutput(
                patch_work(
                    model,
                    attention_window=shortcuts.attention_window,
                    reuse=shortcuts.reuse,
                )
            )


class StarSampling(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="STAR_Sampling",
            display_name="STAR Sampling",
            category="STAR/sampling",
            search_aliases=["sampler", "scheduler", "noise", "sigmas", "seed", "KSampler"],
            description="Provides STAR's noise, solver and noise levels for "
            "SamplerCustomAdvanced. A frame gets the same noise whatever the length of the clip "
            "and of the windows.",
            inputs=[
                io.Model.Input("model", tooltip="MODEL from STAR Load Model."),
                degradation_input("Its noise level is used if noise_level is -1."),
                seed_input(),
                model_default(
                    io.Combo,
                    "solver",
                    options=list(SAMPLERS),
                    tooltip="dpmpp_2m_sde is STAR's solver on I2VGen-XL, dpmpp_2m_sde_renewed "
                    "that on CogVideoX, dpmpp_2m the same without added noise. heun evaluates the "
                    "network twice per step. euler and lcm are for models and LoRAs distilled "
                    "into a few steps; lcm draws fresh noise after each.",
                ),
                *steps_inputs(),
                advanced(
                    io.Combo.Input(
                        "solver_noise",
                        options=list(SOLVER_NOISE),
                        default="frame",
                        tooltip="Noise that the solver adds: frame draws it for each frame; "
                        "brownian draws one random path, as the original STAR does.",
                    )
                ),
                advanced(
                    io.Boolean.Input(
                        "start_of_run",
                        default=True,
                        tooltip="On: starts as STAR does. Off: continues from the latents of "
                        "another sampler.",
                    )
                ),
            ],
            outputs=[
                io.Noise.Output(tooltip="The initial noise, for SamplerCustomAdvanced."),
                io.Sampler.Output(tooltip="The solver, for SamplerCustomAdvanced."),
                io.Sigmas.Output(tooltip="The noise levels, for SamplerCustomAdvanced."),
            ],
        )

    @classmethod
    def execute(
        cls, model, seed, solver, steps, noise_level, solver_noise, start_of_run, degradation=None
    ) -> io.NodeOutput:
        with node_errors("STAR Sampling"):
            sampling = sampling_of(
                model, degradation, sampler=solver, steps=steps, noise_level=noise_level
            )
            return io.NodeOutput(
                FrameNoiseSource(seed),
                star_sampler(sampling.sampler, solver_noise, start_of_run),
                finite_sigmas(sampling),
            )
