"""The one-pass AdamW on a GPU: the interpreter's bits, Transformer Engine's numbers, its state, and no memory beside it.

Bounds, set before any run on a GPU: the two compute the same formula in float32 and may part by one rounding of each
product that a compiler fuses, 6e-8 of it, before a moment is rounded to bfloat16 (2^-8 of it, where it was near the middle)
or the weight moves by up to 3 lr: 3 lr 2^-7 a step, as in tests/optimizer/test_one_pass.py.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.optimizer.one_pass_worker import Case, compare, give_gradients, same_bits, start, tensors
from tests.optimizer.test_one_pass import CASES, bound

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("case", CASES)
def test_the_bits_of_its_formula_by_torchs_operations(case):
    found = compare(dataclasses.replace(case, device="cuda"))
    assert not any(found[f"{name} differs"] for name in ("weight", "master_param", "exp_avg", "exp_avg_sq")), found
    assert found["steps counted"] and found["from float64"] < bound(case)


def real(case, one_pass):
    """Transformer Engine's FusedAdam with remainders, or ours on it."""
    optimizers = pytest.importorskip("transformer_engine.pytorch.optimizers")
    from megadpo.optimizer.one_pass import in_one_pass

    fused = in_one_pass(optimizers.FusedAdam) if one_pass else optimizers.FusedAdam
    lean = {"master_weights": True, "use_decoupled_grad": True, "store_param_remainders": True}
    return start(case, lambda groups, **options: fused(groups, **lean, **options))


@pytest.mark.parametrize("case", [case for case in CASES if case.changed_at is None and all(case.sizes)])
def test_transformer_engines_numbers_and_its_state(case):
    """Three optimizers: Transformer Engine's, ours, and one that changes from one to the other after every step."""
    case = dataclasses.replace(case, device="cuda")
    theirs, ours, turns = real(case, False), real(case, True), [real(case, False), real(case, True)]
    for step in range(case.steps):
        for optimizer in (theirs, ours, turns[step % 2]):
            give_gradients(case, optimizer, step)
            optimizer.step()
        now, other = turns[step % 2], turns[(step + 1) % 2]
        for a, b in zip(now.param_groups[0]["params"], other.param_groups[0]["params"], strict=True):
            b.copy_(a)
        other.load_state_dict(now.state_dict())
    want = tensors(theirs)
    finite = want["main"].isfinite()
    for mine in (tensors(ours), tensors(turns[case.steps % 2])):
        assert all(mine[name].dtype == want[name].dtype for name in want)
        apart = float((mine["main"] - want["main"])[finite].abs().max())
        same = float((mine["weight"] == want["weight"]).float().mean())
        print(f"{case}: weights at most {apart:.1e} apart, {same:.4f} of them the same in bfloat16")
        assert apart < bound(case) and same > 0.99


def test_it_takes_no_memory_and_no_wait():
    pytest.importorskip("transformer_engine.pytorch")
    case = Case(sizes=(1 << 22, 3 << 20, 5), device="cuda")
    optimizer = real(case, True)
    give_gradients(case, optimizer, 0)
    optimizer.step()  # compiles, and makes the state
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.max_memory_allocated() == before


def test_a_parameter_of_more_than_two_to_the_31_elements():
    """Its places pass 2^31, and so must the kernel's."""
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB")
    from megadpo.optimizer.one_pass import update

    count, options = 2**31 + 4096, {"lr": 0.5, "betas": (0.9, 0.9), "eps": 1e-8, "weight_decay": 0.0}
    weight, moments = torch.zeros(count, device="cuda", dtype=torch.bfloat16), ("exp_avg", "exp_avg_sq")
    state = {name: torch.zeros(count, device="cuda", dtype=torch.bfloat16) for name in moments}
    state["master_param"] = torch.zeros(count, device="cuda", dtype=torch.int16)
    update(torch.ones_like(weight), weight, state, **options, bias_correction=True, step=1)
    assert weight[0] == weight[-1] == -0.5 and same_bits(weight[:4096], weight[-4096:])
