"""How the cost of a step is EXPECTED to grow on GPUs, by tools/plan.py's stated model: no figure here is a measurement.

    python benchmarks/planned_scaling.py [--gpu h100] [--lengths 150,350,350]

Prints Markdown tables: the 70B and 8B recipes of configs/ over more ranks, longer pairs and larger packs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
GIB = 2**30
COPIES = "policy.train_global_batch_size"
PACK = "policy.sequence_packing.train_mb_tokens"
LONGEST = "policy.max_total_sequence_length"
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
}
SHAPES = {
    "8b": {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 14336},
    "70b": {"hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64, "intermediate_size": 28672},
}
RECIPES = {"8b": "configs/dpo_megatron.yaml", "70b": "configs/dpo_llama-3.3-70b.yaml"}


def plan(model: str, folder: Path, ranks: int, lengths: str, gpu: str, overrides: Sequence[str]) -> dict[str, Any]:
    """tools/plan.py's JSON, or {"refused": its first line} where it refuses."""
    command = [sys.executable, "tools/plan.py", RECIPES[model], "--world-size", str(ranks), "--gpu", gpu, "--json"]
    command += ["--lengths", lengths, f"policy.model_name={folder / model}", *overrides]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if done.returncode == 2:
        return {"refused": next(line for line in done.stderr.splitlines()[1:] if line.strip()).strip()[:160]}
    done.check_returncode()
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def row(label: str, found: dict[str, Any]) -> str:
    if "refused" in found:
        return f"| {label} | refused: {found['refused']} | | | | | |"
    step, layout = found["expected"], found["layout"]
    names = {"tensor_parallel": "TP", "context_parallel": "CP", "pipeline_parallel": "PP", "data_parallel": "DP"}
    shown = " ".join(f"{short}{layout[name]}" for name, short in names.items() if layout[name] > 1)
    peak = max(stage["peak_bytes"] for stage in found["stages"]) / GIB
    rate = found["pairs_per_step"] / step["step_s"]
    return (
        f"| {label} | {shown} | {step['step_s']:.2f} | {rate:.1f} | {step['mfu']:.0%} | {step['bubble']:.0%} |"
        f" {peak:.1f} |"
    )


def table(title: str, rows: list[str]) -> None:
    head = [
        f"| {title} | layout | s a step | pairs/s | MFU | bubble | GiB, fullest rank |",
        "|---|---|---|---|---|---|---|",
    ]
    print("", *head, *rows, sep="\n", flush=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpu", default="h100")
    parser.add_argument("--lengths", default="150,350,350", help="PROMPT,CHOSEN,REJECTED tokens of every pair")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="megadpo-plan-") as name:
        folder = Path(name)
        for model, shape in SHAPES.items():
            (folder / model).mkdir()
            (folder / model / "config.json").write_text(json.dumps(LLAMA | shape), encoding="utf-8")

        def planned(model: str, ranks: int, *overrides: str, lengths: str = options.lengths) -> dict[str, Any]:
            return plan(model, folder, ranks, lengths, options.gpu, overrides)

        print(f"{options.gpu}, pairs of {options.lengths} tokens; expected, not measured")
        worlds = (32, 64, 128, 256, 512)
        table("70B, ranks; 128 pairs a step", [row(f"{n}", planned("70b", n)) for n in worlds])
        grown = [row(f"{n}, {4 * n} pairs", planned("70b", n, f"{COPIES}={4 * n}")) for n in worlds]
        table("70B, ranks; 4 pairs a rank", grown)
        packs = (4096, 8192, 16384, 32768)
        table("8B on 8, tokens a pack", [row(f"{n:,}", planned("8b", 8, f"{PACK}={n}")) for n in packs])
        long = []
        for prompt in (512, 2048, 8192, 16384):
            whole = prompt + 1024
            sizes = [f"{LONGEST}={prompt + 512}", f"{PACK}={max(16384, whole)}"]
            long.append(row(f"{prompt:,}", planned("8b", 8, *sizes, lengths=f"{prompt},512,512")))
        table("8B on 8, prompt's tokens; answers of 512", long)
    return 0


if __name__ == "__main__":
    sys.exit(main())
