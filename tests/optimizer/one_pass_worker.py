"""The one-pass step beside FusedAdam's formula, in a process of its own: Triton decides at its import whether to interpret
kernels.

TRITON_INTERPRET=1 python -m tests.optimizer.one_pass_worker CASES.json RESULTS.json
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path

import torch

from megadpo.optimizer.one_pass import in_one_pass
from tests.optimizer.lean_adam import FusedAdam, main_weight

OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.98), "eps": 1e-8, "weight_decay": 0.1}


@dataclasses.dataclass(frozen=True)
class Case:
    sizes: tuple[int, ...] = (1, 2047, 2048, 5001)
    """Of parameters, which are cut out of one flat tensor, as the distributed optimizer cuts them."""
    grad: str = "float32"
    exp_avg: str = "bfloat16"
    exp_avg_sq: str = "bfloat16"
    scale: float = 0.1
    """Of the gradients."""
    values: tuple[float, ...] = ()
    """The first elements of the first gradient; weights there are the same."""
    bias_correction: bool = True
    weight_decay: float = 0.1
    steps: int = 3
    device: str = "cpu"
    changed_at: int | None = None
    """From this step on the other one goes on with the state: as a run that resumes with it."""


def start(case: Case, kind: type, **wide: bool) -> FusedAdam:
    """An optimizer in two groups, the second empty, on the case's weights; gradients come from `give_gradients`."""
    generator = torch.Generator().manual_seed(1)
    flat = torch.randn(sum(case.sizes), generator=generator).bfloat16()
    flat[: len(case.values)] = torch.tensor(case.values).bfloat16()
    weights = list(flat.to(case.device).split(list(case.sizes)))
    dtypes = {name: getattr(torch, getattr(case, name)) for name in ("exp_avg", "exp_avg_sq")}
    options = OPTIONS | {"bias_correction": case.bias_correction, "weight_decay": case.weight_decay}
    groups = [{"params": weights}, {"params": []}]
    return kind(groups, **{f"{name}_dtype": dtype for name, dtype in dtypes.items()}, **options, **wide)


def give_gradients(case: Case, optimizer: FusedAdam, step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    flat = (torch.randn(sum(case.sizes), generator=generator) * case.scale).to(getattr(torch, case.grad))
    flat[: len(case.values)] = torch.tensor(case.values).to(flat.dtype)
    grads = flat.to(case.device).split(list(case.sizes))
    for weight, grad in zip(optimizer.param_groups[0]["params"], grads, strict=True):
        weight.decoupled_grad = grad


def tensors(optimizer: FusedAdam) -> dict[str, torch.Tensor]:
    """weight, master_param and the moments, all parameters in one; and the float32 weight as `main`."""
    weights = optimizer.param_groups[0]["params"]
    found = {"weight": torch.cat([weight.detach() for weight in weights])}
    for name in ("master_param", "exp_avg", "exp_avg_sq"):
        found[name] = torch.cat([optimizer.state[weight][name] for weight in weights])
    return found | {"main": main_weight(found["weight"], found["master_param"])}


def go_on(case: Case, optimizer: FusedAdam, first: int, last: int) -> None:
    for step in range(first, last):
        give_gradients(case, optimizer, step)
        optimizer.step()


def take_over(case: Case, kind: type, other: FusedAdam) -> FusedAdam:
    """A new optimizer with the weights, state and step count of another."""
    made = start(case, kind)
    for mine, theirs in zip(made.param_groups[0]["params"], other.param_groups[0]["params"], strict=True):
        mine.copy_(theirs)
        made.state[mine] = {name: tensor.clone() for name, tensor in other.state[theirs].items()}
    made.param_groups[0]["step"] = other.param_groups[0]["step"]
    return made


def compare(case: Case) -> dict[str, float | bool]:
    """After the case's steps: tensors whose bits differ from FusedAdam's by torch's operations, and the largest differences
    of the float32 weights to those and to float64's."""
    ours, theirs = start(case, in_one_pass(FusedAdam)), start(case, FusedAdam)
    change = case.steps if case.changed_at is None else case.changed_at
    go_on(case, ours, 0, change)
    if change < case.steps:
        ours = take_over(case, FusedAdam, ours)
        go_on(case, ours, change, case.steps)
    go_on(case, theirs, 0, case.steps)
    wide = start(case, FusedAdam, wide=True)
    go_on(case, wide, 0, case.steps)
    mine, want, exact = tensors(ours), tensors(theirs), tensors(wide)
    found: dict[str, float | bool] = {f"{name} differs": not same_bits(mine[name], want[name]) for name in want}
    finite = want["main"].isfinite()
    found["from FusedAdam"] = float((mine["main"] - want["main"])[finite].abs().max())
    found["from float64"] = float((mine["main"] - exact["main"])[finite].abs().max())
    found["moved"] = float((mine["main"] - tensors(start_with_state(case))["main"])[finite].abs().max())
    steps = [group.get("step") for group in ours.param_groups]
    return found | {"steps counted": steps == [case.steps, None]}


def start_with_state(case: Case) -> FusedAdam:
    optimizer = start(case, FusedAdam)
    for weight in optimizer.param_groups[0]["params"]:
        optimizer.initialize_state(weight, True)
    return optimizer


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Any nan is a nan."""
    if not a.is_floating_point():
        return torch.equal(a, b)
    kind = {2: torch.int16, 4: torch.int32}[a.element_size()]
    same = a.contiguous().view(kind) == b.contiguous().view(kind)
    return bool((same | (a.isnan() & b.isnan())).all())


def main() -> None:
    cases_path, results = sys.argv[1:]
    cases = json.loads(Path(cases_path).read_text(encoding="utf-8"))
    found = [compare(Case(**{**one, "sizes": tuple(one["sizes"]), "values": tuple(one["values"])})) for one in cases]
    Path(results).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    assert os.environ.get("TRITON_INTERPRET") == "1"
    main()
