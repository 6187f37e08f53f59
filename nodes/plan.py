"""What sampling will take, and how it fits into memory."""

from comfy_api.latest import io

from ..star_core.plan import Task
from ..star_core.plan_report import report
from ..star_core.prediction import fitting, predict
from .host import free_memory, named, report_ui
from .host_model import network_of, star_of
from .host_sampling import patch_chunks, patch_work
from .host_vae import star_vae

GIB = 2**30


class StarPlan(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="STAR_Plan",
            display_name="STAR Plan",
            category="STAR",
            description="Predicts memory and compute of a run before it runs, and sets windows of "
            "frames, slices, tiles and offloading of the MODEL so that it fits.",
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="A STAR model."),
                io.Vae.Input("vae", tooltip="The VAE of STAR Load VAE."),
                io.Latent.Input(
                    "latent", tooltip="What will be sampled: the LATENT of STAR Conditioning."
                ),
                io.Float.Input(
                    "memory",
                    default=0.0,
                    min=0.0,
                    max=1024.0,
                    step=0.5,
                    tooltip="GiB to plan for; 0 for what the host can clear on the device now, "
                    "less a tenth.",
                ),
            ],
            outputs=[
                io.Model.Output(),
                io.String.Output(
                    "report", display_name="report", tooltip="The plan and what it costs."
                ),
            ],
        )

    @classmethod
    def execute(cls, model, vae, latent, memory) -> io.NodeOutput:
        with named("STAR Plan"):
            star, video_vae = star_of(model), star_vae(vae).video_vae
            config, dtype = network_of(model)
            _, _, count, height, width = latent["samples"].shape
            frames = (count - 1) * video_vae.latent_frames + 1
            task = Task(
                frames=frames,
                size=(width * video_vae.factor, height * video_vae.factor),
                config=config,
                vae=video_vae.geometry,
                text_encoder=False,  # the host's own, and done
                one_clip=True,
                dtype=dtype,
                sampling=star.sampling,
            )
            limit = int(memory * GIB) if memory else int(0.9 * free_memory())
            plan = fitting(task, limit, chunk=task.usual_chunk(merged=frames))
            text = report(plan, predict(plan), limit)
            if plan.tile is not None:
                text += (
                    f"\n\nSet tile_size {plan.tile.size} and tile_overlap {plan.tile.overlap} in "
                    "the nodes that encode and decode."
                )
            tile = plan.latent_tile and plan.latent_tile.in_latents(
                video_vae.factor, step=2**config.downsamplings
            )
            model = patch_chunks(model, plan.chunk, task.behaviour.merge)
            model = patch_work(model, tile=tile, slicing=plan.slicing)
        return io.NodeOutput(model, text, ui=report_ui(text))
