"""Measures a network on held-out clips while it is trained."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor

from ..backbones import Network
from ..diffusion.levels import trained_schedule
from ..metrics import compare
from ..sampling_defaults import SamplingDefaults
from ..vae.cogvideox import CausalVideoVAE
from ..vae.frame_vae import VideoVAE
from ..video_io import open_sink
from .objective import Prompts, sample_generator

METRICS = ("psnr", "ssim", "flicker")


class Validation:
    """Restores clips by a single evaluation at the noise level that sampling starts from.

    clips: clean and degraded frames of the same size (f 3 h w) in [0, 1]. out: degraded, restored
    and clean frames are written side by side to `out`/validation/STEP_CLIP.mp4. sampling: the
    model's; None for the defaults. text: embedding (1 l d) if prompts are not learned.
    """

    def __init__(
        self,
        clips: Sequence[tuple[Tensor, Tensor]],
        vae: VideoVAE | CausalVideoVAE,
        out: Path,
        *,
        sampling: SamplingDefaults | None = None,
        text: Tensor | None = None,
    ) -> None:
        self.clips, self.vae, self.text = clips, vae, text
        self.folder, sampling = out / "validation", sampling or SamplingDefaults()
        self.schedule, self.t = trained_schedule(sampling), sampling.noise_level - 1

    @torch.no_grad()
    def __call__(self, network: Network, prompts: Prompts | None, step: int) -> dict[str, float]:
        """Returns the means over clips, by names such as "restored psnr" and "degraded psnr".

        prompts: learned prompts, if the network has any. step: names the videos. The network is
        left in the mode in which it came.
        """
        training = {module: module.training for module in network.modules()}
        network.eval()
        try:
            sums: dict[str, float] = {}
            for number, (clean, large) in enumerate(self.clips):
                restored = self.restored(network, prompts, large)
                rows = {"restored": restored, "degraded": large}
                for row, video in rows.items():
                    means = compare(list(video), list(clean), metrics=METRICS).means
                    for name, value in means.items():
                        key = f"{row} {name}"
                        sums[key] = sums.get(key, 0.0) + value / len(self.clips)
                self._show(f"{step:07d}_{number}", [large, restored, clean])
            return sums
        finally:
            for module, mode in training.items():
                module.training = mode

    def restored(self, network: Network, prompts: Prompts | None, large: Tensor) -> Tensor:
        """Restores an enlarged degraded clip `large`; both are (f 3 h w) in [0, 1].

        prompts: learned prompts; None to use `text`.
        """
        y: Tensor | None = self.text if prompts is None else prompts.positive
        assert y is not None, "neither text nor learned prompts"
        schedule, t = self.schedule, torch.tensor([self.t], device=y.device)
        lq = self.vae.encode(rearrange(large * 2 - 1, "f c h w -> 1 c f h w")).to(y.device)
        noise = torch.randn(lq.shape, generator=sample_generator(0, 0)).to(lq)
        x_t = schedule.add_noise(lq, noise, t)
        x_0 = schedule.x_0(x_t, network(x_t, t, y, lq).float(), t)
        video = self.vae.decode(x_0)[0]
        return (rearrange(video, "c f h w -> f c h w") / 2 + 0.5).clamp(0, 1).cpu()

    def _show(self, name: str, videos: Sequence[Tensor]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        both = torch.cat([video.cpu() for video in videos], dim=3)
        height, width = both.shape[-2:]
        path, fps = self.folder / f"{name}.mp4", Fraction(10)
        with open_sink(path, width=width, height=height, fps=fps, overwrite=True) as sink:
            for frame in both:
                sink.write(frame)
