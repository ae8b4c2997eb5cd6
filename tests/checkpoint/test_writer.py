"""The threads that write a checkpoint's files, and the copies that they write."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megadpo.checkpoint import writer
from megadpo.checkpoint.writer import HostCopies, RankFiles
from megadpo.parallel.lifetime import STOP_SIGNALS


class Calling:
    """In place of a bucket's data: calls a function in the thread that writes it."""

    def __init__(self, function: Callable[[], object]) -> None:
        self.function = function

    def __iter__(self) -> Iterator[Any]:
        self.function()
        return iter(())


def write(folder, *functions: Callable[[], object]) -> Any:
    buckets = [(folder / f"{n}.distcp", f"{n}.distcp", (Calling(f), [])) for n, f in enumerate(functions)]
    return RankFiles(SimpleNamespace(), None, buckets).write()


def nothing() -> None:
    pass


def full_disk() -> None:
    raise OSError(28, "No space left on device")


def test_signals_stop_no_writer(tmp_path):
    """They come to the rank's main thread, which notes them."""
    noted = []
    before = {number: signal.signal(number, lambda number, frame: noted.append(number)) for number in STOP_SIGNALS}
    try:
        assert write(tmp_path, *(lambda n=n: signal.raise_signal(n) for n in STOP_SIGNALS)) == []
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert sorted(noted) == sorted(STOP_SIGNALS)


def test_a_writer_that_fails_is_an_error(tmp_path, monkeypatch):
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path, nothing, full_disk)

    def cannot(path) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(writer, "sync", cannot)
    with pytest.raises(OSError, match="Input/output"):  # what is not on the disk is not written
        write(tmp_path, nothing)
    monkeypatch.setattr(writer.FileSystemWriterAsync, "write_preloaded_data", lambda *_, **__: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        write(tmp_path, nothing)


def test_copies_are_apart_and_their_memory_is_used_again():
    copies = HostCopies()
    tensors = [torch.arange(6.0).reshape(2, 3), torch.ones(4, dtype=torch.bfloat16), torch.tensor(3)]
    tensors[0].requires_grad_()
    first = copies.of(tensors)
    assert not first[0].requires_grad
    tensors[0].requires_grad_(False)
    for tensor in tensors:
        tensor += 1
    assert [one.tolist() for one in first] == [[[0, 1, 2], [3, 4, 5]], [1] * 4, 3]
    second = copies.of(tensors)
    assert [one.data_ptr() for one in second] == [one.data_ptr() for one in first]
    assert all(torch.equal(one, tensor) for one, tensor in zip(second, tensors, strict=True)), (
        "later saves, later weights"
    )
    other = copies.of([torch.zeros(2, 3), torch.zeros(5)])
    assert other[0].data_ptr() == first[0].data_ptr() and other[1].shape == (5,)
