"""Batches for training, drawn ahead by worker processes and encoded together."""

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from .objective import Batch, Sample, Samples, TrainConfig, draw_batch, sample_generator

logger = logging.getLogger(__name__)

AHEAD = 2  # batches that each worker draws ahead


class Source(Protocol):
    """Draws what a sample is made of; can be pickled, and needs no device."""

    def draw(self, generator: torch.Generator) -> Any:
        """Returns a random item, the same for the same state of the generator.

        Its `replaced` lists what could not be used, as text.
        """
        ...


@runtime_checkable
class EncodedSamples(Protocol):
    """Samples in two parts: a source, for workers, and an encoder, for the training process."""

    source: Source

    def encode(self, pairs: Sequence[Any], /) -> list[Sample]:
        """Returns the samples of items that the source has drawn."""
        ...


class _Drawn(NamedTuple):
    """A drawn item. state: of its generator afterwards."""

    item: Any
    state: Tensor


class _Drawing:
    """The source as a data set by the numbers of samples; an error is an item like others."""

    def __init__(self, source: Source, seed: int) -> None:
        self.source, self.seed = source, seed

    def __getitem__(self, index: int) -> _Drawn | ValueError:
        generator = sample_generator(self.seed, index)
        try:
            return _Drawn(self.source.draw(generator), generator.get_state())
        except ValueError as error:
            return error


class _Encoded:
    """Samples in the order in which they are asked for; each advances its generator as drawing."""

    def __init__(self, samples: Iterable[Sample], drawn: Iterable[_Drawn]) -> None:
        self.both = zip(samples, drawn, strict=True)

    def sample(self, generator: torch.Generator) -> Sample:
        sample, drawn = next(self.both)
        generator.set_state(drawn.state)
        return sample


class Batches:
    """Iterates over the batches of numbered samples.

    data: samples; only `EncodedSamples` are drawn ahead. parts: the sample numbers of each batch.
    workers: processes that draw, with one thread each; 0 draws when a batch is asked for.
    replaced: how often each item could not be used so far, as text.
    """

    def __init__(
        self, data: Samples, parts: Iterable[range], config: TrainConfig, *, workers: int = 0
    ) -> None:
        self.data, self.parts, self.config, self.workers = data, parts, config, workers
        self.replaced = Counter[str]()

    def __iter__(self) -> Iterator[Batch]:
        data, config = self.data, self.config
        if not isinstance(data, EncodedSamples):
            for part in self.parts:
                yield draw_batch(data, part, config)
            return
        loader = DataLoader(
            _Drawing(data.source, config.seed),  # pyright: ignore[reportArgumentType]
            batch_sampler=self.parts,  # pyright: ignore[reportArgumentType]
            collate_fn=list,
            num_workers=self.workers,
            prefetch_factor=AHEAD if self.workers else None,
            generator=torch.Generator(),  # or it would take numbers from the global one
        )
        for drawn in loader:
            for each in drawn:
                if isinstance(each, ValueError):
                    raise each
                for name in each.item.replaced:
                    if name not in self.replaced:
                        logger.warning("a clip is replaced by another: %s", name)
                    self.replaced[name] += 1
            samples = data.encode([each.item for each in drawn])
            # The numbers do not matter: each sample brings the state of its generator.
            yield draw_batch(_Encoded(samples, drawn), range(len(drawn)), config)
