"""Blocks between conditioning and decoding: noise, windows, guidance, noise levels, solver."""

from dataclasses import replace

from comfy_api.latest import io

from ..star_core.chunking import ChunkConfig
from ..star_core.diffusion.samplers import SAMPLERS
from ..star_core.shortcuts import FAST, Shortcuts
from .host import DegradationType, named, tile_of
from .host_model import star_of
from .host_sampling import (
    SOLVER_NOISE,
    FrameNoiseSource,
    finite_sigmas,
    patch_chunks,
    patch_guidance,
    patch_shortcuts,
    patch_strength,
    patch_tiles,
    star_sampler,
)
from .host_vae import star_vae

MERGES = ["smooth", "cut"]
MODES = ["model", "fast", "normal"]


class StarNoise(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="STAR_Noise",
            display_name="STAR Noise",
            category="STAR",
            description="Noise that belongs to the frame: a frame gets the same noise whatever "
            "the length of the clip and the windows.",
            inputs=[
                io.Int.Input(
                    "seed",
                    default=666,
                    min=0,
                    max=2**64 - 1,
                    control_after_generate=True,
                    tooltip="Same seed, same result. The solver's noise comes from it as well.",
                )
            ],
            outputs=[io.Noise.Output()],
        )

    @classmethod
    def execute(cls, seed: int) -> io.NodeOutput:
        return io.NodeOutput(FrameNoiseSource(seed))


