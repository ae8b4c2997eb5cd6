"""The fused head against float64: on CPUs through Triton's interpreter where Triton is installed, on GPUs compiled.

Bounds, said before anything was measured: float32 keeps 24 bits, and a sum of 48 to 4096 products loses a few of them:
1e-5. In bfloat16 the inputs are rounded before both computations, logits and sums are float32: logps to 1e-5 too; the
gradient of each logit is rounded to bfloat16 once and so is the result, each by at most 2^-8 of itself: 4e-3 in norm,
and 8e-3 in Triton's interpreter, which cuts digits off where GPUs round.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from packaging.version import Version

from megadpo.config.known import MIXED_PRODUCTS, Known, Machine
from megadpo.config.problems import ConfigError
from megadpo.config.schema import Config
from megadpo.config.schema_policy import PolicyConfig, TokenizerConfig
from megadpo.config.variants import LOGPROB_KERNELS
from megadpo.model.heads import triton as head
from megadpo.parallel.device import multiplies_into_float32
from megadpo.plan.trace import LiveBytes
from tests.helpers.distributed import run_distributed
from tests.model.heads.triton_worker import Case, make_inputs, relative_errors

REPOSITORY = Path(__file__).resolve().parents[3]
BOUNDS = {
    "float32": {"logps": 1e-5, "hidden": 1e-5, "weight": 1e-5},
    "bfloat16": {"logps": 1e-5, "hidden": 4e-3, "weight": 4e-3},
}


def why_not_interpreted() -> str | None:
    """Triton's interpreter turned one-element arrays into numbers before 3.7, which numpy refuses from 2.4 on."""
    if importlib.util.find_spec("triton") is None:
        return "needs Triton, for its interpreter"
    triton, numpy = (Version(importlib.metadata.version(name)) for name in ("triton", "numpy"))
    if triton < Version("3.7") and numpy >= Version("2.4"):
        return f"the interpreter of Triton {triton} fails with numpy {numpy}: take Triton 3.7, or numpy below 2.4"
    return None


needs_interpreter = pytest.mark.skipif(why_not_interpreted() is not None, reason=str(why_not_interpreted()))

# Several blocks, the last one thinner; several steps of a kernel in each; a target in every place
SMALL = Case(most_logits=23 * 256, kernel_columns=64)
FEW = dataclasses.replace(SMALL, rows=5, most_logits=5 * 256)  # rows are alike, and the interpreter is slow
CASES = [
    Case(),
    SMALL,
    dataclasses.replace(SMALL, dtype="bfloat16"),
    dataclasses.replace(SMALL, vocab=384),
    dataclasses.replace(SMALL, rows=1, vocab=5),
    dataclasses.replace(FEW, frozen="weight"),
    dataclasses.replace(FEW, frozen="hidden", dtype="bfloat16"),
    dataclasses.replace(FEW, chunk_tokens=1),
    dataclasses.replace(FEW, scale=20.0),  # logits of some hundreds: only a running maximum keeps them finite
    dataclasses.replace(FEW, softcap=3.0),
    dataclasses.replace(FEW, softcap=3.0, dtype="bfloat16"),
    dataclasses.replace(FEW, softcap=10.0, scale=2.0),
    dataclasses.replace(SMALL, rows=0),
    dataclasses.replace(SMALL, rows=0, dtype="bfloat16"),
]
SPOILED = [
    dataclasses.replace(FEW, spoiled=value, spoils=spoils, dtype=dtype)
    for value in (math.inf, math.nan, 1e30)
    for spoils, dtype in (("hidden", "float32"), ("weight", "float32"), ("hidden", "bfloat16"))
]


def interpreted(cases: list[Case], folder: Path) -> list[list[dict[str, float]]]:
    """Errors by rank and case; all cases have one world size."""
    (folder / "cases.json").write_text(json.dumps([dataclasses.asdict(case) for case in cases]), encoding="utf-8")
    files = [str(folder / "cases.json"), str(folder / "results")]
    command = [sys.executable, "-m", "tests.model.heads.triton_worker", *files]
    path = os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, cwd=REPOSITORY, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    ranks = range(cases[0].world_size)
    return [json.loads((folder / f"results.{rank}").read_text(encoding="utf-8")) for rank in ranks]


def within_bounds(case: Case, errors: dict[str, float]) -> bool:
    slack = 2 if case.device == "cpu" and case.dtype == "bfloat16" else 1
    return all(error < slack * BOUNDS[case.dtype][name] for name, error in errors.items())


@needs_interpreter
def test_logps_and_gradients_equal_float64(tmp_path):
    cases = [*CASES, *SPOILED]
    (found,) = interpreted(cases, tmp_path)
    wrong = [(case, errors) for case, errors in zip(cases, found, strict=True) if not within_bounds(case, errors)]
    assert not wrong


