"""RAFT, optical flow by a recurrent network (Teed and Deng 2020), the large one.

Attribute names are the keys of torchvision's files.
"""

from collections import OrderedDict
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..checkpoints.tensors import open_tensors
from .weights import find_weights

LEVELS, RADIUS = 4, 4
UPDATES = 12


class RAFT(nn.Module):
    """The network: pictures (b 3 h w) in [-1, 1] -> flow (b 2 h w); sides 8n of at least 128."""

    def __init__(self) -> None:
        super().__init__()
        self.feature_encoder = _Encoder(nn.InstanceNorm2d)
        self.context_encoder = _Encoder(nn.BatchNorm2d)
        self.update_block = _Update()
        self.mask_predictor = nn.Sequential(
            OrderedDict(
                convrelu=_convolution(128, 256, 3, activation=True),
                conv=nn.Conv2d(256, 8 * 8 * 9, 1),
            )
        )

    def forward(self, picture: Tensor, target: Tensor) -> Tensor:
        """Returns the displacements, x then y, in pixels, from `picture` to `target`."""
        pyramid = _correlations(*self.feature_encoder(torch.cat((picture, target))).chunk(2))
        hidden, context = self.context_encoder(picture).chunk(2, dim=1)
        hidden, context = hidden.tanh(), context.relu()
        b, _, h, w = hidden.shape
        y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
        positions = torch.stack((x, y)).to(hidden).expand(b, 2, h, w)
        flow = torch.zeros_like(positions)
        for _ in range(UPDATES):
            correlations = _look_up(pyramid, positions + flow)
            hidden, step = self.update_block(hidden, context, correlations, flow)
            flow = flow + step
        return _upsampled(flow, 0.25 * self.mask_predictor(hidden))


