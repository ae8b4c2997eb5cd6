"""Sums and counts: exact means under any split over micro-batches and ranks, one all-reduce, one order."""

from __future__ import annotations

import math
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor

from megadpo.train.metrics import MetricSums


class PretendGroup:
    """An all-reduce over threads: every rank's tensor is replaced by the sum over the ranks."""

    def __init__(self, num_ranks: int) -> None:
        self.tensors: list[Tensor | None] = [None] * num_ranks
        self.calls = [0] * num_ranks
        self.barrier = threading.Barrier(num_ranks, timeout=10)

    def all_reduce(self, rank: int, tensor: Tensor) -> None:
        self.calls[rank] += 1
        self.tensors[rank] = tensor.clone()
        self.barrier.wait()
        total = torch.stack([t for t in self.tensors if t is not None]).sum(0)
        self.barrier.wait()
        tensor.copy_(total)


def reduce_over_ranks(ranks: list[MetricSums], names: list[str] | None = None) -> PretendGroup:
    group = PretendGroup(len(ranks))
    errors: list[Exception] = []

    def work(rank: int) -> None:
        try:
            ranks[rank].reduce(lambda tensor: group.all_reduce(rank, tensor), names)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(len(ranks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return group


def test_means_divide_the_sum_of_sums_by_the_sum_of_counts() -> None:
    sums = MetricSums()
    sums.add({"loss": (torch.tensor(6.0), 3.0), "accuracy": (torch.tensor(1.0), torch.tensor(1))})
    sums.add({"loss": (torch.tensor(10.0), 1.0)})
    assert sums.means() == {"accuracy": 1.0, "loss": 4.0}


def test_the_order_is_that_of_the_sorted_names() -> None:
    one, other = MetricSums(), MetricSums()
    one.add({"b": (2.0, 20.0), "a": (1.0, 10.0)})
    other.add({"a": (1.0, 10.0)})
    other.add({"b": (2.0, 20.0)})
    assert one.names() == other.names() == ["a", "b"]
    assert one.pack().tolist() == other.pack().tolist() == [1.0, 2.0, 10.0, 20.0]
    assert one.pack(["c", "b", "a"]).tolist() == [1.0, 2.0, 0.0, 10.0, 20.0, 0.0]
    assert one.pack().dtype == torch.float64
    assert list(one.means()) == ["a", "b"]


def test_sums_are_kept_in_fp64() -> None:
    """In fp32, 2^24 + 1 = 2^24: a thousand small micro-batches after a large one would vanish."""
    sums = MetricSums()
    sums.add({"x": (torch.tensor(2.0**24), 1.0)})
    for _ in range(1000):
        sums.add({"x": (torch.tensor(1.0), 0.0)})
    assert sums.means()["x"] == 2.0**24 + 1000


@given(
    items=st.lists(
        st.tuples(st.integers(0, 2), st.floats(-1e3, 1e3), st.integers(0, 5)),
        min_size=1,
        max_size=12,
    )
)
@hypothesis_settings(max_examples=25, deadline=None)
def test_any_split_over_ranks_gives_the_same_means(items: list[tuple[int, float, int]]) -> None:
    whole = MetricSums()
    ranks = [MetricSums() for _ in range(3)]
    for sums in ranks:
        sums.add({"x": (0.0, 0.0)})
    for rank, total, count in items:
        whole.add({"x": (torch.tensor(total, dtype=torch.float64), float(count))})
        ranks[rank].add({"x": (torch.tensor(total, dtype=torch.float64), float(count))})
    group = reduce_over_ranks(ranks)
    assert group.calls == [1, 1, 1]
    for sums in ranks:
        assert sums.means() == pytest.approx(whole.means(), rel=1e-9, abs=1e-9, nan_ok=True)
        assert sums.pack()[len(sums.names()) :].tolist() == whole.pack()[len(whole.names()) :].tolist()  # the counts


def test_a_rank_without_the_loss_joins_by_naming_what_the_others_have() -> None:
    last_stage, first_stage = MetricSums(), MetricSums()
    last_stage.add({"b": (6.0, 2.0), "a": (1.0, 2.0)})
    reduce_over_ranks([last_stage, first_stage], names=["b", "a"])
    assert first_stage.means() == last_stage.means() == {"a": 0.5, "b": 3.0}


def test_ranks_with_other_names_are_noticed() -> None:
    one, other = MetricSums(), MetricSums()
    one.add({"loss": (1.0, 1.0)})
    other.add({"accuracy": (1.0, 1.0)})
    reduce_over_ranks([one, other])
    for sums in (one, other):
        with pytest.raises(RuntimeError, match="collected different metrics"):
            sums.means()


def test_names_left_out_of_a_reduction_are_refused() -> None:
    sums = MetricSums()
    sums.add({"loss": (1.0, 1.0)})
    with pytest.raises(ValueError, match="loss"):
        sums.pack(["accuracy"])


def test_a_count_of_zero_has_no_mean() -> None:
    sums = MetricSums()
    sums.add({"x": (0.0, 0.0)})
    assert math.isnan(sums.means()["x"])
    assert MetricSums().means() == {}


def test_a_tensor_that_is_no_scalar_is_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(2,\)"):
        MetricSums().add({"x": (torch.zeros(2), 2.0)})


def test_sums_carry_no_gradient() -> None:
    sums = MetricSums()
    sums.add({"x": (torch.ones((), requires_grad=True) * 2, 1.0)})
    assert not sums.pack().requires_grad


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_collecting_does_not_wait_for_the_gpu() -> None:
    sums = MetricSums("cuda")
    values: dict[str, tuple[Tensor | float, Tensor | float]] = {
        "a": (torch.ones((), device="cuda"), 2.0),
        "b": (torch.ones((), device="cuda"), torch.ones((), device="cuda")),
    }
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        sums.add(values)
        sums.add(values)
        sums.pack()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert sums.means() == {"a": 0.5, "b": 1.0}