class StarTemporalChunks(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="STAR_TemporalChunks",
            display_name="STAR Temporal Chunks",
            category="STAR",
            description="Denoises a clip of any length in overlapping windows of frames, joined "
            "at every step. Memory depends on the window, not on the clip.",
            inputs=[
                io.Model.Input("model", tooltip="A STAR model."),
                io.Int.Input(
                    "chunk_frames",
                    default=32,
                    min=1,
                    max=1024,
                    tooltip="Most frames that the network sees together. More is steadier and "
                    "needs more memory.",
                ),
                io.Int.Input(
                    "chunk_overlap",
                    default=6,
                    min=0,
                    max=1023,
                    tooltip="Frames that neighbouring windows share, fewer than chunk_frames. "
                    "More hides the joints and takes longer.",
                ),
                io.Combo.Input(
                    "merge",
                    options=MERGES,
                    default="smooth",
                    tooltip="How the shared frames are joined: smooth blends them, cut takes half "
                    "from each, as the original does.",
                ),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, model, chunk_frames, chunk_overlap, merge) -> io.NodeOutput:
        with named("STAR Temporal Chunks"):
            star_of(model)
            chunk = ChunkConfig(length=chunk_frames, overlap=chunk_overlap)
            return io.NodeOutput(patch_chunks(model, chunk, merge))


class StarGuidance(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="STAR_Guidance",
            display_name="STAR Guidance",
            category="STAR",
            description="How guidance (cfg) acts: its contrast, the steps in which it runs, and "
            "how far the result may leave the input.",
            inputs=[
                io.Model.Input("model", tooltip="A STAR model."),
                io.Float.Input(
                    "cfg_rescale",
                    default=0.2,
                    min=0.0,
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
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="How far each prediction goes from the input's latents: 0 stays at "
                    "the enlarged input, 1 is the full result.",
                ),
                DegradationType.Input(
                    "degradation",
                    optional=True,
                    tooltip="Of STAR Analyze Degradation: multiplies strength.",
                ),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(
        cls, model, cfg_rescale, start_percent, end_percent, strength, degradation=None
    ) -> io.NodeOutput:
        with named("STAR Guidance"):
            star_of(model)
            if degradation is not None:
                strength *= degradation.strength
            model = patch_guidance(model, cfg_rescale, start_percent, end_percent)
            return io.NodeOutput(patch_strength(model, strength))


class StarTiles(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="STAR_Tiles",
            display_name="STAR Tiles",
            category="STAR",
            description="Denoises frames of any size in overlapping tiles, joined at every step. "
            "Memory depends on the tile, not on the frame.",
            inputs=[
                io.Model.Input("model", tooltip="A STAR model."),
                io.Vae.Input(
                    "vae", tooltip="The VAE of STAR Load VAE, which says how large a latent is."
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
                    tooltip="What the network keeps for later waits in main memory. The result "
                    "stays the same, a GPU needs less.",
                ),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, model, vae, tile_size, tile_overlap, offload) -> io.NodeOutput:
        with named("STAR Tiles"):
            star_of(model)
            factor = star_vae(vae).video_vae.factor
            tile = tile_of(tile_size, tile_overlap)
            return io.NodeOutput(patch_tiles(model, tile, factor=factor, offload=offload))


class StarFast(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="STAR_Fast",
            display_name="STAR Fast",
            category="STAR",
            description="Leaves work out at the same number of steps. How real weights take it "
            "is not yet known.",
            inputs=[
                io.Model.Input("model", tooltip="A STAR model."),
                io.Int.Input(
                    "guidance_from",
                    default=FAST.guidance[0],
                    min=0,
                    max=1000,
                    tooltip="Lowest noise level, of 1000, at which the negative prompt counts; "
                    "0 for down to the end. Steps without it take half the time.",
                ),
                io.Int.Input(
                    "guidance_to",
                    default=FAST.guidance[1],
                    min=0,
                    max=1000,
                    tooltip="Noise level, of 1000, below which the negative prompt counts; 1000 "
                    "for from the start.",
                ),
                io.Int.Input(
                    "attention_window",
                    default=FAST.attention_window or 0,
                    min=0,
                    max=1024,
                    tooltip="The finest attention stays in squares of so many latents, which lie "
                    "elsewhere in every other layer. 0 for whole frames.",
                ),
                io.Int.Input(
                    "reuse",
                    default=FAST.reuse,
                    min=0,
                    max=1000,
                    tooltip="What the coarser layers found counts for so many noise levels more, "
                    "of 1000. 0 to look every time.",
                ),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, model, guidance_from, guidance_to, attention_window, reuse) -> io.NodeOutput:
        with named("STAR Fast"):
            star_of(model)
            shortcuts = Shortcuts(
                guidance=(guidance_from, guidance_to),
                attention_window=attention_window or None,
                reuse=reuse,
            )
            return io.NodeOutput(patch_shortcuts(model, shortcuts))


class StarScheduler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="STAR_Scheduler",
            display_name="STAR Scheduler",
            category="STAR",
            description="STAR's noise levels.",
            inputs=[
                io.Model.Input("model", tooltip="A STAR model."),
                io.Combo.Input(
                    "solver_mode",
                    options=MODES,
                    default="model",
                    tooltip="fast: STAR's 14 evaluations. normal: evenly spaced steps. model: "
                    "as the model file says.",
                ),
                io.Int.Input(
                    "steps",
                    default=0,
                    min=0,
                    max=1000,
                    tooltip="Steps in solver mode normal; fast has its own. 0: as the model "
                    "file says.",
                ),
                io.Int.Input(
                    "noise_level",
                    default=-1,
                    min=-1,
                    max=1000,
                    tooltip="How much of the input is forgotten before it is restored, 0 to "
                    "1000; STAR takes 900. -1: as the model file says.",
                ),
                io.Combo.Input(
                    "sampler",
                    options=list(SAMPLERS),
                    default="dpmpp_2m_sde",
                    tooltip="For which solver: dpmpp_2m_sde leaves out one level that heun takes.",
                ),
                DegradationType.Input(
                    "degradation",
                    optional=True,
                    tooltip="Of STAR Analyze Degradation: its noise level, where noise_level "
                    "is -1.",
                ),
            ],
            outputs=[io.Sigmas.Output()],
        )

    @classmethod
    def execute(
        cls, model, solver_mode, steps, noise_level, sampler, degradation=None
    ) -> io.NodeOutput:
        with named("STAR Scheduler"):
            own = star_of(model).sampling
            if degradation is not None:
                own = replace(own, noise_level=degradation.noise_level)
            sampling = replace(
                own,
                solver_mode=own.solver_mode if solver_mode == "model" else solver_mode,
                steps=steps or own.steps,
                noise_level=own.noise_level if noise_level < 0 else noise_level,
                sampler=sampler,
            )
            return io.NodeOutput(finite_sigmas(sampling))


class StarSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="STAR_Sampler",
            display_name="STAR Sampler",
            category="STAR",
            description="STAR's solvers, for SamplerCustomAdvanced with STAR Scheduler.",
            inputs=[
                io.Combo.Input(
                    "sampler",
                    options=list(SAMPLERS),
                    default="dpmpp_2m_sde",
                    tooltip="dpmpp_2m_sde is STAR's. heun takes two evaluations a step.",
                ),
                io.Combo.Input(
                    "noise",
                    options=list(SOLVER_NOISE),
                    default="frame",
                    tooltip="Noise of the solver: frame belongs to each frame, brownian is one "
                    "random path as in the original.",
                ),
                io.Boolean.Input(
                    "start_of_run",
                    default=True,
                    tooltip="On: start as STAR does. Off: go on where another sampler stopped.",
                ),
            ],
            outputs=[io.Sampler.Output()],
        )

    @classmethod
    def execute(cls, sampler: str, noise: str, start_of_run: bool) -> io.NodeOutput:
        with named("STAR Sampler"):
            return io.NodeOutput(star_sampler(sampler, noise, start_of_run))
