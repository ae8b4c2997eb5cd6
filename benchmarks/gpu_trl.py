"""TRL's side of benchmarks/gpu.py: its settings by name, the memory that each will take, and which of them take part.

A name says it all: `trl-NUMERICS-mbPAIRS[-sorted][-precompute][-checkpointing][-liger][-flash]`.

- bf16: weights, gradients and moments in bfloat16, no float32 copy, under autocast as TRL has it by default. plain: the
  same with `bf16=False`, so without autocast. mixed: float32 weights under autocast, the numerics of ours.
- mb: pairs in a micro-batch, each two padded sequences. sorted: each global batch longest pair first, so that
  micro-batches pad less. precompute: the reference's log-probabilities beforehand; their time is added to the steps.

`trl-mb1`, without numerics, is float32 for the smoke run on a CPU.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gpu_inputs import Lengths, Shape

CANDIDATES = (
    "trl-bf16-mb2-sorted-liger",
    "trl-bf16-mb2-sorted",
    "trl-mixed-mb2-sorted-liger",
    "trl-bf16-mb8-sorted-checkpointing-liger",
    "trl-plain-mb2-sorted-liger",
    "trl-bf16-mb2-sorted-precompute-liger",
    "trl-bf16-mb4-sorted-liger",
    "trl-bf16-mb8-sorted-liger",
    "trl-mixed-mb4-sorted-liger",
    "trl-bf16-mb8-sorted-checkpointing",
    "trl-bf16-mb2-sorted-flash",
)
"""`--trl auto`: all that fit, in this order."""
QUICK = 3
"""So many of them where nothing was measured before, and where something was."""
USABLE = 0.95
"""Of the GPU's memory; the rest is for CUDA's context, cuBLAS and what the allocator can't use."""
HEAD_TOKENS, HEAD_VOCAB = 4096, 32768
"""Of a tile of logits in TRL 1.16's head (trl/kernels/chunked_logprob.py, trl/trainer/utils.py)."""
_NAME = re.compile(
    r"trl(?:-(?P<numerics>bf16|plain|mixed))?-mb(?P<pairs>\d+)"
    r"(?P<flags>(?:-(?:sorted|precompute|checkpointing|liger|flash))*)"
)


def settings(name: str) -> dict[str, Any]:
    """Fields of trl_worker.Spec. Raises ValueError for a name that isn't one."""
    match = _NAME.fullmatch(name)
    if match is None:
        raise ValueError(f"{name}: expected trl-NUMERICS-mbPAIRS[-FLAG ...]; see benchmarks/gpu_trl.py")
    numerics, flags = match["numerics"], match["flags"].split("-")[1:]
    found: dict[str, Any] = {"micro_batch_pairs": int(match["pairs"])}
    extra: dict[str, Any] = {"optim": "adamw_torch_fused"} if numerics else {}
    if numerics in ("bf16", "plain"):
        found["dtype"] = "bfloat16"
    if numerics == "plain":
        extra["bf16"] = False
    if "sorted" in flags:
        found["sort_within_global_batch"] = True
    if "precompute" in flags:
        found["precompute_reference"] = True
    if "checkpointing" in flags:
        extra["gradient_checkpointing"] = True
    if "liger" in flags:
        extra["use_liger_kernel"] = True
    if "flash" in flags:
        found["attention"] = "flash_attention_2"
    return found | ({"extra": extra} if extra else {})


def micro_batches(lengths: Lengths, pairs_per_step: int, spec: dict[str, Any]) -> Iterator[Lengths]:
    """The pairs of each micro-batch, as TRL takes them."""
    count = spec["micro_batch_pairs"]
    for start in range(0, len(lengths), pairs_per_step):
        batch = lengths[start : start + pairs_per_step]
        if spec.get("sort_within_global_batch"):
            batch = batch[np.argsort(-_longest(batch), kind="stable")]
        for first in range(0, len(batch), count):
            yield batch[first : first + count]


