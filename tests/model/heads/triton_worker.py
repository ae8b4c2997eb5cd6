"""The fused head against float64, in processes of its own: Triton decides at its import whether to interpret kernels.

TRITON_INTERPRET=1 python -m tests.model.heads.triton_worker CASES.json RESULTS.json
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


@dataclasses.dataclass(frozen=True)
class Case:
    rows: int = 23
    hidden: int = 48
    vocab: int = 700
    dtype: str = "float32"
    world_size: int = 1
    device: str = "cpu"
    chunk_tokens: int = 1024
    most_logits: int | None = None
    """Logits of a block, so that there are several; None: the module's own."""
    kernel_columns: int | None = None
    """Columns of one step of a kernel; None: the module's own."""
    frozen: str = ""
    """'weight' or 'hidden': wants no gradient."""
    scale: float = 0.2
    """Standard deviation of the weight."""
    spoiled: float | None = None
    """What one row of `hidden` or of the weight holds in one place: nan must come out where float64 gives nan."""
    spoils: str = "hidden"
    softcap: float | None = None
    seed: int = 0


def make_inputs(case: Case) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """hidden, the whole weight, targets, and the gradient that comes from above (float32)."""
    generator = torch.Generator().manual_seed(case.seed)
    dtype = getattr(torch, case.dtype)
    hidden = torch.randn(case.rows, case.hidden, generator=generator).to(dtype)
    weight = (torch.randn(case.vocab, case.hidden, generator=generator) * case.scale).to(dtype)
    if case.spoiled is not None:
        {"hidden": hidden, "weight": weight}[case.spoils][1, 3] = case.spoiled
    targets = torch.randint(0, case.vocab, (case.rows,), generator=generator)
    return hidden, weight, targets, torch.randn(case.rows, generator=generator)


def written_out(case: Case) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """logps, gradient of hidden, gradient of the weight, in float64 from the same rounded inputs."""
    hidden, weight, targets, upstream = make_inputs(case)
    hidden, weight = (x.double().to(case.device).requires_grad_() for x in (hidden, weight))
    logits = hidden @ weight.T
    logits = logits if case.softcap is None else case.softcap * torch.tanh(logits / case.softcap)
    logps = logits.log_softmax(-1).gather(1, targets.to(case.device)[:, None])[:, 0]
    return logps.detach(), *torch.autograd.grad(logps, (hidden, weight), upstream.double().to(case.device))


def relative_errors(case: Case, group: dist.ProcessGroup) -> dict[str, float]:
    """Of this rank's logps and gradients: |ours - float64| / |float64| over what is finite, inf where that is not the
    same in both; 0 for what is frozen and has no gradient."""
    from megadpo.model.heads import triton
    from megadpo.model.heads.triton import fused

    triton.MOST_LOGITS = case.most_logits or triton.MOST_LOGITS
    fused.BLOCK_COLUMNS = case.kernel_columns or fused.BLOCK_COLUMNS
    hidden, weight, targets, upstream = (x.to(case.device) for x in make_inputs(case))
    size, rank = group.size(), group.rank()
    mine = slice(rank * case.vocab // size, (rank + 1) * case.vocab // size)
    shard = weight[mine].clone()
    hidden.requires_grad_(case.frozen != "hidden")
    shard.requires_grad_(case.frozen != "weight")
    logps = triton.TritonHead()(
        hidden,
        shard,
        targets,
        vocab_start=mine.start,
        group=group,
        chunk_tokens=case.chunk_tokens,
        softcap=case.softcap,
    )
    logps.backward(upstream)
    if hidden.grad is not None:
        dist.all_reduce(hidden.grad, group=group)  # as the backward of megatron-core's copy_to region does
    want_logps, want_hidden, want_weight = written_out(case)
    wanted = {"logps": want_logps, "hidden": want_hidden, "weight": want_weight[mine]}
    got = {"logps": logps.detach(), "hidden": hidden.grad, "weight": shard.grad}
    assert (got.pop(case.frozen, None)) is None
    return {name: relative_error(got[name].double(), wanted[name]) for name in got}


def relative_error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    finite = wanted.isfinite()
    if not torch.equal(got.isfinite(), finite):
        return float("inf")
    apart, size = (got[finite] - wanted[finite]).norm(), wanted[finite].norm()
    return float(apart / size) if apart > 0 else 0.0  # 0 of 0 is no error: no rows, no finite values


def work(rank: int, world_size: int, store: str, cases: list[dict[str, Any]], results: str) -> None:
    """One rank: every case of this world size, in order."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    assert dist.group.WORLD is not None
    found = [relative_errors(Case(**case), dist.group.WORLD) for case in cases]
    Path(f"{results}.{rank}").write_text(json.dumps(found), encoding="utf-8")
    dist.destroy_process_group()


def main() -> None:
    cases_path, results = sys.argv[1:]
    cases = json.loads(Path(cases_path).read_text(encoding="utf-8"))
    (world_size,) = {case["world_size"] for case in cases}
    store = f"{results}.store"
    if world_size == 1:
        work(0, 1, store, cases, results)
    else:
        torch.multiprocessing.spawn(work, (world_size, store, cases, results), nprocs=world_size)


if __name__ == "__main__":
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    main()
