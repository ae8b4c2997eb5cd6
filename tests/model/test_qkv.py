"""The kernel from projection to attention in Triton's interpreter, against the passes that it replaces in float64.

Bounds, said before anything was measured: float32 rounds three times, 2e-7; sums over three copies of a key's gradient as
well: 1e-6. bfloat16 rounds the result once, 2^-8 of the largest at the worst; the interpreter cuts digits off: 2^-7.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megadpo.config.known import Known, Machine, find_problems
from tests.helpers.runs import make_model
from tests.model.heads.test_triton import needs_interpreter
from tests.model.qkv_worker import Case

REPOSITORY = Path(__file__).resolve().parents[2]
CASES = [
    Case(),
    Case(share_prompt=False),
    Case(gathers=False),
    Case(window=4),
    Case(groups=3, heads=3, width=12, dims=6),  # not powers of two; RoPE of half a head
    Case(groups=1, heads=5, interleaved=True),
    Case(interleaved=True, dims=4),
    Case(dtype="bfloat16"),
    Case(dtype="bfloat16", interleaved=True),
]
BOUNDS = {"float32": 1e-6, "bfloat16": 2**-7}
WHERE = "policy.megatron_cfg.fused_single_qkv_rope"


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qkv")
    model = make_model(folder / "model")
    (folder / "cases.json").write_text(json.dumps([dataclasses.asdict(case) for case in CASES]), encoding="utf-8")
    files = [str(folder / "cases.json"), str(folder / "results.json"), str(model)]
    path = os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.model.qkv_worker", *files]
    done = subprocess.run(command, env=env, cwd=REPOSITORY, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


@needs_interpreter
def test_it_equals_the_passes_that_it_replaces(found):
    for case, errors in zip(CASES, found["cases"], strict=True):
        assert max(errors.values()) < BOUNDS[case.dtype], (case, errors)


@needs_interpreter
def test_a_model_gives_the_same_log_probabilities_and_gradients(found):
    assert found["model"]["logps"] < 1e-4 and found["model"]["gradients"] < 1e-5, found["model"]


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted kernels are not compiled")
@pytest.mark.parametrize("which", ["_forward", "_backward"])
def test_it_compiles_for_hopper_without_one(which):
    """Llama-3.1-8B's heads."""
    pytest.importorskip("triton", reason="needs Triton, for its compiler")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from megadpo.model import qkv

    constants = {**qkv._sizes(8, 32, 128, 128, False, True)}
    options = {"num_warps": constants.pop("num_warps")}
    pointers = {
        "_forward": {"mixed": "*bf16", "cos": "*fp32", "sin": "*fp32", "key_index": "*i64", "query": "*bf16",
                     "key": "*bf16", "value": "*bf16", "tokens": "i32"},
        "_backward": {"d_query": "*bf16", "d_key": "*bf16", "d_value": "*bf16", "cos": "*fp32", "sin": "*fp32",
                      "starts": "*i64", "copies": "*i64", "d_mixed": "*bf16"},
    }[which]  # fmt: skip
    signature = pointers | dict.fromkeys(constants, "constexpr")
    aligned = {(place,): [["tt.divisibility", 16]] for place, kind in enumerate(pointers.values()) if kind[0] == "*"}
    source = ASTSource(getattr(qkv, which), signature, constants, aligned)
    ptx = compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
    assert "ld.global.v4" in ptx.replace(".b32", "") and ".local" not in ptx


def problems(known):
    return [one.expected for one in find_problems(known) if one.where == WHERE]


def test_where_it_can_be_asked_for(config):
    asked = config(policy__precision="bfloat16", policy__megatron_cfg__fused_single_qkv_rope=True)
    assert problems(Known(cfg=asked, machine=Machine(device="cuda"))) == []
    lacking = Machine(device="cuda", why_missing=lambda name: "not installed" if name == "triton" else None)
    assert "without Triton: not installed" in problems(Known(cfg=asked, machine=lacking))[0]
    assert "device cpu" in problems(Known(cfg=asked, machine=Machine(device="cpu")))[0]
