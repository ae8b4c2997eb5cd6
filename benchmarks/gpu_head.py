"""The head alone: time beside the matrix products that it cannot do without, and memory, at 32k and 128k tokens.

    python benchmarks/gpu_head.py --out head.json

Per vocabulary, hidden size and number of answer tokens: megadpo's heads, forward and forward + backward, and the bare
products in bfloat16: one for forward; for both passes the four that a head without stored logits needs (logits, logits
again, gradient of the hidden states, gradient of the weight). Memory is the peak beside inputs and returned gradients.
`--smoke`: tiny sizes, on a CPU too.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))  # run as a script, the path starts in benchmarks/

from benchmarks import gpu_code, gpu_machine  # noqa: E402
from megadpo.config.known import Known  # noqa: E402
from megadpo.config.problems import ConfigError  # noqa: E402
from megadpo.config.schema import Config  # noqa: E402
from megadpo.config.schema_policy import PolicyConfig, TokenizerConfig  # noqa: E402
from megadpo.config.variants import LOGPROB_KERNELS  # noqa: E402
from megadpo.model.heads import LogpsHead  # noqa: E402
from megadpo.parallel import machine  # noqa: E402

GOAL = 1.2
SIZES = [
    # vocabulary, hidden size, answer tokens of a pack
    (32_000, 4096, 8192),
    (128_256, 4096, 2048),
    (128_256, 4096, 8192),
    (128_256, 2048, 8192),
]
SMOKE_SIZES = [(512, 32, 64)]


def measure(vocab: int, hidden_size: int, rows: int, device: torch.device, repeats: int) -> dict[str, Any]:
    """One size: milliseconds and bytes of every head that runs here, and of the products."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    hidden = torch.randn(rows, hidden_size, device=device, dtype=dtype, requires_grad=True)
    weight = (torch.randn(vocab, hidden_size, device=device, dtype=dtype) * hidden_size**-0.5).requires_grad_()
    targets = torch.randint(0, vocab, (rows,), device=device)
    found: dict[str, Any] = {"vocab": vocab, "hidden_size": hidden_size, "answer_tokens": rows, "heads": {}}
    found["products"] = products(hidden.detach(), weight.detach(), repeats)
    for name in ("triton", "torch"):
        try:
            policy = PolicyConfig(model_name="", tokenizer=TokenizerConfig(name=""), logprob_kernel=name)
            head = LOGPROB_KERNELS.choose(Known(cfg=Config(policy=policy), machine=machine(device)))
            found["heads"][name] = one_head(head, hidden, weight, targets, repeats)
        except ConfigError as error:
            found["heads"][name] = {"not_run": str(error.problems[0])}
            continue
        for key in ("forward_ms", "both_ms"):
            ratio = found["heads"][name][key] / found["products"][key]
            found["heads"][name][key.replace("_ms", "_over_products")] = ratio
    return found


def products(hidden: torch.Tensor, weight: torch.Tensor, repeats: int) -> dict[str, float]:
    """The bare products, each into memory that is there already."""
    logits = torch.empty(hidden.shape[0], weight.shape[0], device=hidden.device, dtype=hidden.dtype)
    d_hidden, d_weight = torch.empty_like(hidden), torch.empty_like(weight)

    def forward() -> None:
        torch.mm(hidden, weight.t(), out=logits)

    def both() -> None:
        forward()
        forward()
        torch.mm(logits, weight, out=d_hidden)
        torch.mm(logits.t(), hidden, out=d_weight)

    return {
        "forward_ms": gpu_machine.milliseconds(forward, hidden.device, repeats=repeats),
        "both_ms": gpu_machine.milliseconds(both, hidden.device, repeats=repeats),
    }


def one_head(
    head: LogpsHead, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, repeats: int
) -> dict[str, float]:
    """Times and memory of one implementation, the gradients freed after each backward."""
    group = dist.group.WORLD
    assert group is not None
    upstream = torch.randn(hidden.shape[0], device=hidden.device)

    def forward() -> None:
        with torch.no_grad():
            head(hidden, weight, targets, vocab_start=0, group=group, chunk_tokens=1024)

    def both() -> None:
        logps = head(hidden, weight, targets, vocab_start=0, group=group, chunk_tokens=1024)
        logps.backward(upstream)
        hidden.grad = weight.grad = None

    device = hidden.device
    found = {
        "forward_ms": gpu_machine.milliseconds(forward, device, repeats=repeats),
        "both_ms": gpu_machine.milliseconds(both, device, repeats=repeats),
    }
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        both()
        returned = (hidden.numel() + weight.numel()) * hidden.element_size()
        found["peak_beside_gradients_bytes"] = torch.cuda.max_memory_allocated() - before - returned
    return found


def earlier(path: Path | None, machine: dict[str, Any]) -> list[dict[str, Any]]:
    """Results of a call before this one, where gpu_code.continues."""
    if path is None or not path.exists():
        return []
    content = json.loads(path.read_text(encoding="utf-8"))
    return list(content["results"]) if gpu_code.continues(content["machine"], machine) else []


def table(results: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| vocabulary | hidden | answer tokens | head | forward ms (x products) | both ms (x products) | peak MiB |"
    ]
    lines.append("|---|---|---|---|---|---|---|")
    for result in results:
        size = f"| {result['vocab']} | {result['hidden_size']} | {result['answer_tokens']} "
        for name, head in result["heads"].items():
            if "not_run" in head:
                lines.append(f"{size}| {name} | not run: {head['not_run']} | | |")
                continue
            peak = head.get("peak_beside_gradients_bytes")
            lines.append(
                f"{size}| {name} | {head['forward_ms']:.3f} ({head['forward_over_products']:.2f}) "
                f"| {head['both_ms']:.3f} ({head['both_over_products']:.2f}) "
                f"| {'' if peak is None else f'{peak / 2**20:.0f}'} |"
            )
    return lines


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to see that everything runs")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--minutes", type=float, default=3.0, help="start no further size after this long")
    options = parser.parse_args(arguments)
    cuda = torch.cuda.is_available()
    if not cuda and not options.smoke:
        print("no CUDA device: nothing to measure; --smoke runs tiny sizes on the CPU", file=sys.stderr)
        return 2
    device = torch.device("cuda" if cuda else "cpu")
    started, code = time.monotonic(), 0
    with tempfile.TemporaryDirectory() as folder:
        backend = "nccl" if cuda else "gloo"
        dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=0, world_size=1)
        content: dict[str, Any] = {"machine": gpu_machine.machine(), "command": sys.argv, "results": []}
        content["matrix_rate_tflops"] = gpu_machine.matrix_rate_tflops(device)
        content["copy_rate_gbytes_per_s"] = gpu_machine.copy_rate_gbytes(device)
        content["results"] = earlier(options.out, content["machine"])
        before = [tuple(one[key] for key in ("vocab", "hidden_size", "answer_tokens")) for one in content["results"]]
        for size in SMOKE_SIZES if options.smoke else SIZES:
            if size in before:
                continue
            if time.monotonic() - started > 60 * options.minutes:
                print(f"out of time before {size}; a call with the same --out goes on")
                code = 3
                break
            content["results"].append(measure(*size, device, 2 if options.smoke else options.repeats))
            if options.out:
                options.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        dist.destroy_process_group()
    print(
        f"{content['machine'].get('gpu', 'CPU')}: {content['matrix_rate_tflops']:.0f} TFLOP/s in products, "
        f"{content['copy_rate_gbytes_per_s']:.0f} GB/s in copies"
    )
    print(*table(content["results"]), sep="\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