@needs_interpreter
@pytest.mark.distributed
def test_the_same_over_two_shards(tmp_path):
    """A context-parallel rank may have no answer tokens at all; a row that is no number is none on either shard."""
    odd = [dataclasses.replace(FEW, rows=0), dataclasses.replace(FEW, spoiled=math.nan)]
    cases = [FEW, dataclasses.replace(FEW, dtype="bfloat16"), dataclasses.replace(FEW, vocab=701), *odd]
    cases = [dataclasses.replace(case, world_size=2) for case in cases]
    for found in interpreted(cases, tmp_path):
        assert all(within_bounds(case, errors) for case, errors in zip(cases, found, strict=True)), found


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted kernels are not compiled")
@pytest.mark.parametrize(("out", "softcap"), [("bf16", None), ("fp32", None), ("bf16", 30.0)])
def test_kernels_compile_for_hopper_without_one(out, softcap):
    """Triton brings its own assembler: what does not compile for sm_90, or spills registers, is seen on any machine."""
    pytest.importorskip("triton", reason="needs Triton, for its compiler")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from megadpo.model.heads.triton import fused

    numbers = {"begin": "i32", "columns": "i32", "BLOCK": "constexpr", "CAP": "constexpr"}
    rows = dict.fromkeys(("top", "total", "target_logit"), "*fp32")
    fold = {"logits": "*fp32", "targets": "*i64", **rows, **numbers}
    grads = {"log_sum": "*fp32", "grad": "*fp32"}
    differentiate = {"logits": "*fp32", "out": f"*{out}", "targets": "*i64", **grads, **numbers}
    for kernel, signature in ((fused._fold, fold), (fused._differentiate, differentiate)):
        aligned = {(place,): [["tt.divisibility", 16]] for place in range(len(signature) - 2)}
        source = ASTSource(kernel, signature, {"BLOCK": fused.BLOCK_COLUMNS, "CAP": softcap}, aligned)
        options = {"num_warps": fused.WARPS}
        ptx = compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
        assert "ld.global.v4" in ptx.replace(".b32", "")  # 16 bytes a load
        assert ".local" not in ptx


def test_a_block_keeps_to_memory_and_to_whole_tiles():
    for rows, vocab, chunk in [(8192, 128256, 1024), (100_000, 128256, 1024), (5, 32000, 64), (0, 512, 1), (7, 5, 1)]:
        columns = head.block_columns(rows, vocab, chunk)
        assert columns == vocab or columns % head.COLUMN_MULTIPLE == 0
        floor = head.COLUMN_MULTIPLE * rows
        assert rows * columns <= max(floor, min(head.MOST_LOGITS, chunk * vocab))
        assert 1 <= columns <= vocab


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_memory_is_what_the_module_says(dtype, monkeypatch):
    """Counted on tensors without values, through the products that GPUs run: their arguments are held as well."""
    fused = pytest.importorskip("megadpo.model.heads.triton.fused", reason="needs Triton")
    for kernel in ("fold_block", "differentiate_block"):
        monkeypatch.setattr(fused, kernel, lambda *_: None)
    monkeypatch.setattr(fused, "combine_shards", lambda parts, group: (parts[0], parts[1]))
    rows, vocab, hidden_size = 4096, 128256, 1024
    hidden = torch.empty(rows, hidden_size, device="meta", dtype=dtype, requires_grad=True)
    weight = torch.empty(vocab, hidden_size, device="meta", dtype=dtype, requires_grad=True)
    targets = torch.empty(rows, device="meta", dtype=torch.int64)
    a_row = 64 * rows  # sums, targets and the like
    block = rows * head.block_columns(rows, vocab, 1024)
    assert 0.9 * head.MOST_LOGITS < block <= head.MOST_LOGITS
    with LiveBytes([hidden, weight, targets]) as live:
        logps = head.TritonHead()(hidden, weight, targets, vocab_start=0, group=None, chunk_tokens=1024)
        assert 4 * block < live.peak <= 4 * block + a_row
        assert live.now <= a_row  # kept for backward
        live.peak = live.now
        logps.backward(torch.ones_like(logps))
    at_most = 4 * block + 4 * hidden.numel() + dtype.itemsize * weight.numel() + a_row
    if dtype != torch.float32:  # gradients of the logits, and of hidden, beside the float32 ones
        at_most += dtype.itemsize * (block + hidden.numel())
    assert 0.99 * at_most < live.peak <= at_most


def chosen(name, machine, **policy):
    policy = PolicyConfig(model_name="m", tokenizer=TokenizerConfig(name="m"), logprob_kernel=name, **policy)
    return LOGPROB_KERNELS.choose(Known(cfg=Config(policy=policy), machine=machine)).name


