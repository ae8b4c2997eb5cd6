"""An iterator run ahead of need in one background thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import Generic, TypeVar

Item = TypeVar("Item")

_POLL_S = 0.1  # how soon the thread notices that nobody wants its items any more


class _End:
    """What the thread puts last: how it ended."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error


class Prefetcher(Generic[Item]):
    """The items of `source`, in order, of which up to `depth` are made ahead of need.

    An exception in `source` is raised where its item would have come, with its own traceback. `close`, which the end
    of the items and the `with` statement call, ends the thread and closes the source, even in the middle."""

    def __init__(self, source: Iterator[Item], depth: int) -> None:
        if depth < 1:
            raise ValueError(f"depth must be at least 1, got {depth}")
        self._source = source
        self._ready: queue.Queue[Item | _End] = queue.Queue(maxsize=depth)
        self._stop = threading.Event()
        # A daemon, for a rank that dies must not wait for it
        self._thread = threading.Thread(target=self._run, name="megadpo-prefetch", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Item]:
        return self

    def __next__(self) -> Item:
        if self._stop.is_set():
            raise StopIteration
        item = self._ready.get()
        if isinstance(item, _End):
            self.close()
            if item.error is not None:
                raise item.error
            raise StopIteration
        return item

    def __enter__(self) -> Prefetcher[Item]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the thread. May be called more than once."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        error: BaseException | None = None
        try:
            for item in self._source:
                if not self._put(item):
                    break
        except BaseException as caught:  # all of them: the consumer decides
            error = caught
        finally:
            close = getattr(self._source, "close", None)
            if close is not None:
                close()
            self._put(_End(error))

    def _put(self, item: Item | _End) -> bool:
        """Puts the item unless stopped; whether it did."""
        while not self._stop.is_set():
            try:
                self._ready.put(item, timeout=_POLL_S)
                return True
            except queue.Full:
                continue
        return False
