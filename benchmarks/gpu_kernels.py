"""Which kernel is the fastest here? Attention of a pack, the way from projection to attention, and AdamW's step:

    python benchmarks/gpu_kernels.py --out kernels.json

Attention: one layer of Llama-3.1-8B (32 heads of 128, 8 of them for keys and values) on packs of UltraFeedback-like pairs
with shared prompts, forward and forward + backward, keys gathered as the model does. Projection: from its output to what
attention reads, by the passes that are the default, and by one kernel. AdamW: 4 such layers with bfloat16
weights and moments, 0.87 billion parameters, and the bytes of temporary memory. `auto` follows these tables when they have
been measured. The file is rewritten after each line; a call with the same --out goes on. `--smoke`: tiny sizes, on a CPU
too. Exit code 1 where a kernel's output is another one's, 2 without a GPU, 3 where the time was up.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))  # run as a script, the path starts in benchmarks/

from benchmarks import gpu_code, gpu_inputs, gpu_machine  # noqa: E402
from megadpo.config.architecture import Rotary  # noqa: E402
from megadpo.config.known import Known  # noqa: E402
from megadpo.config.schema import Config  # noqa: E402
from megadpo.config.schema_policy import PolicyConfig, TokenizerConfig  # noqa: E402
from megadpo.config.variants import ATTENTION_KERNELS  # noqa: E402
from megadpo.data.batches.pack import Segment, pack_pairs  # noqa: E402
from megadpo.data.pairs import TokenizedPair  # noqa: E402
from megadpo.model.kernels import AttentionKernel, RaggedKernel  # noqa: E402
from megadpo.model.rope import RotaryTable  # noqa: E402
from megadpo.parallel import machine  # noqa: E402

ATTENTION = ("varlen", "transformer_engine", "flash3")
"""flash3 last: it takes torch's flash attention's place in the process."""
ADAM = ("transformer_engine", "transformer_engine in slices", "triton")
HEADS, GROUPS, WIDTH = 32, 8, 128
PACKS = (4096, 8192, 16384)
ADAM_SHAPES = 4 * [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)]
BOUND = 1.5e-2
"""Relative norm of two kernels' difference: as gpu_te.py's."""


def pack_of(tokens: int) -> tuple[Segment, ...]:
    """Segments of UltraFeedback-like pairs, prompts shared, as many as make at most `tokens`."""
    lengths = gpu_inputs.ultrafeedback_lengths(max(8, tokens // 100), scale=min(1.0, tokens / 4096))
    count = int(np.searchsorted(lengths.sum(axis=1).cumsum(), tokens, side="right"))
    ids = [[np.zeros(n, dtype=np.int32) for n in row] for row in lengths[: max(1, count)].tolist()]
    pairs = [TokenizedPair(number, *row) for number, row in enumerate(ids)]
    return pack_pairs(pairs, share_prompt=True, pad_to_multiple=1, pad_token_id=0).segments


class Attention:
    """Queries, keys and values of one pack, and every kernel's time on them."""

    def __init__(self, tokens: int, device: torch.device) -> None:
        self.segments, self.device = pack_of(tokens), device
        self.tokens = self.segments[-1].query_end
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        generator = torch.Generator(device).manual_seed(0)
        shapes = [(self.tokens, heads, WIDTH) for heads in (HEADS, GROUPS, GROUPS, HEADS)]
        drawn = [torch.randn(shape, device=device, dtype=dtype, generator=generator) for shape in shapes]
        self.inputs, self.upstream = [x.requires_grad_() for x in drawn[:3]], drawn[3]
        self.first: tuple[str, list[torch.Tensor]] | None = None
        """Whose output and gradients the others' are held to."""

    def measure(self, name: str, repeats: int) -> dict[str, Any]:
        kernel: AttentionKernel = ATTENTION_KERNELS.configured(name, {})
        if (reason := why_not(kernel, self.device)) is not None:
            return {"not_run": reason}
        q, k, v = self.inputs
        plan = kernel.plan(self.segments, self.device, q.dtype)

        def both() -> list[torch.Tensor]:
            out = kernel.attend(q, *kernel.prepare(k, v, plan), plan)
            return [out.detach(), *torch.autograd.grad(out, self.inputs, self.upstream)]

        def forward() -> None:
            with torch.no_grad():
                kernel.attend(q, *kernel.prepare(k, v, plan), plan)

        found: dict[str, Any] = {
            "forward_ms": gpu_machine.milliseconds(forward, self.device, repeats=repeats),
            "both_ms": gpu_machine.milliseconds(both, self.device, repeats=repeats),
        }
        results = both()
        if self.first is None:
            self.first = name, results
        else:
            pairs = zip(results, self.first[1], strict=True)
            apart = [float((mine.double() - other.double()).norm() / other.double().norm()) for mine, other in pairs]
            found |= {"apart": max(apart), "from": self.first[0], "within": max(apart) < BOUND}
        return found | backend(name)

    def measure_projection(self, name: str, repeats: int) -> dict[str, Any]:
        """Copying queries, rotating (by Transformer Engine's kernel where it is), gathering; or `fused_single_qkv_rope`."""
        here = machine(self.device)
        if name == "one kernel" and (self.device.type != "cuda" or here.why_missing("triton")):
            return {"not_run": here.why_missing("triton") or "needs a GPU"}
        plan, dtype = RaggedKernel().plan(self.segments, self.device, torch.bfloat16), self.upstream.dtype
        has_te = self.device.type == "cuda" and here.why_missing("transformer_engine") is None
        positions = torch.arange(self.tokens, device=self.device)
        table = RotaryTable(Rotary(dims=WIDTH, theta=500000.0), self.device, fused=has_te)
        mixed = torch.randn(self.tokens, (HEADS + 2 * GROUPS) * WIDTH, device=self.device, dtype=dtype)
        mixed.requires_grad_()
        rotation, cos_sin = table(positions, dtype), table.cos_sin(positions)

        def parts() -> tuple[torch.Tensor, ...]:
            if name == "one kernel":
                from megadpo.model.qkv import split_and_turn

                return split_and_turn(mixed, *cos_sin, plan, groups=GROUPS, width=WIDTH)
            split = mixed.view(self.tokens, GROUPS, -1).split([HEADS // GROUPS * WIDTH, WIDTH, WIDTH], dim=2)
            query = split[0].reshape(self.tokens, HEADS, WIDTH)
            return rotation(query), *RaggedKernel().prepare(rotation(split[1]), split[2], plan)

        grads = [torch.randn_like(part) for part in parts()]
        return {
            "forward_ms": gpu_machine.milliseconds(parts, self.device, repeats=repeats),
            "both_ms": gpu_machine.milliseconds(
                lambda: torch.autograd.grad(parts(), mixed, grads), self.device, repeats=repeats
            ),
        }


def why_not(kernel: AttentionKernel, device: torch.device) -> str | None:
    """What `kernel` refuses here."""
    precision = "bfloat16" if device.type == "cuda" else "float32"
    policy = PolicyConfig(model_name="", tokenizer=TokenizerConfig(name=""), precision=precision)
    problems = list(kernel.problems(Known(cfg=Config(policy=policy), machine=machine(device))))
    return str(problems[0]) if problems else None


def backend(name: str) -> dict[str, str]:
    """What Transformer Engine has taken: cuDNN's fused attention, or a flash attention that is installed."""
    if name != "transformer_engine":
        return {}
    from transformer_engine.pytorch.attention.dot_product_attention import dot_product_attention

    chosen = getattr(dot_product_attention, "_attention_backends", {})
    return {
        "backend": ", ".join(f"{key} {value}" for key, value in chosen.items() if "attention" in key and key[0] != "a")
    }


def adam(name: str, device: torch.device, repeats: int, shapes: list[tuple[int, int]]) -> dict[str, Any]:
    """Milliseconds of a step, bytes a parameter that it takes beside its state."""
    if device.type != "cuda":
        return {"not_run": "needs a GPU"}
    missing = [str(why) for what in ("transformer_engine", "triton") if (why := machine(device).why_missing(what))]
    if missing:
        return {"not_run": missing[0]}
    from transformer_engine.pytorch.optimizers import FusedAdam

    from megadpo.optimizer.one_pass import in_one_pass
    from megadpo.optimizer.slices import in_slices

    kinds = {
        "transformer_engine": FusedAdam,
        "transformer_engine in slices": in_slices(FusedAdam, copied_bytes=8),
        "triton": in_one_pass(FusedAdam),
    }
    weights = [torch.randn(shape, device=device, dtype=torch.bfloat16).flatten() for shape in shapes]
    narrow = {"exp_avg_dtype": torch.bfloat16, "exp_avg_sq_dtype": torch.bfloat16, "master_weights": True}
    options: dict[str, Any] = {**narrow, "use_decoupled_grad": True, "store_param_remainders": True, "lr": 1e-6}
    optimizer = kinds[name](weights, **options)
    for weight in weights:
        weight.decoupled_grad = torch.randn(weight.shape, device=device)
    optimizer.step()  # makes the state
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, count = torch.cuda.memory_allocated(), sum(weight.numel() for weight in weights)
    time_ms = gpu_machine.milliseconds(optimizer.step, device, repeats=repeats)
    temporary = (torch.cuda.max_memory_allocated() - before) / count
    return {"step_ms": time_ms, "ns_a_1000_parameters": 1e9 * time_ms / count, "temporary_bytes_a_parameter": temporary}


def work(device: torch.device, smoke: bool) -> Iterator[tuple[str, Any]]:
    """(name of a line, what measures it)."""
    repeats = 2 if smoke else 20
    names = ATTENTION if device.type == "cuda" else ("sdpa", *ATTENTION)
    attention = {tokens: Attention(tokens, device) for tokens in ((256,) if smoke else PACKS)}
    for name in names:
        for tokens, pack in attention.items():
            yield (
                f"attention, {pack.tokens} of {tokens} tokens, {name}",
                lambda name=name, pack=pack: pack.measure(name, repeats),
            )
    for name in ("passes", "one kernel"):
        for tokens, pack in attention.items():
            yield (
                f"projection, {pack.tokens} of {tokens} tokens, {name}",
                lambda name=name, pack=pack: pack.measure_projection(name, repeats),
            )
    attention.clear()
    for name in ADAM:
        yield f"adam, {name}", lambda name=name: adam(name, device, repeats, ADAM_SHAPES[:4] if smoke else ADAM_SHAPES)


def table(lines: dict[str, dict[str, Any]]) -> list[str]:
    found = ["| what | ms | |", "|---|---|---|"]
    for name, line in lines.items():
        if "not_run" in line:
            found.append(f"| {name} | | not run: {line['not_run']} |")
        elif "step_ms" in line:
            beside = f"{line['temporary_bytes_a_parameter']:.2f} bytes a parameter beside its state"
            found.append(f"| {name} | {line['step_ms']:.2f} | {beside} |")
        else:
            apart = f"{line['apart']:.1e} from {line['from']} " if "apart" in line else ""
            both = f"{line['forward_ms']:.2f} forward, {line['both_ms']:.2f} with backward"
            found.append(f"| {name} | {both} | {apart}{line.get('backend', '')} |")
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to see that everything runs")
    parser.add_argument("--minutes", type=float, default=1.5, help="start no further line after this long")
    options = parser.parse_args(arguments)
    cuda, started, code = torch.cuda.is_available(), time.monotonic(), 0
    if not cuda and not options.smoke:
        print("no CUDA device: nothing to measure; --smoke runs tiny sizes on the CPU", file=sys.stderr)
        return 2
    content: dict[str, Any] = {"machine": gpu_machine.machine(), "command": sys.argv, "lines": {}}
    content["lines"] = earlier(options.out, content["machine"])
    for name, measure in work(torch.device("cuda" if cuda else "cpu"), options.smoke):
        if name in content["lines"]:
            continue
        if time.monotonic() - started > 60 * options.minutes:
            print(f"out of time before {name}; a call with the same --out goes on")
            code = 3
            break
        try:
            content["lines"][name] = measure()
        except Exception as error:  # a kernel that fails leaves the others their turn
            content["lines"][name] = {"not_run": f"{type(error).__name__}: {str(error)[:300]}"}
        if options.out:
            options.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(*table(content["lines"]), sep="\n")
    return 1 if any(line.get("within") is False for line in content["lines"].values()) else code


def earlier(path: Path | None, machine: dict[str, Any]) -> dict[str, Any]:
    """Lines of a call before this one, where gpu_code.continues."""
    if path is None or not path.exists():
        return {}
    content = json.loads(path.read_text(encoding="utf-8"))
    return dict(content["lines"]) if gpu_code.continues(content["machine"], machine) else {}


if __name__ == "__main__":
    sys.exit(main())
