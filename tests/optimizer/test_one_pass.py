"""The one-pass step in Triton's interpreter: FusedAdam's bits, by its formula in torch's operations; and float64's numbers.

Bounds, said before anything was measured. With float32 moments a step rounds the update some ten times, 6e-8 of it each,
and the weight once: 2e-6 of an update of up to 0.03 (3 lr) and 6e-8 of weights up to 5, three times: 1e-6. With bfloat16
ones a moment near the middle of two bfloat16 numbers may go to the other, 2^-8 of it: 3 lr 2^-7 = 2.4e-4.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megadpo.config.known import Known, Machine, find_problems
from megadpo.optimizer.kinds.adam import Adam
from tests.model.heads.test_triton import needs_interpreter
from tests.optimizer.one_pass_worker import Case

REPOSITORY = Path(__file__).resolve().parents[2]
WIDE = Case(exp_avg="float32", exp_avg_sq="float32")
# overflow of the square; underflow to subnormals; both zeros; weights whose remainder carries into the next exponent
EXTREMES = (1e20, -1e30, 3e38, 1e-30, -1e-44, 0.0, -0.0, 1.9999999, -255.99999, 1.17549435e-38)
CASES = [
    Case(),
    WIDE,
    Case(exp_avg="float32"),
    Case(grad="bfloat16"),
    Case(steps=1, sizes=(0, 3)),
    Case(scale=1e-6),
    Case(scale=1e6, weight_decay=0.0),
    Case(bias_correction=False, steps=2),
    Case(values=EXTREMES),
    Case(changed_at=1),
    dataclasses.replace(WIDE, changed_at=2, steps=4),
]
SPOILED = Case(values=(math.nan, math.inf, -math.inf))


def interpreted(cases, folder):
    (folder / "cases.json").write_text(json.dumps([dataclasses.asdict(case) for case in cases]), encoding="utf-8")
    files = [str(folder / "cases.json"), str(folder / "results.json")]
    path = os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.optimizer.one_pass_worker", *files]
    done = subprocess.run(command, env=env, cwd=REPOSITORY, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def bound(case):
    narrow = "bfloat16" in (case.exp_avg, case.exp_avg_sq)
    return 2.4e-4 * case.steps / 3 if narrow else 1e-6 * case.steps / 3


@needs_interpreter
def test_the_bits_of_fused_adam_and_the_numbers_of_float64(tmp_path):
    """Sizes around a block, gradients and moments of either dtype, a state handed over between the two."""
    for case, found in zip(CASES, interpreted(CASES, tmp_path), strict=True):
        differ = [name for name in ("weight", "master_param", "exp_avg", "exp_avg_sq") if found[f"{name} differs"]]
        assert not differ and found["steps counted"], (case, found)
        assert found["moved"] > (0.0 if case.scale < 1e-3 else 1e-3)
        assert found["from float64"] < bound(case), (case, found)


@needs_interpreter
def test_a_gradient_that_is_not_finite_spoils_its_own_element(tmp_path):
    """As in FusedAdam; the step before it is left out (optimizer/step.py), so this is never trained on."""
    [found] = interpreted([SPOILED], tmp_path)
    assert not found["main differs"] and not found["exp_avg differs"] and not found["exp_avg_sq differs"]


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted kernels are not compiled")
@pytest.mark.parametrize(("grad", "moments"), [("fp32", "i16"), ("i16", "fp32")])
def test_it_compiles_for_hopper_without_one(grad, moments):
    pytest.importorskip("triton", reason="needs Triton, for its compiler")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from megadpo.optimizer import one_pass

    pointers = {"grad": grad, "weight": "i16", "remainder": "i16", "exp_avg": moments, "exp_avg_sq": moments}
    numbers = dict.fromkeys(("lr", "beta1", "beta2", "eps", "decay", "unbias1", "unbias2"), "fp32")
    signature = {name: f"*{kind}" for name, kind in pointers.items()} | {"count": "i32"} | numbers
    signature |= {"BLOCK": "constexpr"}
    aligned = {(place,): [["tt.divisibility", 16]] for place in range(len(pointers) + 1)}
    source = ASTSource(one_pass._update, signature, {"BLOCK": one_pass.BLOCK}, aligned)
    options = {"num_warps": one_pass.WARPS, "enable_fp_fusion": False}
    ptx = compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
    assert "ld.global.v4" in ptx.replace(".b32", "") and "st.global.v4" in ptx.replace(".b32", "")  # 16 bytes each
    assert ".local" not in ptx and "fma" not in ptx
    assert "sqrt.rn" in ptx and "div.rn" in ptx


WHERE = "policy.megatron_cfg.optimizer.adam_impl"


LEAN = {
    "policy__precision": "bfloat16",
    "policy__megatron_cfg__optimizer__use_distributed_optimizer": True,
    "policy__megatron_cfg__optimizer__use_precision_aware_optimizer": True,
    "policy__megatron_cfg__optimizer__adam_impl": "triton",
    "checkpointing__save_optimizer": False,
}


def test_where_it_can_be_asked_for(config, refusals):
    def on(lacking=(), **changes):
        there = Machine(device="cuda", why_missing=lambda name: "not installed" if name in lacking else None)
        return [one.where for one in find_problems(Known(cfg=config(**LEAN, **changes), machine=there))].count(WHERE)

    assert on() == 0
    assert on(["triton"]) == on(["transformer_engine"]) == 1
    aware = "policy__megatron_cfg__optimizer__use_precision_aware_optimizer"
    for change in ({"policy__precision": "float32"}, {aware: False}, {"policy__device": "cpu"}):
        assert refusals(**(LEAN | change))[WHERE].value == "triton"


def test_who_it_is_for_megatron_core_and_the_planner(monkeypatch):
    from megatron.core import optimizer as mcore
    from megatron.core.optimizer import distrib_optimizer

    from megadpo.optimizer.kinds.adam import use_adam
    from tests.optimizer.test_kinds import FusedAdam, install_stand_in

    install_stand_in(monkeypatch)
    monkeypatch.setattr(mcore, "Adam", mcore.Adam)  # put back at the end
    try:
        use_adam("triton")
        made = mcore.Adam
        assert issubclass(made, FusedAdam) and made is not FusedAdam and made is distrib_optimizer.Adam
        assert made.__name__ == "FusedAdam", "a checkpoint's format is named by it, and either reads the other's"
        assert distrib_optimizer.USING_TE_OPTIMIZER and not mcore.USING_PYTORCH_OPTIMIZER
    finally:
        use_adam("torch")
    asked = Adam(use_precision_aware_optimizer=True, exp_avg_dtype="bfloat16", adam_impl="triton")
    assert asked.copied_bytes == 0
    assert asked.choose("cuda")[0] == "triton" and Adam().choose("cpu")[0] == "torch"


def test_a_state_of_another_dtype_is_refused():
    one_pass = pytest.importorskip("megadpo.optimizer.one_pass", reason="needs Triton")
    weight = torch.zeros(4, dtype=torch.bfloat16)
    state = {name: torch.zeros(4) for name in ("master_param", "exp_avg", "exp_avg_sq")}
    options = {"lr": 0.1, "betas": (0.9, 0.9), "eps": 1e-8, "weight_decay": 0.0, "bias_correction": True, "step": 1}
    with pytest.raises(ValueError, match="torch.float32, contiguous True: expected torch.int16"):
        one_pass.update(torch.zeros(4), weight, state, **options)
