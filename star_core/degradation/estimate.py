"""Estimates a clip's degradation without the original: blur, noise, compression.

All figures come from at most FRAMES frames, spread evenly over the clip, and in each from at most
the middle SIDE x SIDE pixels without dark borders.
"""

import math
from dataclasses import dataclass
from statistics import median_low

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from .compression import block_dct, luma_steps
from .ops import gaussian_blur

FRAMES, SIDE = 6, 640

_SHARP = 0.5  # width in pixels of the sharpest edges in a picture of full resolution
_FREQUENCY = torch.arange(8)[:, None] + torch.arange(8)  # of an 8x8 block's coefficients


@dataclass(frozen=True, kw_only=True)
class Degradation:
    """The result of `estimate`; str() describes it in three lines.

    resolution: the effective resolution, as the share of the pixel grid's Nyquist frequency that
        carries signal, in (0, 1]: near 1 for a sharp picture, 1/2 for one enlarged by 2; 1 for a
        picture without edges.
    noise: standard deviation of a colour in 8-bit levels, from 0. If a JPEG compression is
        recognised, the noise before it.
    blockiness: height of the steps between 8x8 blocks in 8-bit levels, from 0.
    ringing: oscillation beside strong edges in 8-bit levels, from 0.
    quality: of the JPEG compression, 2 to 99, if its quantiser is recognised; otherwise of a JPEG
        compression that is equally blocky. 100 means none.
    """

    resolution: float
    noise: float
    blockiness: float
    ringing: float
    quality: float

    def __str__(self) -> str:
        sharp = _word(self.resolution, (0.5, "blurred"), (0.8, "soft"), (1, "sharp"))
        clean = _word(self.noise, (1.5, "clean"), (6, "noisy"), (math.inf, "very noisy"))
        intact = _word(
            self.quality, (55, "badly compressed"), (90, "compressed"), (100, "hardly compressed")
        )
        return (
            f"{sharp}: effective resolution {self.resolution:.0%} of the pixels\n"
            f"{clean}: noise of {self.noise:.1f} levels\n"
            f"{intact}: like JPEG quality {self.quality:.0f}, blockiness {self.blockiness:.1f} and "
            f"ringing {self.ringing:.1f} levels"
        )


def _word(value: float, *words: tuple[float, str]) -> str:
    return next(word for limit, word in words if value <= limit)


@torch.no_grad()
def estimate(frames: Tensor) -> Degradation:
    """Estimates the degradation of a clip (f 3 h w) in [0, 1].

    Raises ValueError for an empty clip, for one that is not RGB, and for sides below 64 pixels.
    """
    if frames.ndim != 4 or frames.shape[1] != 3 or not len(frames):
        raise ValueError(f"estimate needs RGB frames (f 3 h w), got {tuple(frames.shape)}")
    if min(frames.shape[-2:]) < 64:
        raise ValueError(
            f"frames of {frames.shape[-1]}x{frames.shape[-2]} are too small to be measured: both "
            "sides must have at least 64 pixels"
        )
    rgb = _picture(frames[spread(len(frames))].float() * 255)
    y = _luma(rgb)
    blockiness, row, column = _blockiness(y)
    remaining_noise = _noise(block_dct(y))
    # The blocks of a cropped clip need not begin at its corner.
    for top, left in dict.fromkeys(((0, 0), (row, column))):
        blocks = block_dct(y[:, top:, left:])
        if quantiser := _quantiser(blocks):
            quality, steps = quantiser
            noise = _noise_before(blocks, steps)
            break
    else:
        quality = _quality(blockiness)
        noise = _noise(block_dct(rgb))
    return Degradation(
        resolution=_resolution(_edge_width(y, remaining_noise)),
        noise=noise,
        blockiness=blockiness,
        ringing=_ringing(y),
        quality=quality,
    )


def spread(frames: int) -> list[int]:
    """Returns the indices of the frames to measure in a clip of so many: at most FRAMES."""
    count = min(frames, FRAMES)
    return [round(i * (frames - 1) / max(count - 1, 1)) for i in range(count)]


def _luma(rgb: Tensor) -> Tensor:
    """Returns JPEG's luma: (f 3 h w) -> (f h w)."""
    return torch.einsum("fchw,c->fhw", rgb, rgb.new_tensor((0.299, 0.587, 0.114)))


