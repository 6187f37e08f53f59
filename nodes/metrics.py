"""A node that measures batches of frames and plots the metrics over the frames."""

import comfy.model_management as mm
from comfy_api.latest import io

from ..star_core.evaluation.evaluate import evaluate_frames
from ..star_core.evaluation.report import curves_of, table
from ..star_core.metrics import METRICS, Setup
from .host import Progress, node_errors, report_ui, video_from_images
from .host_features import advanced, schema

ALL = "all"


class StarMetrics(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="STAR_Metrics",
            display_name="STAR Metrics",
            category="STAR/measure",
            search_aliases=["PSNR", "SSIM", "LPIPS", "flicker", "video quality", "plot"],
            description="Measures up to three results against their ground truth, or without one. "
            "If a metric's weights or package are missing, the report says which; the other "
            "metrics are still measured.",
            is_output_node=True,
            inputs=[
                io.Image.Input("images", tooltip="The restored frames."),
                io.Image.Input(
                    "reference",
                    optional=True,
                    tooltip="The same frames of the ground truth, of the same size.",
                ),
                io.Image.Input(
                    "images_b",
                    optional=True,
                    tooltip="A second result of the same clip, to compare.",
                ),
                io.Image.Input(
                    "images_c", optional=True, tooltip="A third result of the same clip."
                ),
                io.String.Input(
                    "metrics",
                    default="psnr ssim lpips warping_error flicker",
                    tooltip=f"Names of the metrics to measure: {' '.join(METRICS)}.",
                ),
                io.Combo.Input(
                    "curves",
                    options=[ALL, *METRICS],
                    default=ALL,
                    tooltip="Measured metric to plot over the frames; all plots every metric, one "
                    "below the other.",
                ),
                advanced(
                    io.Int.Input(
                        "border",
                        default=0,
                        min=0,
                        max=1024,
                        tooltip="Number of pixels to ignore at each edge.",
                    )
                ),
            ],
            outputs=[
                io.String.Output(
                    "report",
                    display_name="report",
                    tooltip="The mean of each metric over the frames, as a table.",
                ),
                io.Image.Output(
                    "plot",
                    display_name="plot",
                    tooltip="Curves of the metrics over the frames, one per result.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls, images, metrics, curves, border, reference=None, images_b=None, images_c=None
    ) -> io.NodeOutput:
        inputs = {"images": images, "images_b": images_b, "images_c": images_c}
        results = {name: frames for name, frames in inputs.items() if frames is not None}
        progress, total = Progress(), sum(map(len, results.values()))
        evaluations = []
        with node_errors("STAR Metrics"):
            for name, frames in results.items():
                before = sum(each.frames for each in evaluations)
                evaluations.append(
                    evaluate_frames(
                        video_from_images(frames),
                        None if reference is None else video_from_images(reference),
                        metrics.replace(",", " ").split(),
                        name=name,
                        setup=Setup(device=mm.get_torch_device()),
                        border=border,
                        on_frame=lambda done, before=before: progress(before + done, total),
                    )
                )
            picture = curves_of(evaluations, None if curves == ALL else curves)
        report, plot = table(evaluations), picture.movedim(0, -1)[None]
        return io.NodeOutput(report, plot, ui=report_ui(report, plot))
