"""An adapter cut over two ranks: outputs, gradients of the input and of A and B are those of one rank, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megadpo.config.schema_peft import PeftConfig
from megadpo.lora.targets import Target, find_targets
from tests.helpers.distributed import run_distributed
from tests.lora.test_targets import LLAMA, QWEN2_MOE

TOKENS, RANKS = 6, 2
CASES: dict[str, tuple[Any, dict[str, Any], bool]] = {
    "fused qkv": (LLAMA, {"target_modules": ("linear_qkv",)}, False),
    "q, k, v": (LLAMA, {"target_modules": ("q_proj", "k_proj", "v_proj")}, False),
    "q and v of qkv": (LLAMA, {"target_modules": ("q_proj", "v_proj")}, True),
    "fused qkv, sequence": (LLAMA, {"target_modules": ("linear_qkv",)}, True),
    "gate and up, sequence": (LLAMA, {"target_modules": ("gate_proj", "up_proj")}, True),
    "up alone": (LLAMA, {"target_modules": ("up_proj",), "use_rslora": True}, False),
    "row": (LLAMA, {"target_modules": ("linear_proj",)}, False),
    "row, sequence": (LLAMA, {"target_modules": ("down_proj",)}, True),
    "expert column": (QWEN2_MOE, {"target_modules": ("local_experts.1.linear_fc1",)}, False),
    "expert row": (QWEN2_MOE, {"target_modules": ("experts.1.down_proj",)}, False),
}


def errors() -> dict[str, dict[str, float]]:
    """Target for run_distributed: {case: {what: largest difference to the same on one rank}}."""
    from megadpo.config.grid import Grid
    from megadpo.parallel import initialize, setup_device

    parallel = initialize(Grid(tensor=RANKS), setup_device("auto"))
    return {name: _errors(*case, parallel.tp_group, parallel.grid.tp_rank) for name, case in CASES.items()}


def _errors(arch: Any, peft: dict[str, Any], sequence: bool, group: Any, rank: int) -> dict[str, float]:
    from megadpo.lora.adapter import LinearAdapter, LinearCut
    from megadpo.lora.attach import load_a, load_b

    config = PeftConfig(enabled=True, dim=3, alpha=5.0, **peft)
    target = find_targets(config, arch)[0]
    expert, row = target.entry.expert is not None, target.is_row_parallel
    like = {"dtype": torch.float64, "device": torch.device("cpu")}
    whole = LinearAdapter(target, config, LinearCut(group, 0, 1, False), **like)
    mine = LinearAdapter(target, config, LinearCut(group, rank, RANKS, sequence), **like)
    torch.manual_seed(3)
    for shared in target.adapters:
        a = torch.randn(3, target.in_features, dtype=torch.float64)
        load_a(whole, shared, a), load_a(mine, shared, a)
        for module in shared:
            b = torch.randn(target.out_features(module), 3, dtype=torch.float64)
            load_b(whole, module, b), load_b(mine, module, b)
    x = torch.randn(TOKENS, target.in_features, dtype=torch.float64)
    d_y = torch.randn(TOKENS, sum(rows for _, rows in whole.pieces), dtype=torch.float64)

    want_x = x.clone().requires_grad_()
    want_y = whole(want_x)
    want_y.backward(d_y)
    rows = _rows(target, whole, mine, rank)
    tokens = slice(rank * TOKENS // RANKS, (rank + 1) * TOKENS // RANKS) if sequence else slice(None)
    columns = torch.arange(target.in_features).chunk(RANKS)[rank] if row else slice(None)
    got_x = (x[tokens] if not row else x)[:, columns].clone().requires_grad_()
    got_y = mine(got_x)
    got_y.backward(d_y[tokens] if row else d_y[:, rows])

    found = {}
    parts = {"y": (got_y, want_y[tokens] if row else want_y[:, rows]), "dx": (got_x.grad, want_x.grad)}
    if expert:  # whose dispatcher sums these over the ranks
        parts = {"y": (_sum(got_y, group), want_y) if row else parts["y"], "dx": parts["dx"]}
        parts["dx"] = (got_x.grad if row else _sum(got_x.grad, group), want_x.grad)
    parts["dx"] = (parts["dx"][0], parts["dx"][1][tokens] if not row else parts["dx"][1][:, columns])
    for name, parameter in mine.named_parameters():
        want = whole.get_parameter(name).grad
        grad = _sum(parameter.grad, group) if getattr(parameter, "sequence_parallel", False) else parameter.grad
        cut_dim = parameter.cut_dim
        parts[name] = (grad, want if cut_dim is None else want.chunk(RANKS, cut_dim)[rank])
    for name, (got, want) in parts.items():
        assert got.shape == want.shape and want.norm() > 0, name
        found[name] = float(((got - want).norm() / want.norm()).detach())
    return found


def _rows(target: Target, whole: Any, mine: Any, rank: int) -> torch.Tensor:
    """Which rows of the whole layer's output this rank has, by the weight table."""
    numbers = torch.arange(sum(rows for _, rows in whole.pieces))
    if target.is_row_parallel:
        return numbers
    shapes, entry = target.entry.shapes, target.entry
    place: dict[tuple[int, int], int] = {}
    for part in entry.row.layout.rectangles(shapes, entry.groups, 0, 1):
        for step, row in enumerate(range(part.source_index[0].start, part.source_index[0].stop)):
            place[part.source, row] = part.shard_index[0].start + step
    mine_rows = [
        place[part.source, row]
        for part in entry.row.layout.rectangles(shapes, entry.groups, rank, RANKS)
        for row in range(part.source_index[0].start, part.source_index[0].stop)
    ]
    return torch.tensor(mine_rows)


def _sum(tensor: torch.Tensor, group: Any) -> torch.Tensor:
    total = tensor.detach().clone()
    torch.distributed.all_reduce(total, group=group)
    return total


@pytest.mark.distributed
def test_two_ranks_compute_what_one_does():
    for found in run_distributed(errors, RANKS, init_process_group=False):
        assert found.keys() == CASES.keys()
        for case, parts in found.items():
            assert max(parts.values()) < 1e-13, (case, parts)
