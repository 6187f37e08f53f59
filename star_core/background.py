"""Work in a thread beside the device: items that are got ahead, and results that are taken later.

The order is that of the items, and an error arises where its item would have been used.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")
_END = object()


def ahead(items: Iterable[T], count: int = 2) -> Generator[T, None, None]:
    """Yields items that a thread gets up to `count` ahead of their use.

    Closing the iterator ends the thread, after the item that it is getting, and closes `items` if
    they are a generator.
    """
    iterator = iter(items)
    with ThreadPoolExecutor(1) as thread:
        coming = deque(thread.submit(next, iterator, _END) for _ in range(count))
        try:
            while (item := coming.popleft().result()) is not _END:
                coming.append(thread.submit(next, iterator, _END))
                yield item  # pyright: ignore[reportReturnType]
        finally:
            for future in coming:
                future.cancel()
            # In the thread that has run it: PyAV's decoders belong to theirs.
            thread.submit(getattr(iterator, "close", lambda: None)).result()


@contextmanager
def behind(fn: Callable[[T], object], count: int = 2) -> Iterator[Callable[[T], None]]:
    """Gives a function that calls `fn` in a thread, and waits only for items `count` ago.

    Leaving the block waits for the rest. After an error, of `fn` or of the block, what has not
    begun is left out.
    """
    with ThreadPoolExecutor(1) as thread:
        pending: deque[Future[object]] = deque()

        def call(item: T) -> None:
            pending.append(thread.submit(fn, item))
            while len(pending) > count or pending and pending[0].done():
                pending.popleft().result()

        try:
            yield call
            while pending:
                pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
