"""The noise of a run: for the VAE's posterior, for the start, and for a stochastic solver.

All noise is made on the CPU in float32, so that a seed gives the same result on every device. The
two classes have the same methods. Call `posterior` for each frame in order, then `initial`.
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
    """Noise that depends only on the seed, its purpose, the solver's step and the frame's index.

    Windows, tiles and the length of the clip do not change it, and part of a clip gets the noise
    that it would get within the whole clip.

    seed: from 0 to 2^64 - 1; ValueError otherwise.
    canvas, origin: for a crop, the (h, w) of the full latents and the (y, x) of the crop in them,
    so that it gets the noise of that part of the full frame. Beyond the edges of the canvas (in the
    padding) the noise repeats from the opposite edge.
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
        """Returns the noise of one frame's posterior. frame: index in the clip. shape: b c h w."""
        return self._frame("posterior", 0, frame, shape)

    def initial(self, shape: tuple[int, ...], frame_offset: int = 0) -> Tensor:
        """Returns the noise that sampling starts from.

        shape: b c f h w. frame_offset: index in the clip of the first of the f frames.
        """
        return self._frames("initial", 0, shape, frame_offset)

    def solver(self, shape: tuple[int, ...], sigmas: Tensor, frame_offset: int = 0) -> SolverNoise:
        """Returns the noise source of a solver, (step, sigma, sigma_next) -> noise of `shape`.

        shape: b c f h w. sigmas: noise levels of the solver, unused here. frame_offset: index in
        the clip of the first of the f frames.
        """
        return lambda step, sigma, sigma_next: self._frames("solver", step, shape, frame_offset)


class ReferenceNoise:
    """Noise in the reference's order: one generator, and a Brownian tree seeded from it.

    Frame indices have no effect; the noise depends on everything drawn before.
    seed: from 0 to 2^64 - 1; ValueError otherwise.
    frame_major: True fills latents frame by frame, the memory order of the reference's latents;
        False is for latents (b c f h w) that do not come from its VAE.
    """

    def __init__(self, seed: int, *, frame_major: bool = True):
        self.generator = Generator().manual_seed(_checked(seed))
        self.frame_major = frame_major

    def posterior(self, frame: int, shape: tuple[int, ...]) -> Tensor:
        """Draws the noise of the next frame's posterior. frame: ignored. shape: b c h w."""
        return torch.randn(shape, generator=self.generator)

    def initial(self, shape: tuple[int, ...], frame_offset: int = 0) -> Tensor:
        """Draws the noise that sampling starts from. shape: b c f h w. frame_offset: ignored."""
        if not self.frame_major:
            return torch.randn(shape, generator=self.generator)
        b, c, f, h, w = shape
        # torch fills transposed memory by a different algorithm than randn, so the result of
        # transposing randn would differ
        return torch.empty(b, f, c, h, w).transpose(1, 2).normal_(generator=self.generator)

    def solver(self, shape: tuple[int, ...], sigmas: Tensor, frame_offset: int = 0) -> SolverNoise:
        """Returns the noise source of a solver, see `brownian_noise`, seeded from the generator.

        shape: b c f h w. sigmas: noise levels of the solver. frame_offset: ignored.
        """
        entropy = torch.randint(0, 2**63 - 1, [], generator=self.generator)
        return brownian_noise(shape, sigmas, int(entropy))


def brownian_noise(shape: tuple[int, ...], sigmas: Tensor, seed: int) -> SolverNoise:
    """Returns a noise source, (step, sigma, sigma_next) -> noise, from one Brownian path.

    The noise is the path's increment between two noise levels, scaled to unit variance. The path
    (Li et al. 2020, arXiv:2001.01328) spans the positive finite levels among sigmas.
    shape: of the noise. sigmas: all noise levels of the run.
    """
    from torchsde import BrownianTree

    levels = sigmas[(sigmas > 0) & sigmas.isfinite()]
    # the tree rounds its ends to its tolerance and warns about levels outside of them
    start, end = round(levels.min().item(), 6), round(levels.max().item(), 6)
    tree = BrownianTree(start, torch.zeros(shape), end, entropy=seed, tol=1e-6)

    def increment(step: int, sigma: Tensor, sigma_next: Tensor) -> Tensor:
        below, above = max(start, sigma_next.item()), min(end, sigma.item())
        path_increment = tree(below, above)
        assert isinstance(path_increment, Tensor)
        return -path_increment / (sigma - sigma_next).sqrt().cpu()

    return increment