def _convolution(
    before: int, after: int, size: int, stride: int = 1, *, norm=None, activation: bool
) -> nn.Sequential:
    parts: list[nn.Module] = [nn.Conv2d(before, after, size, stride, padding=size // 2)]
    if norm is not None:
        parts.append(norm(after))
    if activation:
        parts.append(nn.ReLU())
    return nn.Sequential(*parts)


class _Encoder(nn.Module):
    """Encodes pictures: (b 3 h w) -> (b 256 h/8 w/8)."""

    def __init__(self, norm) -> None:
        super().__init__()
        self.convnormrelu = _convolution(3, 64, 7, 2, norm=norm, activation=True)
        self.layer1 = nn.Sequential(_Residual(64, 64, 1, norm), _Residual(64, 64, 1, norm))
        self.layer2 = nn.Sequential(_Residual(64, 96, 2, norm), _Residual(96, 96, 1, norm))
        self.layer3 = nn.Sequential(_Residual(96, 128, 2, norm), _Residual(128, 128, 1, norm))
        self.conv = nn.Conv2d(128, 256, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.layer3(self.layer2(self.layer1(self.convnormrelu(x)))))


class _Residual(nn.Module):
    def __init__(self, before: int, after: int, stride: int, norm) -> None:
        super().__init__()
        self.convnormrelu1 = _convolution(before, after, 3, stride, norm=norm, activation=True)
        self.convnormrelu2 = _convolution(after, after, 3, norm=norm, activation=True)
        self.downsample = nn.Identity()
        if stride > 1:
            self.downsample = _convolution(before, after, 1, stride, norm=norm, activation=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.downsample(x) + self.convnormrelu2(self.convnormrelu1(x)))


class _Update(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.motion_encoder = _MotionEncoder()
        self.recurrent_block = nn.ModuleDict({"convgru1": _GRU((1, 5)), "convgru2": _GRU((5, 1))})
        self.flow_head = nn.Sequential(
            OrderedDict(
                conv1=nn.Conv2d(128, 256, 3, padding=1),
                relu=nn.ReLU(),
                conv2=nn.Conv2d(256, 2, 3, padding=1),
            )
        )

    def forward(
        self, hidden: Tensor, context: Tensor, correlations: Tensor, flow: Tensor
    ) -> tuple[Tensor, Tensor]:
        x = torch.cat((context, self.motion_encoder(correlations, flow)), dim=1)
        for gru in self.recurrent_block.values():
            hidden = gru(hidden, x)
        return hidden, self.flow_head(hidden)


class _MotionEncoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convcorr1 = _convolution(LEVELS * (2 * RADIUS + 1) ** 2, 256, 1, activation=True)
        self.convcorr2 = _convolution(256, 192, 3, activation=True)
        self.convflow1 = _convolution(2, 128, 7, activation=True)
        self.convflow2 = _convolution(128, 64, 3, activation=True)
        self.conv = _convolution(192 + 64, 128 - 2, 3, activation=True)

    def forward(self, correlations: Tensor, flow: Tensor) -> Tensor:
        correlation_features = self.convcorr2(self.convcorr1(correlations))
        flow_features = self.convflow2(self.convflow1(flow))
        features = torch.cat((correlation_features, flow_features), dim=1)
        return torch.cat((self.conv(features), flow), dim=1)


class _GRU(nn.Module):
    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        padding = (size[0] // 2, size[1] // 2)
        self.convz = nn.Conv2d(128 + 256, 128, size, padding=padding)
        self.convr = nn.Conv2d(128 + 256, 128, size, padding=padding)
        self.convq = nn.Conv2d(128 + 256, 128, size, padding=padding)

    def forward(self, hidden: Tensor, x: Tensor) -> Tensor:
        both = torch.cat((hidden, x), dim=1)
        update, reset = self.convz(both).sigmoid(), self.convr(both).sigmoid()
        new = self.convq(torch.cat((reset * hidden, x), dim=1)).tanh()
        return (1 - update) * hidden + update * new


def _correlations(features: Tensor, target: Tensor) -> list[Tensor]:
    """Returns the correlations (bhw 1 h' w') of all pairs of pixels, at four resolutions."""
    d, h = features.shape[1:3]
    volume = torch.einsum("b d n, b d m -> b n m", features.flatten(2), target.flatten(2)) / d**0.5
    pyramid = [rearrange(volume, "b n (h w) -> (b n) 1 h w", h=h)]
    for _ in range(LEVELS - 1):
        pyramid.append(F.avg_pool2d(pyramid[-1], 2))
    return pyramid


def _look_up(pyramid: list[Tensor], positions: Tensor) -> Tensor:
    """Returns correlations (b 324 h w) within RADIUS of positions (b 2 h w) at all levels."""
    b, _, h, w = positions.shape
    line = torch.arange(-RADIUS, RADIUS + 1, dtype=positions.dtype, device=positions.device)
    # The horizontal index varies slowest, as the published weights expect.
    offsets = torch.stack(torch.meshgrid(line, line, indexing="ij"), dim=-1)
    centres = rearrange(positions, "b c h w -> (b h w) 1 1 c")
    levels = []
    for level, volume in enumerate(pyramid):
        sides = torch.tensor(volume.shape[:-3:-1], dtype=positions.dtype, device=positions.device)
        grid = 2 * (centres / 2**level + offsets) / (sides - 1) - 1
        sampled = F.grid_sample(volume, grid, align_corners=True)
        levels.append(rearrange(sampled, "(b h w) 1 y x -> b (y x) h w", b=b, h=h, w=w))
    return torch.cat(levels, dim=1)


def _upsampled(flow: Tensor, mask: Tensor) -> Tensor:
    """Enlarges flow by 8: each pixel is a mean of its 3x3 neighbours, weighted by `mask`."""
    h, w = flow.shape[-2:]
    weights = rearrange(mask, "b (k y x) h w -> b 1 k y x h w", k=9, y=8, x=8).softmax(dim=2)
    neighbours = F.unfold(8 * flow, 3, padding=1)
    neighbours = rearrange(neighbours, "b (c k) (h w) -> b c k 1 1 h w", c=2, h=h, w=w)
    return rearrange((weights * neighbours).sum(dim=2), "b c y x h w -> b c (h y) (w x)")


class RAFTFlow:
    """A `motion.Flow` by RAFT, for frames of any size; device: that of the network."""

    def __init__(self, network: RAFT, device: torch.device | str) -> None:
        self.network, self.device = network, device

    @torch.inference_mode()
    def __call__(self, frame: Tensor, target: Tensor) -> Tensor:
        """Returns the displacements (2 h w) in pixels between frames (c h w) in [0, 1]."""
        h, w = frame.shape[-2:]
        margin = (0, max(128, -(-w // 8) * 8) - w, 0, max(128, -(-h // 8) * 8) - h)
        pictures = (
            F.pad(p[None, :3].to(self.device) * 2 - 1, margin, mode="replicate")
            for p in (frame, target)
        )
        return self.network(*pictures)[0, :, :h, :w].to(frame)


def load_raft(*, folder: Path | str | None = None, device: torch.device | str = "cpu") -> RAFTFlow:
    """Loads RAFT with its authors' weights, as torchvision publishes them.

    folder: of the weights, None for `weights.default_folder()`. Raises ValueError if they are
    missing or do not fit.
    """
    path = find_weights("raft", folder)
    network, weights = RAFT(), dict(open_tensors(path))
    expected = network.state_dict()
    wrong = expected.keys() ^ weights.keys()
    wrong |= {k for k in expected.keys() & weights.keys() if expected[k].shape != weights[k].shape}
    if wrong:
        raise ValueError(f"{path} is not RAFT: {min(wrong)} does not fit")
    network.load_state_dict(weights)
    return RAFTFlow(network.requires_grad_(False).eval().to(device), device)
