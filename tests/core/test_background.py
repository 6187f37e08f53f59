"""Work in threads: order, how far ahead, errors, and that threads end."""

import threading
import time

import pytest

from star_core.background import ahead, behind


def soon(condition) -> bool:
    """Waits until a condition holds, for at most a minute."""
    end = time.monotonic() + 60
    while not condition() and time.monotonic() < end:
        time.sleep(0.001)
    return condition()


def test_items_arrive_in_order_and_a_thread_gets_two_ahead():
    got, threads = [], set()

    def items():
        for i in range(6):
            threads.add(threading.current_thread())
            got.append(i)
            yield i

    coming = ahead(items())
    assert not got  # nothing happens before the first is asked for
    assert next(coming) == 0 and soon(lambda: got == [0, 1, 2])
    time.sleep(0.02)
    assert got == [0, 1, 2]
    assert list(coming) == [1, 2, 3, 4, 5] and threading.current_thread() not in threads
    assert list(ahead([])) == [] and list(ahead([7], 1)) == [7]


def test_an_error_arises_where_its_item_would_have_been_used():
    def items():
        yield 1
        raise ValueError("the file is cut off")

    coming = ahead(items())
    assert next(coming) == 1
    with pytest.raises(ValueError, match="cut off"):
        next(coming)


def test_closing_ends_the_thread_and_closes_the_items_in_it():
    before, closed_in = threading.active_count(), []

    def items():
        try:
            while True:
                yield 1
        finally:
            closed_in.append(threading.current_thread())

    coming = ahead(items())
    next(coming)
    coming.close()
    assert threading.active_count() == before
    assert closed_in and closed_in[0] is not threading.current_thread()


def test_results_are_taken_in_order_in_a_thread_until_all_are():
    taken = []
    with behind(lambda i: (time.sleep(0.002), taken.append((i, threading.current_thread())))) as do:
        for i in range(5):
            do(i)
    assert [i for i, _ in taken] == list(range(5))
    assert threading.current_thread() not in {thread for _, thread in taken}


def test_no_more_than_two_results_wait():
    go, begun = threading.Event(), []
    with behind(lambda i: (begun.append(i), go.wait(5))) as do:
        do(0), do(1)
        third = threading.Thread(target=do, args=(2,))
        third.start()
        third.join(0.05)
        assert third.is_alive() and begun == [0]
        go.set()
        third.join(5)
    assert begun == [0, 1, 2]


def test_an_error_of_the_thread_ends_the_block_and_the_rest_is_left_out():
    taken = []

    def take(i: int) -> None:
        if i == 1:
            raise ValueError("the disk is full")
        taken.append(i)

    with pytest.raises(ValueError, match="disk is full"), behind(take) as do:
        for i in range(50):
            do(i)
    assert taken[0] == 0 and len(taken) < 10


def test_an_error_in_the_block_does_not_wait_for_results_that_have_not_begun():
    go, taken = threading.Event(), []

    def take(i: int) -> None:
        go.wait(5)
        taken.append(i)

    with pytest.raises(KeyboardInterrupt), behind(take, 5) as do:
        for i in range(4):
            do(i)
        threading.Timer(0.05, go.set).start()
        raise KeyboardInterrupt
    assert taken == [0]
