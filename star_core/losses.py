"""Losses of STAR: velocity and DF, the dynamic frequency loss (paper, section 3.3).

DF loss compares the spectra of the predicted and the true x_0, separately for low and high
frequencies. Early in sampling (t large) the network decides on structure, so low frequencies weigh
more; late in sampling it adds detail, so high frequencies weigh more.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor

Shape = Literal["linear", "exponential"]
FrequencyOrder = Literal["direct", "inverse", "unseparated"]
Variant = Literal["paper", "reference"]


@dataclass(frozen=True, kw_only=True)
class DFLossConfig:
    """Options of the DF loss.

    cutoff: border between low and high frequencies, as a fraction of the Nyquist frequency
        (radius). softness: width of that border, in the same unit.
    order: "direct" weighs low frequencies more early in sampling, "inverse" late in sampling,
        "unseparated" weighs both alike at all timesteps (table 4).
    alpha: exponent of c(t). shape: shape of c(t) and of the total weight b(t) (table 5).
    beta: total weight (table 7); 0 omits the loss.
    variant: "reference" computes what the released training code logs, for comparison only: spectra
        split by magnitude, without gradient.
    """

    cutoff: float = 0.35
    softness: float = 0.05
    order: FrequencyOrder = "direct"
    alpha: float = 2.0
    shape: Shape = "linear"
    beta: float = 1.0
    variant: Variant = "paper"

    def __post_init__(self) -> None:
        if min(self.cutoff, self.softness) <= 0 or min(self.alpha, self.beta) < 0:
            raise ValueError(
                f"cutoff and softness must be positive, alpha and beta not below 0: {self}"
            )
        for name, known in (("order", FrequencyOrder), ("shape", Shape), ("variant", Variant)):
            if getattr(self, name) not in known.__args__:
                raise ValueError(
                    f"{name} must be one of {', '.join(known.__args__)}, got {getattr(self, name)}"
                )


def ramp(tau: Tensor, shape: Shape) -> Tensor:
    """Returns a weight that grows from 0 at tau = 0 to 1 at tau = 1, linearly or exponentially."""
    return tau if shape == "linear" else torch.expm1(tau) / torch.expm1(torch.ones_like(tau))


def df_weights(t: Tensor, config: DFLossConfig, *, timesteps: int = 1000) -> tuple[Tensor, Tensor]:
    """Returns the weights of low and of high frequencies at timesteps t, each (b,).

    With tau = t / (timesteps - 1) and c = tau^alpha they are beta (1 - tau) c and
    beta (1 - tau) (1 - c); the order "inverse" swaps them. t: (b,), from 0 to timesteps - 1.
    """
    tau = t.float() / (timesteps - 1)
    total = config.beta * (1 - ramp(tau, config.shape))
    c = ramp(tau, config.shape) ** config.alpha
    if config.order == "unseparated":
        c = torch.full_like(c, 0.5)
    elif config.order == "inverse":
        c = 1 - c
    return total * c, total * (1 - c)


def low_frequencies(height: int, width: int, config: DFLossConfig, device=None) -> Tensor:
    """Returns the low-pass weight of each rfft2 coefficient, (h w//2+1) from 0 to 1.

    height, width: size of the transformed frames. The high-pass weight is 1 minus this one.
    """
    rows = torch.fft.fftfreq(height, 0.5, device=device)
    columns = torch.fft.rfftfreq(width, 0.5, device=device)
    radius = torch.hypot(rows[:, None], columns[None, :])
    return torch.sigmoid((config.cutoff - radius) / (config.softness / 4))


def df_loss(
    x_0: Tensor,
    target: Tensor,
    t: Tensor,
    config: DFLossConfig,
    *,
    timesteps: int = 1000,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Returns the DF loss of each sample, weighted by timestep: (b,) float32.

    The distance of two spectra is the mean magnitude of their complex difference under an
    orthonormal transform, so that it does not depend on the size of the frame. Gradients flow into
    x_0, except for the reference variant.

    x_0, target: prediction and truth, pixels or latents (b c f h w). t: timesteps (b,).
    timesteps: length of the noise schedule. generator: for the random quantiles of the reference
    variant.
    """
    low_weight, high_weight = df_weights(t, config, timesteps=timesteps)
    # Half precision would round the spectrum, and has no FFT on most devices.
    with torch.autocast(x_0.device.type, enabled=False):
        x_0, target = x_0.float(), target.float()
        if config.variant == "reference":
            low_error, high_error = reference_errors(x_0, target, generator)
            return 0.01 * (low_weight * low_error + high_weight * high_error)
        difference = torch.fft.rfft2(x_0 - target, norm="ortho").abs()
        low = low_frequencies(x_0.shape[-2], x_0.shape[-1], config, device=x_0.device)
        low_error = (difference * low).mean((1, 2, 3, 4)) / low.mean()
        high_error = (difference * (1 - low)).mean((1, 2, 3, 4)) / (1 - low).mean()
        return low_weight * low_error + high_weight * high_error


def velocity_loss(v: Tensor, target: Tensor) -> Tensor:
    """Returns the mean squared error of velocities (b c f h w) for each sample, (b,) float32."""
    return (v.float() - target.float()).square().mean((1, 2, 3, 4))


def by_magnitude(video: Tensor, picks: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Splits the spectrum of a video (c f h w) as the released training code does.

    picks: indices of the magnitudes whose 0.8-quantile is the cut, None for all (specification,
    section 10). Returns weak coefficients, strong coefficients and the cut. The spectra are not
    normalised; real and imaginary parts come last, (f c h w//2+1 2).
    """
    spectrum = torch.fft.rfft2(rearrange(video, "c f h w -> f c h w"))
    magnitude = spectrum.abs()
    chosen = magnitude.flatten()
    cut = torch.quantile(chosen if picks is None else chosen[picks], 0.8)
    weak = torch.sigmoid(10 * (cut - magnitude))[..., None]
    parts = torch.view_as_real(spectrum)
    return parts * weak, parts * (1 - weak), cut


@torch.no_grad()
def reference_errors(
    x_0: Tensor, target: Tensor, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Returns mean absolute differences of weak and of strong coefficients, each (b,).

    x_0, target: videos (b c f h w). Each quantile uses all coefficients, or 10000 random ones (with
    replacement) if there are more; `generator` draws them for the prediction first, then for the
    target.
    """

    def split(video: Tensor) -> tuple[Tensor, Tensor]:
        size = video[..., : video.shape[-1] // 2 + 1].numel()
        picks = None
        if size > 10000:
            picks = torch.randint(size, (10000,), generator=generator).to(video.device)
        return by_magnitude(video, picks)[:2]

    errors = [
        [(a - b).abs().mean() for a, b in zip(split(ours), split(theirs), strict=True)]
        for ours, theirs in zip(x_0, target, strict=True)
    ]
    low, high = zip(*errors, strict=True)
    return torch.stack(low), torch.stack(high)
