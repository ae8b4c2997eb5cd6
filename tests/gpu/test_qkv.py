"""The kernel from projection to attention on a GPU, compiled: the interpreter's bounds (tests/model/test_qkv.py), half of them in
bfloat16, which a GPU rounds to the nearest; and no waits."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.model.qkv_worker import Case, compare
from tests.model.test_qkv import BOUNDS, CASES

pytestmark = pytest.mark.gpu
LLAMA_8B = Case(groups=8, heads=32, width=128, dims=128, dtype="bfloat16")


@pytest.mark.parametrize("case", [*CASES, LLAMA_8B])
def test_it_equals_the_passes_that_it_replaces(case):
    errors = compare(dataclasses.replace(case, device="cuda"))
    assert max(errors.values()) < BOUNDS[case.dtype] / (2 if case.dtype == "bfloat16" else 1), errors


def test_no_wait_for_the_device():
    from megadpo.model.kernels import RaggedPlan
    from megadpo.model.qkv import split_and_turn

    index = torch.tensor([0, 1, 0, 1, 2], device="cuda")
    mixed = torch.randn(3, 4 * 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    cos = sin = torch.ones(3, 32, device="cuda")

    def once() -> None:
        plan = RaggedPlan(index, index, 3, 3, key_tokens=5, key_index=index, query_tokens=3)
        parts = split_and_turn(mixed, cos, sin, plan, groups=1, width=64)
        torch.autograd.grad(parts, mixed, [torch.ones_like(part) for part in parts])

    once()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        once()
    finally:
        torch.cuda.set_sync_debug_mode("default")