@pytest.mark.parametrize("lacking", ["triton", MIXED_PRODUCTS])
def test_on_a_gpu_that_lacks_something_auto_is_torchs_head_and_the_name_is_refused(lacking):
    machine = Machine(device="cuda", why_missing=lambda name: "not here" if name == lacking else None)
    assert chosen("auto", machine) == chosen("torch", machine) == "torch"
    with pytest.raises(ConfigError, match=f"policy.logprob_kernel: got 'triton'.*without {lacking}: not here"):
        chosen("triton", machine)


def test_where_each_head_runs():
    assert chosen("auto", Machine(device="cuda")) == chosen("triton", Machine(device="cuda")) == "triton"
    assert chosen("auto", Machine(device="cpu")) == "torch"
    with pytest.raises(ConfigError, match="policy.logprob_kernel.*CUDA"):
        chosen("triton", Machine(device="cpu"))
    assert not multiplies_into_float32(torch.device("cpu"))  # torch itself refuses there


def peak_of_a_head(vocab: int, rows: int, hidden_size: int, which: str) -> int:
    """Bytes that forward and backward take at most beside the inputs and the gradients they return."""
    device = torch.device("cuda")
    run = LOGPROB_KERNELS.configured(which, {})
    hidden = torch.randn(rows, hidden_size, device=device, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(vocab, hidden_size, device=device, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.randint(0, vocab, (rows,), device=device)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    group = dist.group.WORLD
    assert group is not None
    logps = run(hidden, weight, targets, vocab_start=0, group=group, chunk_tokens=1024)
    logps.sum().backward()
    returned = hidden.numel() * 2 + weight.numel() * 2
    return torch.cuda.max_memory_allocated() - before - returned


@pytest.fixture
def cuda_group(tmp_path):
    """A group of one for tests in this process: compiled kernels, no interpreter."""
    assert os.environ.get("TRITON_INTERPRET", "0") != "1", "unset TRITON_INTERPRET: these tests run compiled kernels"
    dist.init_process_group("nccl", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.gpu
@pytest.mark.parametrize(
    "case",
    [
        *CASES,
        *SPOILED,
        Case(rows=3000, hidden=2048, vocab=128256, dtype="bfloat16", scale=0.02),
        Case(rows=700, hidden=4096, vocab=32003, dtype="bfloat16", scale=0.02, most_logits=1 << 22),
        Case(rows=300, hidden=512, vocab=50257, dtype="float32", scale=0.05, most_logits=1 << 22),
    ],
)
@pytest.mark.usefixtures("cuda_group")
def test_compiled_kernels_against_float64(case, monkeypatch):
    from megadpo.model.heads.triton import fused

    monkeypatch.setattr(head, "MOST_LOGITS", head.MOST_LOGITS)  # put back what the case sets
    monkeypatch.setattr(fused, "BLOCK_COLUMNS", fused.BLOCK_COLUMNS)
    case = dataclasses.replace(case, device="cuda")
    assert dist.group.WORLD is not None
    errors = relative_errors(case, dist.group.WORLD)
    assert within_bounds(case, errors), errors


@pytest.mark.gpu
@pytest.mark.usefixtures("cuda_group")
def test_memory_does_not_grow_with_the_vocabulary():
    small, large = (peak_of_a_head(vocab, 4096, 1024, "triton") for vocab in (160_000, 640_000))
    assert large < 1.02 * small
    assert large < 1.1 * (6 * (1 << 27) + 4096 * 1024 * 6)  # the block twice over, and the gradient of hidden


@pytest.mark.gpu
@pytest.mark.usefixtures("cuda_group")
def test_no_wait_for_the_device():
    device = torch.device("cuda")
    run = head.TritonHead()
    hidden, weight, targets, upstream = (x.to(device) for x in make_inputs(Case(dtype="bfloat16")))
    hidden.requires_grad_()
    weight.requires_grad_()

    def once() -> None:
        logps = run(hidden, weight, targets, vocab_start=0, group=dist.group.WORLD, chunk_tokens=1024)
        logps.backward(upstream)

    once()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        once()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.distributed
def test_nothing_on_the_gpu_to_predict():
    """A pack without pairs has no answer tokens; a grid of no programs must not be launched."""
    assert run_distributed(no_tokens, 1) == [(0, 0.0)]


def no_tokens() -> tuple[int, float]:
    device = torch.device("cuda")
    run = head.TritonHead()
    hidden = torch.zeros(0, 8, device=device, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.ones(40, 8, device=device, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.zeros(0, device=device, dtype=torch.int64)
    logps = run(hidden, weight, targets, vocab_start=0, group=dist.group.WORLD, chunk_tokens=8)
    logps.sum().backward()
    assert weight.grad is not None
    return logps.numel(), float(weight.grad.abs().sum())
