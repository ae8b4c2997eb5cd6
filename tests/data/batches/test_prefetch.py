"""The background thread: order, depth, exceptions with their traceback, and an end in every case."""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Iterator

import pytest

from megadpo.data.batches.prefetch import Prefetcher


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "megadpo-prefetch"]


def wait_until(condition: object) -> None:
    end = time.monotonic() + 10
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end
        time.sleep(0.01)


class Source:
    """0, 1, 2, ... that notes how far it came and whether it was closed."""

    def __init__(self, stop: int | None = None, fail_at: int | None = None) -> None:
        self.made: list[int] = []
        self.closed = False
        self.items = self._items(stop, fail_at)

    def _items(self, stop: int | None, fail_at: int | None) -> Iterator[int]:
        try:
            number = 0
            while number != stop:
                if number == fail_at:
                    raise KeyError("planted")
                self.made.append(number)
                yield number
                number += 1
        finally:
            self.closed = True


def test_items_come_in_order_and_the_thread_ends() -> None:
    source = Source(stop=50)
    assert list(Prefetcher(source.items, 2)) == list(range(50))
    assert source.closed and not threads()


def test_no_more_than_depth_is_made_ahead() -> None:
    source = Source()
    with Prefetcher(source.items, 2) as ahead:
        assert next(ahead) == 0
        wait_until(lambda: len(source.made) >= 4)  # one taken, two ready, one in hand
        time.sleep(0.3)
        assert len(source.made) == 4
    assert source.closed and not threads()


def test_an_exception_comes_where_its_item_would_have() -> None:
    ahead = Prefetcher(Source(fail_at=3).items, 2)
    assert [next(ahead) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(KeyError, match="planted") as raised:
        next(ahead)
    assert "_items" in "".join(traceback.format_tb(raised.value.__traceback__)), "where it was raised shows"
    assert not threads()
    with pytest.raises(StopIteration):
        next(ahead)


@pytest.mark.parametrize("taken", [0, 1, 5])
def test_closing_early_ends_thread_and_source(taken: int) -> None:
    source = Source()
    ahead = Prefetcher(source.items, 1)
    assert [next(ahead) for _ in range(taken)] == list(range(taken))
    ahead.close()
    ahead.close()
    assert source.closed and not threads()
    with pytest.raises(StopIteration):
        next(ahead)


def test_the_thread_is_no_reason_to_stay() -> None:
    with Prefetcher(Source().items, 1):
        assert [thread.daemon for thread in threads()] == [True]


def test_a_depth_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="depth"):
        Prefetcher(iter([1]), 0)
