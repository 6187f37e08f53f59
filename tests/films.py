"""Videos of moving waves, and shards of clips made of them."""

from fractions import Fraction

import torch

from star_core.training.dataset import ClipFilter, make_dataset
from star_core.video_io import open_sink


def write_shards(folder):
    """Writes `folder`/films/a.mkv, 4 frames 64x48, and returns the folder of its shards."""
    films, columns = folder / "films", torch.arange(64) / 5
    films.mkdir()
    with open_sink(films / "a.mkv", width=64, height=48, fps=Fraction(25)) as sink:
        for index in range(4):
            sink.write((0.5 + 0.4 * torch.sin(columns + index / 3)).expand(3, 48, 64))
    out = folder / "shards"
    make_dataset(films, out, ClipFilter(length=(3, 4), size=(24, 32), detail=0.0))
    return out
