"""The noise of a run: of the VAE's posterior, of the start, and of a stochastic solver.

All on the CPU in float32, so that a seed gives the same result on every device. The two classes
have the same methods; `posterior` and `initial` are to be called in that order, frame by frame.
"""

import hashlib

import torch
from torch import Generator, Tensor

from .samplers import SolverNoise


def _checked(seed: int) -> int:
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed must be from 0 to 2^64-1, got {seed}")
    return seed


class FrameNoise:
    """Noise that belongs to the frame: a function of seed, purpose, step and frame index alone.

    So windows, tiles, clip length and what else is in the run do not change it, and a cut of a clip
    gets the noise that the whole clip would get there.

    canvas, origin: (h, w) of the full latents and the (y, x) at which the latents of this run lie
    in them, for a crop that is to show what the full picture will show. Beyond the edge of the
    canvas (padding) the noise repeats from the other side.
    """

    def __init__(
        self,
        seed: int,
        *,
        canvas: tuple[int, int] | None = None,
        origin: tuple[int, int] = (0, 0),
    ):
        self.seed = _checked(seed)
        self.canvas = canvas
        self.origin = origin

    def _frame(self, purpose: str, step: int, frame: int, shape: tuple[int, ...]) -> Tensor:
        key = f"{self.seed} {purpose} {step} {frame}".encode()
        digest = hashlib.blake2b(key, digest_size=8).digest()
        generator = Generator().manual_seed(int.from_bytes(digest, "little"))
        if self.canvas is None:
            return torch.randn(shape, generator=generator)
        *lead, h, w = shape
        full = torch.randn(*lead, *self.canvas, generator=generator)
        rows = (torch.arange(h) + self.origin[0]) % self.canvas[0]
        columns = (torch.arange(w) + self.origin[1]) % self.canvas[1]
        return full[..., rows[:, None], columns]

    def _frames(self, purpose: str, step: int, shape: tuple[int, ...], offset: int) -> Tensor:
        b, c, f, h, w = shape
        frames = [self._frame(purpose, step, offset + i, (b, c, h, w)) for i in range(f)]
        return torch.stack(frames, dim=2)

    def posterior(self, frame: int, shape: tuple[int, ...]) -> Tensor:
        """For the posterior of one frame with its index in the clip; shape (b c h w)."""
        return self._frame("posterior", 0, frame, shape)

    def initial(self, shape: tuple[int, ...], frame_offset: int = 0) -> Tensor:
        """For the start of sampling; shape (b c f h w), whose first frame is frame_offset."""
        return self._frames("initial", 0, shape, frame_offset)

    def solver(self, shape: tuple[int, ...], sigmas: Tensor, frame_offset: int = 0) -> SolverNoise:
        """For a solver with these noise levels; arguments else as in `initial`."""
        return lambda step, sigma, sigma_next: self._frames("solver", step, shape, frame_offset)


class ReferenceNoise:
    """Noise in the reference's order: one generator, and a Brownian tree seeded from it.

    Frame indices have no effect: what is drawn depends on all that was drawn before.
    frame_major: the reference's latents lie frame by frame in memory and are filled in that order;
        False is for latents (b c f h w) that do not come from its VAE.
    """

    def __init__(self, seed: int, *, frame_major: bool = True):
        self.generator = Generator().manual_seed(_checked(seed))
        self.frame_major = frame_major

    def posterior(self, frame: int, shape: tuple[int, ...]) -> Tensor:
        """As `FrameNoise.posterior`."""
        return torch.randn(shape, generator=self.generator)

    def initial(self, shape: tuple[int, ...], frame_offset: int = 0) -> Tensor:
        """As `FrameNoise.initial`."""
        if not self.frame_major:
            return torch.randn(shape, generator=self.generator)
        b, c, f, h, w = shape
        # torch fills transposed memory by another algorithm, so randn and transposing won't do
        return torch.empty(b, f, c, h, w).transpose(1, 2).normal_(generator=self.generator)

    def solver(self, shape: tuple[int, ...], sigmas: Tensor, frame_offset: int = 0) -> SolverNoise:
        """As `FrameNoise.solver`, from `brownian_noise`."""
        entropy = torch.randint(0, 2**63 - 1, [], generator=self.generator)
        return brownian_noise(shape, sigmas, int(entropy))


def brownian_noise(shape: tuple[int, ...], sigmas: Tensor, seed: int) -> SolverNoise:
    """Increments of one Brownian path over the noise levels, scaled to unit variance.

    The path (Li et al. 2020, arXiv:2001.01328) spans the positive finite levels among sigmas.
    """
    from torchsde import BrownianTree

    levels = sigmas[(sigmas > 0) & sigmas.isfinite()]
    # the tree rounds its ends to its tolerance and warns of levels that lie outside by less
    start, end = round(levels.min().item(), 6), round(levels.max().item(), 6)
    tree = BrownianTree(start, torch.zeros(shape), end, entropy=seed, tol=1e-6)

    def increment(step: int, sigma: Tensor, sigma_next: Tensor) -> Tensor:
        below, above = max(start, sigma_next.item()), min(end, sigma.item())
        step_of_path = tree(below, above)
        assert isinstance(step_of_path, Tensor)
        return -step_of_path / (sigma - sigma_next).sqrt().cpu()

    return increment
