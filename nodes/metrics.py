"""How good the result is: metrics of a batch of frames, and their curves."""

import comfy.model_management as mm
from comfy_api.latest import io

from ..star_core.evaluation.evaluate import evaluate_frames
from ..star_core.evaluation.report import curves_of, table
from ..star_core.metrics import METRICS, Setup
from .host import Progress, named, report_ui, video_from_images
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
            description="Measures up to three results against their ground truth, or on their own "
            "where there is none. A metric that lacks weights or a package says what is missing; "
            "the others are measured.",
            is_output_node=True,
            inputs=[
                io.Image.Input("images", tooltip="The restored frames."),
                io.Image.Input(
                    "reference",
                    optional=True,
                    tooltip="The same frames of the ground truth, in the same size.",
                ),
                io.Image.Input(
                    "images_b",
                    optional=True,
                    tooltip="Another result of the same clip, to compare.",
                ),
                io.Image.Input(
                    "images_c", optional=True, tooltip="A third result of the same clip."
                ),
                io.String.Input(
                    "metrics",
                    default="psnr ssim lpips warping_error flicker",
                    tooltip=f"Which metrics, by name: {' '.join(METRICS)}.",
                ),
                io.Combo.Input(
                    "curves",
                    options=[ALL, *METRICS],
                    default=ALL,
                    tooltip="Which of the measured metrics is drawn over the frames; all draws one "
                    "below the other.",
                ),
                advanced(
                    io.Int.Input(
                        "border",
                        default=0,
                        min=0,
                        max=1024,
                        tooltip="Pixels to leave out at each side.",
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
                    tooltip="Curves of the metrics over the frames, one for each result.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls, images, metrics, curves, border, reference=None, images_b=None, images_c=None
    ) -> io.NodeOutput:
        given = {"images": images, "images_b": images_b, "images_c": images_c}
        results = {name: frames for name, frames in given.items() if frames is not None}
        progress, total = Progress(), sum(map(len, results.values()))
        evaluations = []
        with named("STAR Metrics"):
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
