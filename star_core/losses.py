"""Losses of STAR: velocity and DF, the dynamic frequency loss (paper, section 3.3).

DF loss compares the spectra of the predicted and the true x_0, low and high frequencies apart.
Early in diffusion (t large) structure is decided, so low frequencies weigh more; late, detail, so
high ones.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class DFLossConfig:
    """cutoff: border between low and high, as a fraction of the Nyquist frequency (radius).

    softness: width of that border, same unit. alpha: exponent of c(t) (paper, table 5).
    beta: total weight (paper, table 7).
    """

    cutoff: float = 0.35
    softness: float = 0.05
    alpha: float = 2.0
    beta: float = 1.0

    def __post_init__(self) -> None:
        if min(self.cutoff, self.softness) <= 0 or min(self.alpha, self.beta) < 0:
            raise ValueError(
                f"cutoff and softness must be positive, alpha and beta not below 0: {self}"
            )


def low_frequencies(height: int, width: int, config: DFLossConfig, device=None) -> Tensor:
    """Weight of each rfft2 coefficient in the low part, 0 to 1, (h w//2+1); 1 minus it is high."""
    rows = torch.fft.fftfreq(height, 0.5, device=device)
    columns = torch.fft.rfftfreq(width, 0.5, device=device)
    radius = torch.hypot(rows[:, None], columns[None, :])
    return torch.sigmoid((config.cutoff - radius) / (config.softness / 4))


def df_loss(
    x_0: Tensor, target: Tensor, t: Tensor, config: DFLossConfig, *, timesteps: int = 1000
) -> Tensor:
    """DF loss with its weight over time, per sample (b,); gradients flow into x_0.

    x_0, target: prediction and truth, pixels or latents (b c f h w). t: timesteps (b,).
    The distance of two spectra is the mean magnitude of their complex difference under an
    orthonormal transform, so that it does not depend on the size of the frame.
    """
    tau = t.float() / (timesteps - 1)
    difference = torch.fft.rfft2(x_0.float() - target.float(), norm="ortho").abs()
    low = low_frequencies(x_0.shape[-2], x_0.shape[-1], config, device=x_0.device)
    low_error = (difference * low).mean((1, 2, 3, 4)) / low.mean()
    high_error = (difference * (1 - low)).mean((1, 2, 3, 4)) / (1 - low).mean()
    c = tau**config.alpha
    return config.beta * (1 - tau) * (c * low_error + (1 - c) * high_error)


def velocity_loss(v: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of the velocity, per sample (b,)."""
    return (v.float() - target.float()).square().mean((1, 2, 3, 4))
