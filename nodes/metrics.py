"""How good the result is: metrics of a batch of frames, and their curves."""

import comfy.model_management as mm
from comfy_api.latest import io, ui

from ..star_core.curves import curves
from ..star_core.evaluate import evaluate_frames
from ..star_core.evaluation_report import table
from ..star_core.metrics import METRICS, Setup
from .host import Progress, named, report_ui, video_from_images

# Values by metric and frame: `star_core.metrics.Comparison`.
MetricsType = io.Custom("STAR_METRICS")


class StarMetrics(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="STAR_Metrics",
            display_name="STAR Metrics",
            category="STAR",
            description="Measures frames against their ground truth, or on their own where there "
            "is none. A metric that lacks weights or a package says what is missing; the others "
            "are measured.",
            is_output_node=True,
            inputs=[
                io.Image.Input("images", tooltip="The restored frames."),
                io.String.Input(
                    "metrics",
                    default="psnr ssim lpips warping_error flicker",
                    tooltip=f"Which, by name: {' '.join(METRICS)}.",
                ),
                io.Int.Input(
                    "border",
                    default=0,
                    min=0,
                    max=1024,
                    tooltip="Pixels to leave out at each side.",
                ),
                io.Image.Input(
                    "reference",
                    optional=True,
                    tooltip="The same frames of the ground truth, of the same size.",
                ),
            ],
            outputs=[
                MetricsType.Output(
                    "values", display_name="metrics", tooltip="For STAR Metrics Plot."
                ),
                io.String.Output(
                    "report", display_name="report", tooltip="Means over the frames, as a table."
                ),
            ],
        )

    @classmethod
    def execute(cls, images, metrics, border, reference=None) -> io.NodeOutput:
        progress = Progress()
        with named("STAR Metrics"):
            result = evaluate_frames(
                video_from_images(images),
                None if reference is None else video_from_images(reference),
                metrics.replace(",", " ").split(),
                setup=Setup(device=mm.get_torch_device()),
                border=border,
                on_frame=lambda done: progress(done, len(images)),
            )
        report = table([result])
        return io.NodeOutput(result.comparison, report, ui=report_ui(report))


class StarMetricsPlot(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="STAR_MetricsPlot",
            display_name="STAR Metrics Plot",
            category="STAR",
            description="Draws one metric over the frames, of up to three results in one picture.",
            is_output_node=True,
            inputs=[
                MetricsType.Input("a", tooltip="Of STAR Metrics."),
                io.Combo.Input(
                    "metric", options=list(METRICS), default="psnr", tooltip="Which to draw."
                ),
                io.Int.Input(
                    "width", default=960, min=200, max=8192, tooltip="Width of the picture."
                ),
                io.Int.Input(
                    "height", default=360, min=200, max=8192, tooltip="Height of the picture."
                ),
                MetricsType.Input("b", optional=True, tooltip="Another result, to compare."),
                MetricsType.Input("c", optional=True, tooltip="Another result, to compare."),
            ],
            outputs=[io.Image.Output("plot", display_name="plot", tooltip="The curves.")],
        )

    @classmethod
    def execute(cls, a, metric, width, height, b=None, c=None) -> io.NodeOutput:
        with named("STAR Metrics Plot"):
            results = {name: r for name, r in zip("abc", (a, b, c), strict=True) if r is not None}
            values = {name: result.values_of(metric) for name, result in results.items()}
            title = METRICS[metric].title
            picture = curves(values, title=title, width=width, height=height)
        plot = picture.movedim(0, -1)[None]
        return io.NodeOutput(plot, ui=ui.PreviewImage(plot, cls=cls))
