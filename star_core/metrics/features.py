"""The networks whose features perceptual metrics compare: AlexNet and VGG16 without classifiers."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

Pool = Callable[[Tensor], Tensor]


class AlexNet(nn.Module):
    """AlexNet of five convolutions, the variant of Krizhevsky 2014 ("One weird trick").

    channels: of the maps that `forward` returns.
    """

    channels = (64, 192, 384, 256, 256)

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            (
                nn.Conv2d(3, 64, 11, stride=4, padding=2),
                nn.Conv2d(64, 192, 5, padding=2),
                nn.Conv2d(192, 384, 3, padding=1),
                nn.Conv2d(384, 256, 3, padding=1),
                nn.Conv2d(256, 256, 3, padding=1),
            )
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        """Returns the five activations of normalised pictures (b 3 h w), sides of at least 31."""
        maps = []
        for number, conv in enumerate(self.convs):
            if number in (1, 2):
                x = F.max_pool2d(x, 3, stride=2)
            x = F.relu(conv(x))
            maps.append(x)
        return maps


class VGG16(nn.Module):
    """VGG16 of thirteen convolutions in five blocks (Simonyan and Zisserman 2015, configuration D).

    pool: halves the sides between blocks; None for VGG's own, the maximum of 2x2. channels: of the
    maps that `forward` returns.
    """

    channels = (64, 128, 256, 512, 512)
    blocks = (2, 2, 3, 3, 3)  # convolutions in each

    def __init__(self, pool: Pool | None = None) -> None:
        super().__init__()
        self.pool = pool or nn.MaxPool2d(2)
        widths = [
            w for w, count in zip(self.channels, self.blocks, strict=True) for _ in range(count)
        ]
        self.convs = nn.ModuleList(
            nn.Conv2d(before, after, 3, padding=1)
            for before, after in zip([3, *widths], widths, strict=False)
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        """Returns each block's last activation for normalised pictures (b 3 h w), sides from 16."""
        maps = []
        convs = iter(self.convs)
        for number, count in enumerate(self.blocks):
            if number:
                x = self.pool(x)
            for _ in range(count):
                x = F.relu(next(convs)(x))
            maps.append(x)
        return maps
