"""Does Transformer Engine compute what megadpo asks of it on this GPU? `python benchmarks/gpu_te.py --out te.json`, 30 s.

Three checks beside float64: attention over a pack of shared prompts, forward and backward; RMSNorm with a linear layer;
AdamW with bfloat16 moments, and the memory that its step takes. The file is rewritten after each. Exit code 1 where one
fails, 2 without a GPU.
"""

from __future__ import annotations

import argparse
import json
import sys
import traceback
from pathlib import Path
from typing import Any

import torch

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))  # run as a script, the path starts in benchmarks/

from benchmarks import gpu_machine  # noqa: E402

PAIRS = [(300, 40, 65), (90, 33, 20), (250, 128, 12)]
"""Tokens of prompt, chosen, rejected."""
BOUND = 1.5e-2
"""Relative norm of an error: bfloat16 rounds by 2^-9 at the worst, a few times on the way."""


def relative(found: torch.Tensor, want: torch.Tensor) -> float:
    return float((found.double() - want.double()).norm() / want.double().norm())


def segments(pairs: list[tuple[int, int, int]]) -> tuple[torch.Tensor, list[int], list[list[int]]]:
    """Mask [T, T] of who sees whom; queries of each segment; keys of each segment, by index."""
    lengths, keys, seen, start = [], [], [], 0
    total = sum(map(sum, pairs))
    mask = torch.zeros(total, total, dtype=torch.bool)
    for prompt, *answers in pairs:
        shared = list(range(start, start + prompt))
        for count in (prompt, *answers):
            own = list(range(start, start + count))
            seen = own if own[0] == shared[0] else shared + own
            for position, query in enumerate(own):
                mask[query, seen[: len(seen) - count + position + 1]] = True
            lengths.append(count)
            keys.append(seen)
            start += count
    return mask, lengths, keys


def attention(device: torch.device) -> dict[str, float]:
    """Relative errors of output and gradients: 16 heads of 128, 4 of them for keys and values."""
    import transformer_engine.pytorch as te

    mask, lengths, keys = segments(PAIRS)
    q = torch.randn(len(mask), 16, 128, device=device, dtype=torch.bfloat16, requires_grad=True)
    k, v = (torch.randn(len(mask), 4, 128, device=device, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    upstream = torch.randn(len(mask), 16 * 128, device=device, dtype=torch.bfloat16)
    index = torch.tensor([key for seen in keys for key in seen], device=device)
    queries, key_counts = torch.tensor([0, *lengths]), torch.tensor([0, *map(len, keys)])
    kind = "padding_causal_bottom_right"
    module = te.DotProductAttention(16, 128, num_gqa_groups=4, qkv_format="thd", attn_mask_type=kind)
    out = module(
        q,
        k[index],
        v[index],
        cu_seqlens_q=queries.cumsum(0).int().to(device),
        cu_seqlens_kv=key_counts.cumsum(0).int().to(device),
        max_seqlen_q=max(lengths),
        max_seqlen_kv=max(map(len, keys)),
    ).view(len(mask), -1)
    found = (out, *torch.autograd.grad(out, (q, k, v), upstream))
    exact = [x.detach().double().transpose(0, 1).requires_grad_() for x in (q, k, v)]
    all_keys, all_values = (x.repeat_interleave(4, 0) for x in exact[1:])
    scores = exact[0] @ all_keys.transpose(1, 2) / 128**0.5
    weights = scores.masked_fill(~mask.to(device), float("-inf")).softmax(-1)
    result = (weights @ all_values).transpose(0, 1).reshape(len(mask), -1)
    gradients = torch.autograd.grad(result, exact, upstream.double())
    want = (result, *(gradient.transpose(0, 1) for gradient in gradients))
    names = ("out", "d_query", "d_key", "d_value")
    return {name: relative(a, b) for name, a, b in zip(names, found, want, strict=True)}


def norm_and_linear(device: torch.device) -> dict[str, float]:
    """Relative errors of RMSNorm followed by a linear layer, and of its weights' gradients."""
    import transformer_engine.pytorch as te

    layer = te.LayerNormLinear(1024, 2048, bias=False, normalization="RMSNorm", eps=1e-5, params_dtype=torch.bfloat16)
    x = torch.randn(512, 1024, device=device, dtype=torch.bfloat16)
    upstream = torch.randn(512, 2048, device=device, dtype=torch.bfloat16)
    out = layer.to(device)(x)
    out.backward(upstream)
    scale, weight = (p.detach().double().requires_grad_() for p in (layer.layer_norm_weight, layer.weight))
    wide = x.double()
    want = (wide * (wide.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * scale) @ weight.t()
    want.backward(upstream.double())
    assert scale.grad is not None and weight.grad is not None
    return {
        "out": relative(out, want),
        "d_weight": relative(layer.weight.grad, weight.grad),
        "d_scale": relative(layer.layer_norm_weight.grad, scale.grad),
    }


def adam(device: torch.device) -> dict[str, float]:
    """Relative error of the first update with bfloat16 moments, and what a step takes beside its state, in bytes a
    parameter (fp32 copies of a whole group's moments would be 8)."""
    from transformer_engine.pytorch.optimizers import FusedAdam

    weights = [torch.randn(1 << 20, device=device).requires_grad_() for _ in range(64)]
    before = [weight.detach().clone() for weight in weights]
    moments = {"exp_avg_dtype": torch.bfloat16, "exp_avg_sq_dtype": torch.bfloat16}
    optimizer = FusedAdam(weights, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, **moments)
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    optimizer.step()
    first = [old - weight.detach() for old, weight in zip(before, weights, strict=True)]
    # after one step both moments are the gradient's own: the update is lr times its sign
    want = [1e-3 * weight.grad.sign() for weight in weights if weight.grad is not None]
    error = relative(torch.cat(first), torch.cat(want))
    del before, first, want
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    start = torch.cuda.memory_allocated()
    optimizer.step()
    return {"update": error, "step_bytes_a_parameter": (torch.cuda.max_memory_allocated() - start) / (64 << 20)}


CHECKS = {"attention": attention, "norm_and_linear": norm_and_linear, "adam": adam}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON file")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("no CUDA device: nothing to check", file=sys.stderr)
        return 2
    content: dict[str, Any] = {"machine": gpu_machine.machine(), "command": sys.argv, "checks": {}}
    torch.manual_seed(0)
    for name, check in CHECKS.items():
        try:
            errors = check(torch.device("cuda"))
            within = all(value <= BOUND for key, value in errors.items() if key != "step_bytes_a_parameter")
            content["checks"][name] = errors | {"within": within}
        except Exception as error:
            content["checks"][name] = {"within": False, "error": f"{error!r}\n{traceback.format_exc()[-1500:]}"}
        print(name, content["checks"][name], flush=True)
        if options.out:
            options.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return 0 if all(one["within"] for one in content["checks"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
