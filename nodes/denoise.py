"""Blocks between conditioning and decoding: windows, tiles, guidance, shortcuts, sampling."""

from comfy_api.latest import io

from ..star_core.diffusion.samplers import SAMPLERS
from ..star_core.diffusion.shortcuts import FAST, Shortcuts
from .host import (
    as_the_model_says,
    chunk_inputs,
    degradation_input,
    named,
    seed_input,
    steps_inputs,
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
            description="Denoises a clip of any length in overlapping windows of frames, joined "
            "at every step. Memory depends on the window, not on the clip.",
            inputs=[
                io.Model.Input("model", tooltip="A STAR model."),
                *chunk_inputs(),
                advanced(
                    io.Combo.Input(
                        "merge",
                        options=MERGES,
                        default="smooth",
                        tooltip="How the shared frames are joined: smooth blends them, cut takes "
                        "half from each, as the original does.",
                    )
                ),
            ],
            outputs=[io.Model.Output(tooltip="The model, which now works window by window.")],
        )

    @classmethod
    def execute(cls, model, chunk_frames, chunk_overlap, merge) -> io.NodeOutput:
        with named("STAR Temporal Chunks"):
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
            description="Denoises frames of any size in overlapping tiles, joined at every step. "
            "Memory depends on the tile, not on the frame.",
            inputs=[
                io.Model.Input("model", tooltip="A STAR model."),
                io.Vae.Input(
                    "vae", tooltip="VAE from STAR Load Model, which says how large a latent is."
                ),
                io.Int.Input(
                    "tile_size",
                    default=1024,
                    min=0,
                    max=8192,
                    step=32,
                    tooltip="Largest side of a tile in pixels of the result, 0 for whole frames. "
                    "Smaller tiles take less memory and more time, and see less at once.",
                ),
                io.Int.Input(
                    "tile_overlap",
                    default=256,
                    min=0,
                    max=4096,
                    step=8,
                    tooltip="Pixels that neighbouring tiles share and blend. Too few show as "
                    "seams.",
                ),
                io.Boolean.Input(
                    "offload",
                    default=False,
                    tooltip="Keeps skip connections in system RAM to save VRAM. The result stays "
                    "the same.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="The model, which now works tile by tile.")],
        )

    @classmethod
    def execute(cls, model, vae, tile_size, tile_overlap, offload) -> io.NodeOutput:
        with named("STAR Tiles"):
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
            description="How guidance (cfg) acts: its contrast, and the steps in which it runs. "
            "STAR's published models want it with any cfg above 1.",
            inputs=[
                io.Model.Input("model", tooltip="A STAR model."),
                as_the_model_says(
                    io.Float,
                    "cfg_rescale",
                    max=1.0,
                    step=0.05,
                    tooltip="Pulls the contrast of the guided prediction back to that of the "
                    "unguided one. 0 leaves it, STAR takes 0.2.",
                ),
                io.Float.Input(
                    "start_percent",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Where in the noise levels guidance begins; 0 is the first step.",
                ),
                io.Float.Input(
                    "end_percent",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Where guidance ends; 1 is the last step. Steps without guidance "
                    "take half the time.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="The model with this guidance, for CFGGuider.")],
        )

    @classmethod
    def execute(cls, model, cfg_rescale, start_percent, end_percent) -> io.NodeOutput:
        with named("STAR Guidance"):
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
            description="Leaves work out at the same number of steps. What this costs in quality "
            "on STAR's published weights is not yet known.",
            inputs=[
                io.Model.Input("model", tooltip="A STAR model."),
                io.Int.Input(
                    "attention_window",
                    default=FAST.attention_window or 0,
                    min=0,
                    max=1024,
                    tooltip="Limits full-resolution attention to windows of this many latents a "
                    "side, shifted in every other layer. 0 for whole frames.",
                ),
                io.Int.Input(
                    "reuse",
                    default=FAST.reuse,
                    min=0,
                    max=1000,
                    tooltip="Reuses deep features for up to so many of the 1000 timesteps. 0 "
                    "computes them at every step.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="The model with these shortcuts.")],
        )

    @classmethod
    def execute(cls, model, attention_window, reuse) -> io.NodeOutput:
        with named("STAR Fast"):
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
            description="STAR's own noise, solver and noise levels, for SamplerCustomAdvanced. "
            "Noise belongs to the frame: a frame gets the same noise whatever the length of the "
            "clip and the windows.",
            inputs=[
                io.Model.Input("model", tooltip="A STAR model."),
                degradation_input("its noise level is taken where noise_level is -1."),
                seed_input(),
                as_the_model_says(
                    io.Combo,
                    "solver",
                    options=list(SAMPLERS),
                    tooltip="dpmpp_2m_sde is STAR's, dpmpp_2m_sde_renewed CogVideoX's. heun takes "
                    "two evaluations a step.",
                ),
                *steps_inputs(),
                advanced(
                    io.Combo.Input(
                        "solver_noise",
                        options=list(SOLVER_NOISE),
                        default="frame",
                        tooltip="Noise that the solver adds: frame belongs to each frame, "
                        "brownian is one random path as in the original.",
                    )
                ),
                advanced(
                    io.Boolean.Input(
                        "start_of_run",
                        default=True,
                        tooltip="On: start as STAR does. Off: go on where another sampler stopped.",
                    )
                ),
            ],
            outputs=[
                io.Noise.Output(tooltip="The noise to start from, for SamplerCustomAdvanced."),
                io.Sampler.Output(tooltip="The solver, for SamplerCustomAdvanced."),
                io.Sigmas.Output(tooltip="The noise levels, for SamplerCustomAdvanced."),
            ],
        )

    @classmethod
    def execute(
        cls, model, seed, solver, steps, noise_level, solver_noise, start_of_run, degradation=None
    ) -> io.NodeOutput:
        with named("STAR Sampling"):
            sampling = sampling_of(
                model, degradation, sampler=solver, steps=steps, noise_level=noise_level
            )
            return io.NodeOutput(
                FrameNoiseSource(seed),
                star_sampler(sampling.sampler, solver_noise, start_of_run),
                finite_sigmas(sampling),
            )
