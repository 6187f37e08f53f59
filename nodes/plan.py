"""A node that predicts the memory of a run and makes it fit."""

from comfy_api.latest import io

from ..star_core.planning.duration import duration, stored_machine
from ..star_core.planning.plan import Task
from ..star_core.planning.predict import fitting, predict
from ..star_core.planning.report import report
from .host import memory_limit, node_errors, report_ui
from .host_features import schema
from .host_model import network_of, sampling_defaults
from .host_sampling import patch_plan
from .host_vae import star_vae


class StarPlan(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="STAR_Plan",
            display_name="STAR Plan",
            category="STAR/sampling",
            search_aliases=["memory", "VRAM", "out of memory", "estimate", "low VRAM"],
            description="Predicts memory and compute before sampling, and sets the model's "
            "windows of frames, slices, tiles and offloading so that the run fits.",
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="MODEL from STAR Load Model."),
                io.Vae.Input("vae", tooltip="VAE from STAR Load Model."),
                io.Latent.Input(
                    "latent", tooltip="The latents to be sampled, from STAR Conditioning."
                ),
                io.Float.Input(
                    "memory",
                    default=0.0,
                    min=0.0,
                    max=1024.0,
                    step=0.5,
                    tooltip="Memory to plan for, in GiB. 0: nine tenths of what ComfyUI can free "
                    "on the device now.",
                ),
            ],
            outputs=[
                io.Model.Output(
                    tooltip="The model, set to the windows, slices and tiles of the plan."
                ),
                io.String.Output(
                    "report", display_name="report", tooltip="The plan and its cost, as text."
                ),
            ],
        )

    @classmethod
    def execute(cls, model, vae, latent, memory) -> io.NodeOutput:
        with node_errors("STAR Plan"):
            (config, dtype), video_vae = network_of(model), star_vae(vae).video_vae
            task = Task.of_latents(
                latent["samples"].shape[2:],
                video_vae.geometry,
                config=config,
                dtype=dtype,
                vae_dtype=video_vae.model.dtype,
                sampling=sampling_defaults(model),
            )
            limit = memory_limit(memory)
            chunk, gpu = task.usual_chunk(merged=task.frames), model.load_device.type != "cpu"
            plan = fitting(task, limit, chunk=chunk, gpu=gpu)
            prediction = predict(plan)
            seconds = duration(prediction, task, stored_machine(model.load_device))
            text = report(plan, prediction, limit, seconds=seconds)
            if plan.tile is not None:
                text += (
                    f"\n\nSet tile_size {plan.tile.size} and tile_overlap {plan.tile.overlap} in "
                    "the nodes that encode and decode."
                )
            model = patch_plan(model, plan)
        return io.NodeOutput(model, text, ui=report_ui(text))