def peak_bytes(shape: Shape, spec: dict[str, Any], lengths: Lengths, pairs_per_step: int) -> dict[str, int]:
    """The most memory in tensors at once, foretold, with its parts: in the largest micro-batch, when backward begins.

    Formulas: benchmarks/README.md, "Memory of TRL's side". TRL 1.16 keeps no logits on a GPU: it projects answer tokens
    only, in tiles, and computes them again in backward.
    """
    extra = spec.get("extra", {})
    mixed = spec.get("dtype") != "bfloat16"
    width = 4 if mixed else 2
    copies = 4 + (0 if spec.get("precompute_reference") else 1)  # weights, gradients, two moments, reference
    largest = max(
        _activations(shape, spec, batch) + _transient(shape, batch, width)
        for batch in micro_batches(lengths, pairs_per_step, spec)
    )
    # autocast's bfloat16 copies of the layers' weights live from forward to backward
    layers = shape.parameters - (1 if shape.tied else 2) * shape.vocab_size * shape.hidden_size
    parts = {
        "state": copies * width * shape.parameters,
        "cast_weights": 2 * layers if mixed and extra.get("bf16", True) else 0,
        "micro_batch": largest,
    }
    return parts | {"total": sum(parts.values())}


def _longest(lengths: Lengths) -> Any:
    """[pairs]: tokens of the longer sequence."""
    return lengths[:, 0] + lengths[:, 1:].max(axis=1)


def _activations(shape: Shape, spec: dict[str, Any], batch: Lengths) -> int:
    """What autograd keeps of a policy's forward, in bytes."""
    extra = spec.get("extra", {})
    mixed, liger = spec.get("dtype") != "bfloat16", bool(extra.get("use_liger_kernel"))
    hidden, ffn, padded = shape.hidden_size, shape.ffn_hidden_size, int(_longest(batch).max())
    norms = {(False, False): 16, (False, True): 8, (True, False): 26, (True, True): 18}[mixed, liger] * hidden
    mask = 0 if spec.get("attention") == "flash_attention_2" else 2 * padded
    attention = 8 * hidden + 4 * shape.num_heads + mask
    layer = norms + attention + (6 if liger else 8) * ffn
    kept = (4 if mixed else 2) * hidden * shape.num_layers + layer
    layers = kept if extra.get("gradient_checkpointing") else layer * shape.num_layers
    return 2 * len(batch) * padded * (layers + 8 * hidden)  # and the last norm


def _transient(shape: Shape, batch: Lengths, width: int) -> int:
    """What is there for a moment on top of `_activations`: a layer's own, or the head's backward."""
    tokens = 2 * len(batch) * int(_longest(batch).max())
    layer = tokens * (6 * shape.ffn_hidden_size + 8 * shape.hidden_size)
    answers = int(batch[:, 1:].sum())
    rounded = 2 if width == 2 else 0
    gradients = (answers + shape.vocab_size) * shape.hidden_size * (4 + rounded)
    tile = 2 * min(answers, HEAD_TOKENS) * min(shape.vocab_size, HEAD_VOCAB)
    return max(layer, gradients + tile)


def choose(
    asked: Sequence[str], shape: Shape, lengths: Lengths, pairs_per_step: int, memory_bytes: int, earlier: Path | None
) -> tuple[list[str], dict[str, str]]:
    """Who takes part, and who does not, with the reason: their predicted peak is over what is usable.

    asked: names; `auto` is every candidate that fits, `quick` the first QUICK. earlier: a result of gpu.py; with `quick`,
    the fastest there come first, and the fastest of `mixed`, since its numerics are ours, is among them.
    """
    usable = USABLE * memory_bytes
    candidates = [name for name in asked if name not in ("auto", "quick")]
    if "auto" in asked or "quick" in asked:
        candidates += [name for name in (*_fastest(earlier), *CANDIDATES) if name not in candidates]
    fitting, unfit = [], {}
    for name in dict.fromkeys(candidates):
        need = peak_bytes(shape, settings(name), lengths, pairs_per_step)["total"]
        if need <= usable:
            fitting.append(name)
        else:
            unfit[name] = f"does not fit: {need / 2**30:.0f} GiB foretold, {usable / 2**30:.0f} usable"
    if "quick" in asked and "auto" not in asked:
        fitting = _quick(fitting)
        unfit = {name: reason for name, reason in unfit.items() if name in asked}
    return fitting, unfit


def _quick(fitting: list[str]) -> list[str]:
    mixed = next((name for name in fitting if name.startswith("trl-mixed")), None)
    chosen = fitting[:QUICK]
    return chosen if mixed is None or mixed in chosen else [*chosen[: QUICK - 1], mixed]


def _fastest(earlier: Path | None) -> list[str]:
    """TRL's of an earlier result, fastest first; none where there is no such file."""
    if earlier is None or not earlier.exists():
        return []
    measured = [one for one in json.loads(earlier.read_text())["measured"] if one["name"].startswith("trl")]
    return [one["name"] for one in sorted(measured, key=lambda one: -one["pairs_per_s"])]
