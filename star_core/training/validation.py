"""Measures a network on held-out clips while it is trained."""

from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor

from ..backbones import Network
from ..diffusion.denoiser import Denoiser
from ..diffusion.levels import guidance_of, levels_of
from ..diffusion.noise import FrameNoise
from ..diffusion.samplers import SAMPLERS
from ..metrics import compare
from ..sampling_defaults import SamplingDefaults
from ..vae.cogvideox import CausalVideoVAE
from ..vae.frame_vae import VideoVAE
from ..video_io import open_sink
from .objective import Prompts
from .processes import gathered

METRICS = ("psnr", "ssim", "flicker")


class Validation:
    """Restores clips as the model is sampled, with all its evaluations and its guidance.

    clips: of this process, by number: clean and degraded frames of the same size (f 3 h w) in
    [0, 1]. Every process needs equally many.
    out: degraded, restored and clean frames are written side by side to
    `out`/validation/STEP_CLIP.mp4. sampling: the model's; None for the defaults. text: positive and
    negative embedding (1 l d) if prompts are not learned. bf16: whether the network computes in
    bfloat16. on_clip: called as on_clip(done, clips of this process) after each clip.
    """

    def __init__(
        self,
        clips: Mapping[int, tuple[Tensor, Tensor]],
        vae: VideoVAE | CausalVideoVAE,
        out: Path,
        *,
        sampling: SamplingDefaults | None = None,
        text: tuple[Tensor, Tensor] | None = None,
        bf16: bool = False,
        on_clip: Callable[[int, int], None] | None = None,
    ) -> None:
        self.clips, self.vae, self.text, self.bf16 = clips, vae, text, bf16
        self.on_clip = on_clip
        self.folder, self.sampling = out / "validation", sampling or SamplingDefaults()

    @torch.no_grad()
    def __call__(self, network: Network, prompts: Prompts | None, step: int) -> dict[str, float]:
        """Returns the means over the clips of all processes, by names such as "restored psnr".

        prompts: learned prompts, if the network has any. step: names the videos. The network is
        left in the mode in which it came.
        """
        training = {module: module.training for module in network.modules()}
        network.eval()
        try:
            figures: list[dict[str, float]] = []
            for number, (clean, large) in self.clips.items():
                restored = self.restored(network, prompts, large)
                figures.append({})
                for row, video in {"restored": restored, "degraded": large}.items():
                    means = compare(list(video), list(clean), metrics=METRICS).means
                    figures[-1] |= {f"{row} {name}": value for name, value in means.items()}
                self._show(f"{step:07d}_{number}", [large, restored, clean])
                if self.on_clip:
                    self.on_clip(len(figures), len(self.clips))
            figures = gathered(figures)
            return {name: sum(each[name] for each in figures) / len(figures) for name in figures[0]}
        finally:
            for module, mode in training.items():
                module.training = mode

    def restored(self, network: Network, prompts: Prompts | None, large: Tensor) -> Tensor:
        """Restores an enlarged degraded clip `large`; both are (f 3 h w) in [0, 1].

        prompts: learned prompts; None to use `text`.
        """
        text = self.text if prompts is None else (prompts.positive, prompts.negative)
        assert text is not None, "neither text nor learned prompts"
        sampling, (schedule, sigmas) = self.sampling, levels_of(self.sampling)
        lq = self.vae.encode(rearrange(large * 2 - 1, "f c h w -> 1 c f h w")).to(text[0].device)
        denoise = Denoiser(
            network=network,
            schedule=schedule,
            positive=text[0],
            negative=text[1],
            hint=lq,
            guidance_scale=guidance_of(sampling),
            guidance_rescale=sampling.cfg_rescale,
        )
        noise, shape = FrameNoise(0), tuple(lq.shape)
        t = torch.tensor([sampling.noise_level - 1], device=lq.device)
        start = schedule.add_noise(lq, noise.initial(shape).to(lq), t)
        with torch.autocast(lq.device.type, torch.bfloat16, enabled=self.bf16):
            x_0 = SAMPLERS[sampling.sampler](
                denoise, start, sigmas, noise=noise.solver(shape, sigmas)
            )
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
