"""The network's last convolution by least squares, with errors weighed as the decoder shows them.

Training leaves the last layer noisy and mean squared errors in latents count all channels alike.
Given everything before it, the best last layer is the solution of a linear system.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..diffusion.schedule import star_schedule
from ..models.unet import ControlledVideoUNet, hint_prior_velocity
from ..vae import VideoVAE
from .objective import Sample


@torch.no_grad()
def linear_decoder(vae: VideoVAE, samples: Sequence[Sample], *, frames: int = 4) -> Tensor:
    """The convolution over 3x3 latents that comes closest to how a VAE decodes differences.

    Fitted to the difference of each sample's two clips, `frames` of each. Returns its kernel
    (3·factor² c 3 3): pixels of a latent's square, colours outermost.
    """
    rows, columns = [], []
    for hq, lq, _ in samples:
        pair = [z[None, :, :frames].float() for z in (hq, lq)]
        pixels = [vae.decode(z, window=z.shape[2], overlap=0) for z in pair]
        between, shown = pair[1] - pair[0], pixels[1] - pixels[0]
        near = F.unfold(rearrange(between, "1 c f h w -> f c h w"), 3, padding=1)
        rows.append(rearrange(near, "f k n -> (f n) k"))
        p = vae.factor
        columns.append(rearrange(shown, "1 c f (h p) (w q) -> (f h w) (c p q)", p=p, q=p))
    inputs, outputs = torch.cat(rows).double(), torch.cat(columns).double()
    kernel = torch.linalg.lstsq(inputs, outputs).solution.T
    return rearrange(kernel.float(), "o (c y x) -> o c y x", y=3, x=3)


class Features(NamedTuple):
    """What the last convolution sees of a clip (f c h w), what it should say, and its weight."""

    seen: Tensor
    wanted: Tensor
    weight: float


@torch.no_grad()
def features(
    network: ControlledVideoUNet, y: Tensor, sample: Sample, noise: Tensor, decoder: Tensor, t: int
) -> Features:
    """Of one sample at timestep t. Clips weigh by what their hints leave to do, timesteps alike."""
    seen: list[Tensor] = []
    hook = network.out[-1].register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    hq, lq = sample.hq[None].float(), sample.lq[None].float()
    schedule, steps, spread = star_schedule(), torch.tensor([t]), network.config.hint_prior
    x_t = schedule.add_noise(hq, noise[None], steps)
    try:
        network(x_t, steps, y, lq)
    finally:
        hook.remove()
    prior, uncertainty = torch.zeros_like(x_t), torch.ones(())
    if spread:
        prior, uncertainty = hint_prior_velocity(x_t, steps, lq, spread)
    wanted = (schedule.x_0(x_t, prior, steps) - hq) / (schedule.sigma(steps) * uncertainty)
    left = F.conv2d(rearrange(lq - hq, "1 c f h w -> f c h w"), decoder, padding=1)
    weight = (spread or 1) ** 2 / (left.square().mean().item() + 2e-4)
    return Features(torch.cat(seen), rearrange(wanted, "1 c f h w -> f c h w"), weight)


def fit_last_layer(
    network: ControlledVideoUNet,
    clips: Sequence[Features],
    decoder: Tensor,
    *,
    iterations: int = 90,
    pull: float = 5e-4,
) -> None:
    """Minimises the weighted squared error in decoded pixels, in place, by conjugate gradients.

    pull: how strongly the layer is held to what it was.
    """
    layer = network.out[-1]
    assert isinstance(layer, nn.Conv2d) and layer.bias is not None
    start = torch.cat([layer.weight.detach().flatten(1), layer.bias.detach()[:, None]], dim=1)

    def gradient(change: Tensor) -> Tensor:
        with torch.enable_grad():
            both = (start + change).requires_grad_(True)
            weight, bias = both[:, :-1].view_as(layer.weight), both[:, -1]
            for seen, wanted, share in clips:
                said = F.conv2d(seen.float(), weight, bias, padding=1)
                error = F.conv2d(said - wanted.float(), decoder, padding=1)
                (error.square().mean() * share / len(clips)).backward(retain_graph=True)
        assert both.grad is not None
        return both.grad + pull * change

    change = torch.zeros_like(start)
    first = gradient(change)
    rest = direction = -first
    size = rest.square().sum()
    for _ in range(iterations):
        if not size:
            break
        bent = gradient(direction) - first
        step = size / (direction * bent).sum()
        change, rest = change + step * direction, rest - step * bent
        new = rest.square().sum()
        direction, size = rest + new / size * direction, new
    with torch.no_grad():
        found = start + change
        layer.weight.copy_(found[:, :-1].view_as(layer.weight))
        layer.bias.copy_(found[:, -1])
