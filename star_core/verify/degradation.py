"""Families of the degradation pipeline. Settings are prose, such as "size15 sig=(2.1,0.7)"."""

import math
import re

import torch.nn.functional as F
from torch import Generator, Tensor

from ..degradation.compression import jpeg
from ..degradation.ops import (
    KernelKind,
    blur,
    blur_kernel,
    gaussian_noise,
    poisson_noise,
    sinc_kernel,
    usm_sharpen,
)
from .case import Case, Comparison, Comparisons

NUMBER = r"(-?\d*\.?\d+)"


def numbers_after(word: str, prose: str, default: str = "") -> list[float]:
    """Returns the one or two numbers after a word, as in "sig1.1", "sig=1.1" or "sig=(2.1,0.7)".

    default: text that is appended, for a word that may be missing. ValueError without the word.
    """
    match = re.search(rf"\b{word}\s*=?\s*\(?{NUMBER}(?:\s*,\s*{NUMBER}\))?", prose + default)
    if match is None:
        raise ValueError(f"no {word} in {prose!r}")
    return [float(number) for number in match.groups() if number]


def kernel(name: str, prose: str) -> Tensor:
    """Returns the blur kernel (h w) of a case; the name tells its kind, the prose its settings."""
    size = int(numbers_after("size", prose)[0])
    if name == "sinc":
        over_pi = re.search(rf"cutoff\s*=?\s*pi/{NUMBER}", prose)
        cutoff = math.pi / float(over_pi[1]) if over_pi else numbers_after("cutoff", prose)[0]
        (padded,) = numbers_after("padded to", prose, f" padded to {size}")
        return F.pad(sinc_kernel(size, cutoff), [(int(padded) - size) // 2] * 4)
    kinds: dict[str, KernelKind] = {"gen": "generalized", "plateau": "plateau"}
    sigma = numbers_after("sig", prose)
    return blur_kernel(
        size,
        sigma if len(sigma) == 2 else sigma[0],
        numbers_after("theta", prose, " theta=0")[0],
        kind=kinds.get(name.split("_")[0], "gaussian"),
        beta=numbers_after("beta", prose, " beta=1")[0],
    )


def degradation_ops(case: Case) -> Comparisons:
    """Replays blur kernels, filters, sharpening, JPEG and noise."""
    image, prose = case["image"], case.sidecar["noise"]
    (seed,) = numbers_after("manual_seed", prose)
    (sigma,) = numbers_after("gaussian sigma", prose)
    (scale,) = numbers_after("poisson scale", prose)
    for name, setting in case.sidecar["kernels"].items():
        ours = kernel(name, setting)
        yield Comparison(ours, case[f"kernel_{name}"])
        if f"filter2d_{name}" in case.tensors:
            yield Comparison(blur(image, ours), case[f"filter2d_{name}"])
    yield Comparison(usm_sharpen(image), case["usm"])
    for quality in case.sidecar["jpeg_qualities"]:
        yield Comparison(jpeg(image, quality), case[f"jpeg_{quality}"])
    for name, grey in (("color", False), ("gray", True)):
        generators = (Generator().manual_seed(int(seed)) for _ in range(2))
        noisy = gaussian_noise(image, sigma / 255, generator=next(generators), grey=grey)
        yield Comparison(noisy, case[f"gauss_{name}"])
        noisy = poisson_noise(image, scale, generator=next(generators), grey=grey)
        yield Comparison(noisy, case[f"poisson_{name}"])