def _picture(rgb: Tensor) -> Tensor:
    """Returns the middle of (f 3 h w) without dark borders, cut in steps of 8 pixels."""
    y = _luma(rgb)
    ranges = []
    for lines in (rearrange(y, "f h w -> h (f w)"), rearrange(y, "f h w -> w (f h)")):
        sample = lines[:, :: max(lines.shape[1] // 1000, 1)]
        bright = ((sample.mean(1) > 20) | (sample.quantile(0.95, dim=1) > 40)).nonzero()
        first, last = (int(bright[0]), int(bright[-1]) + 1) if len(bright) else (0, len(lines))
        # A margin of 8 pixels: the border's own edge would be measured otherwise.
        first = -(-first // 8) * 8 + 8 if first else 0
        last = last // 8 * 8 - 8 if last < len(lines) else last
        if last - first < 48:
            first, last = 0, len(lines)
        margin = max(last - first - SIDE, 0) // 2 // 8 * 8
        ranges.append(slice(first + margin, last - margin))
    return rgb[..., ranges[0], ranges[1]]


# compression -----------------------------------------------------------------------------------


def _blockiness(y: Tensor) -> tuple[float, int, int]:
    """Returns the steps between 8x8 blocks in (f h w) in levels, and the first block's corner."""
    heights, starts = [], []
    for lines in (rearrange(y, "f h w -> f w h"), y):
        change = lines.diff(dim=-1).abs()
        excess = (change[..., 1:-1] - (change[..., :-2] + change[..., 2:]) / 2).mean((0, 1))
        # excess[i] belongs to the step between i + 1 and i + 2
        phases = torch.stack([excess[phase::8].mean() for phase in range(8)])
        height, phase = phases.max(0)
        heights.append(max((height - phases.median()).item(), 0.0))
        starts.append((int(phase) + 2) % 8)
    return sum(heights) / 2, starts[0], starts[1]


def _ringing(y: Tensor) -> float:
    """Returns by how many levels detail in (f h w) is stronger beside strong edges than elsewhere.

    Only the smoothest tenth of each region counts, because texture hides ringing elsewhere.
    """
    edges = _gradient(y, 1.5)
    strong = edges >= _top(edges, 0.03)
    detail = (y - gaussian_blur(y[:, None], 1.0)[:, 0])[:, 1:, 1:] ** 2
    detail = F.avg_pool2d(detail[:, None], 3, 1, 1)[:, 0]
    beside = detail[_within(strong, 7) & ~_within(strong, 3)]
    far = detail[~_within(strong, 10)]
    if not len(beside) or not len(far):
        return 0.0
    excess = _top(beside, 0.9).sqrt() - _top(far, 0.9).sqrt()
    return max(excess.item(), 0.0)


def _quantiser(blocks: Tensor) -> tuple[float, Tensor] | None:
    """Returns the JPEG quality and luma steps (8 8) whose multiples coefficients (f h w 8 8) are.

    Each frame is judged alone, because quality may drift. The result is the median if most frames
    have one, else None.
    """
    low = (_FREQUENCY >= 1) & (_FREQUENCY <= 5)
    qualities = torch.arange(2, 100)
    simulated = luma_steps(qualities.to(blocks))
    # Files have integer steps, and a table that is not transposed as in the degradation recipes.
    files = (simulated.mT + 0.5).floor().clamp(1, 255)
    tables, recognised = torch.cat((files, simulated)), []
    for frame in blocks:
        coefficients = frame.flatten(0, 1)
        sample = coefficients[:: max(len(coefficients) // 600, 1), low]
        scores = _multiples(sample, tables[:, low])
        if scores.max() > 0.35:
            recognised.append(int(scores.argmax()))
    if 2 * len(recognised) <= len(blocks):
        return None
    index = median_low(recognised)
    return float(qualities[index % len(qualities)]), tables[index]


def _multiples(coefficients: Tensor, steps: Tensor) -> Tensor:
    """Returns scores (q) of how well (n k) are multiples of steps (q k): 1 all, 0 by chance."""
    scores = torch.zeros(len(steps))
    for i, step in enumerate(steps):
        wide = step > 1.5  # all rounded values are multiples of one level
        z = coefficients[:, wide] / step[wide]
        counted = z.abs() > 0.5  # zeros are multiples of all steps
        total = counted.sum()
        if total >= 30:
            scores[i] = (torch.cos(2 * math.pi * z) * counted).sum() / total
    return scores


def _quality(blockiness: float) -> float:
    """Returns the approximate JPEG quality of equal blockiness, for other kinds of quantiser."""
    return 100 / (1 + 0.5 * max(blockiness - 0.5, 0.0))


# noise -----------------------------------------------------------------------------------------


def _flattest(energy: Tensor, blocks: Tensor) -> Tensor:
    """Returns the tenth of `energy` (n k), squares of coefficients, with the lowest sums.

    Blocks (n 8 8) that are nearly black or white, and perhaps clipped, are ignored if there are
    enough others.
    """
    mean = blocks[:, 0, 0] / 8
    inside = (mean > 8) & (mean < 247)
    energy = energy[inside] if inside.sum() >= 32 else energy
    least = energy.sum(1).topk(max(len(energy) // 10, 1), largest=False).indices
    return energy[least]


def _noise(blocks: Tensor) -> float:
    """Returns the standard deviation of white noise, from high frequencies of blocks (... 8 8)."""
    blocks = blocks.reshape(-1, 8, 8)
    high = _FREQUENCY >= 6
    sigma = _flattest(blocks[:, high] ** 2, blocks).mean().sqrt().item()
    # Even in white noise alone, the flattest tenth has less energy than the mean.
    return sigma / _least_tenth(int(high.sum()))


def _least_tenth(count: int) -> float:
    """Returns the RMS of the lowest tenth of means of `count` squared normal numbers."""
    # Wilson and Hilferty 1931; 1.755: how far a normal number's lowest tenth is below the mean
    spread = 2 / (9 * count)
    return (1 - spread - 1.755 * spread**0.5) ** 1.5


def _noise_before(blocks: Tensor, steps: Tensor) -> float:
    """Returns the noise before a quantiser of steps (8 8), from blocks (f h w 8 8) after it."""
    blocks = blocks.reshape(-1, 8, 8)
    measured = _FREQUENCY >= 3
    energy = _flattest(blocks[:, measured] ** 2, blocks).mean()
    sigma = torch.logspace(-1, 2, 300)
    steps = steps[measured].cpu()
    # E[k^2] of rounded normal numbers k = round(x / step): sum of (2 k - 1) P(|x| > (k - 1/2) step)
    expected = torch.zeros(len(sigma), len(steps))
    for k in range(1, 60):
        expected += (2 * k - 1) * torch.erfc((k - 0.5) * steps / sigma[:, None] / 2**0.5)
    expected = (expected * steps**2).mean(1)
    index = min(int(torch.searchsorted(expected, energy.cpu())), len(sigma) - 1)
    # Independent noise of a colour is larger than that of luma by this factor.
    return 1.5 * sigma[index].item() if index else 0.0


# blur ------------------------------------------------------------------------------------------


def _gradient(y: Tensor, sigma: float) -> Tensor:
    """Returns the squared gradient (f h-1 w-1) of (f h w) after a Gaussian."""
    y = gaussian_blur(y[:, None], sigma)[:, 0]
    x_part = (y[:, 1:, 1:] - y[:, 1:, :-1] + y[:, :-1, 1:] - y[:, :-1, :-1]) / 2
    y_part = (y[:, 1:, 1:] - y[:, :-1, 1:] + y[:, 1:, :-1] - y[:, :-1, :-1]) / 2
    return x_part**2 + y_part**2


def _top(values: Tensor, share: float) -> Tensor:
    """Returns the value that the given share of all values exceed."""
    values = values.flatten()
    return values.kthvalue(max(int((1 - share) * len(values)), 1)).values


def _within(marked: Tensor, radius: int) -> Tensor:
    """Returns which pixels (f h w) are at most `radius` rows and columns from a marked one."""
    near = marked.float()
    for kernel, padding in (((2 * radius + 1, 1), (radius, 0)), ((1, 2 * radius + 1), (0, radius))):
        near = F.max_pool2d(near, kernel, 1, padding)
    return near > 0


def _noise_gradient(sigma: float) -> float:
    """Returns the mean of `_gradient` on white noise of standard deviation 1."""
    impulse = torch.zeros(1, 41, 41)
    impulse[0, 20, 20] = 1
    return _gradient(impulse, sigma).sum().item()


def _edge_width(y: Tensor, noise: float) -> float | None:
    """Returns the width (standard deviation) in pixels of the strongest edges in (f h w), or None.

    An edge of width w has a squared gradient, summed across it, of 1 / sqrt(w^2 + s^2) after a
    Gaussian s, so two Gaussians determine w (after Zhuo and Sim 2011, who compare peaks). The
    noise's share is subtracted. The Gaussians grow with the width, so that wide edges are measured
    despite stronger noise. None: there are no edges.
    """
    width, small = 0.0, 1.0
    for _ in range(3):
        energies = []
        fine, coarse = (_gradient(y, s)[:, 8:-8, 8:-8] for s in (small, 2 * small))
        radius = int(4 * small)
        profile = _within(coarse >= _top(coarse, 0.03), radius)
        for s, gradient in ((small, fine), (2 * small, coarse)):
            energies.append((gradient[profile].mean() - noise**2 * _noise_gradient(s)).item())
        # Rounding alone leaves a level or less.
        if energies[1] < 0.1 + 0.1 * noise**2 * _noise_gradient(2 * small):
            return None
        ratio = max(energies[0] / energies[1], 1.001) ** 2
        # 1/4 corrects for the differences over two pixels, 1/2 for the pixels' own extent
        width = math.sqrt(max((4 - ratio) / (ratio - 1) * small**2 - 0.25 + 0.5, 0.0))
        width = min(width, 12.0)
        small = min(max(0.6 * width, 0.5), 2.0)
    return width


def _resolution(width: float | None) -> float:
    return 1.0 if width is None else (1 + (width / _SHARP) ** 6) ** (-1 / 6)
