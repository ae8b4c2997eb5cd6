"""The kernel from projection to attention beside what it replaces, in a process of its own: Triton decides at its import
whether to interpret kernels.

TRITON_INTERPRET=1 python -m tests.model.qkv_worker CASES.json RESULTS.json MODEL
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path

import torch

from megadpo.config.architecture import Rotary
from megadpo.config.grid import Grid
from megadpo.data.batches.pack import pack_pairs
from megadpo.model.kernels import RaggedKernel
from megadpo.model.qkv import split_and_turn
from megadpo.model.rope import PlainRotation, RotaryTable
from megadpo.parallel import ParallelContext, initialize, setup_device
from tests.helpers.runs import VOCAB
from tests.model.kernels.test_kernels import random_pairs


@dataclasses.dataclass(frozen=True)
class Case:
    groups: int = 2
    heads: int = 4
    width: int = 8
    dims: int = 8
    """Channels that RoPE turns."""
    interleaved: bool = False
    share_prompt: bool = True
    gathers: bool = True
    window: int | None = None
    dtype: str = "float32"
    device: str = "cpu"


def compare(case: Case) -> dict[str, float]:
    """Largest differences of queries, keys, values and the projection's gradient from float64, over their largest value."""
    batch = pack_pairs(random_pairs(), share_prompt=case.share_prompt, pad_to_multiple=8, pad_token_id=0)
    device, generator = torch.device(case.device), torch.Generator().manual_seed(0)
    plan = RaggedKernel().plan(batch.segments, device, torch.bfloat16, case.window) if case.gathers else None
    tokens, per_group = batch.tokens.numel(), case.heads // case.groups + 2
    mixed = torch.randn(tokens, case.groups * per_group * case.width, generator=generator)
    mixed = mixed.to(device, getattr(torch, case.dtype)).requires_grad_()
    table = RotaryTable(Rotary(dims=case.dims, theta=100.0, interleaved=case.interleaved), device)
    cos, sin = table.cos_sin(batch.positions.to(device))
    shape = {"groups": case.groups, "width": case.width, "interleaved": case.interleaved}
    got = split_and_turn(mixed, cos, sin, plan, **shape)
    upstream = [torch.randn(x.shape, generator=generator).to(x) for x in got]

    wide = mixed.detach().double().requires_grad_()
    parts = wide.view(tokens, case.groups, per_group, case.width)
    turn = PlainRotation(cos.double()[:, None], sin.double()[:, None], case.interleaved)
    query = turn(parts[:, :, :-2].reshape(tokens, case.heads, case.width))
    key, value = turn(parts[:, :, -2]), parts[:, :, -1]
    want = (query, *((key, value) if plan is None else RaggedKernel().prepare(key, value, plan)))
    mine = [*got, *torch.autograd.grad(got, mixed, upstream)]
    exact = [*want, *torch.autograd.grad(want, wide, [x.double() for x in upstream])]
    names = ("query", "key", "value", "gradient")
    assert [x.shape for x in mine] == [x.shape for x in exact] and {x.dtype for x in mine} == {mixed.dtype}
    return {
        name: float((a.detach().double() - b.detach()).abs().max() / b.detach().abs().max())
        for name, a, b in zip(names, mine, exact, strict=True)
    }


class DenseKernel(RaggedKernel):
    """What a fused kernel computes of the keys that it is handed, written out."""

    name = "dense"

    def attend(self, q, k, v, plan, *, scale=None, softcap=None, sinks=None):
        rows = []
        for s in range(len(plan.cu_seqlens_q) - 1):
            mine, seen = (slice(*ends[s : s + 2].tolist()) for ends in (plan.cu_seqlens_q, plan.cu_seqlens_k))
            keys, values = (x[seen].repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
            scores = torch.einsum("nhd,mhd->hnm", q[mine], keys) * (q.shape[2] ** -0.5 if scale is None else scale)
            mask = torch.ones(scores.shape[1:], dtype=torch.bool).tril(scores.shape[2] - scores.shape[1])
            rows.append(torch.einsum("hnm,mhd->nhd", scores.masked_fill(~mask, -torch.inf).softmax(-1), values))
        return torch.cat(rows)


def model_with(folder: str, joined: bool, parallel: ParallelContext) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logps, and gradients by name, of a small model over a pack of shared prompts."""
    from megadpo.config.schema_megatron import MegatronConfig
    from megadpo.config.schema_policy import PolicyConfig, TokenizerConfig
    from megadpo.families import read_architecture
    from megadpo.model.build import build_model
    from megadpo.model.weights.load import load_hf_weights, named_global_parameters
    from megadpo.train.setup import seed_everything

    seed_everything(1, parallel)
    arch = read_architecture(folder)
    policy = PolicyConfig(
        model_name=folder,
        tokenizer=TokenizerConfig(name=folder),
        precision="float32",
        megatron_cfg=MegatronConfig(fused_single_qkv_rope=joined),
    )
    [chunk] = build_model(arch, policy, parallel, frozen=False)
    load_hf_weights([chunk], arch, folder, parallel.grid)
    chunk.kernel = DenseKernel()
    batch = pack_pairs(random_pairs(vocab=VOCAB), share_prompt=True, pad_to_multiple=8, pad_token_id=0)
    logps = chunk(batch)
    (logps * torch.linspace(-1, 1, len(logps))).sum().backward()
    return logps.detach(), {name: parameter.grad for name, parameter in named_global_parameters(chunk)}


def model_apart(folder: str) -> dict[str, float]:
    """Largest differences between a model with and without the kernel, of logps and of any gradient over its norm."""
    parallel = initialize(Grid(), setup_device("cpu"))
    (logps, gradients), (want, exact) = (model_with(folder, joined, parallel) for joined in (True, False))
    assert set(gradients) == set(exact)
    apart = {name: float((gradients[name] - exact[name]).norm() / exact[name].norm()) for name in exact}
    return {"logps": float((logps - want).abs().max()), "gradients": max(apart.values())}


def main() -> None:
    cases_path, results, model = sys.argv[1:]
    cases = json.loads(Path(cases_path).read_text(encoding="utf-8"))
    found = {"cases": [compare(Case(**one)) for one in cases], "model": model_apart(model)}
    Path(results).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    assert os.environ.get("TRITON_INTERPRET") == "1"
    main()
