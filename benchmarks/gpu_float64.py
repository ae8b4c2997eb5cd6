"""The first step of benchmarks/gpu.py in float64, by transformers: `python gpu_float64.py SPEC.json RESULT.json`.

SPEC.json: fields of trl_worker.Spec. RESULT.json: `first_step` with the mean logps of chosen and rejected answers over the
first global batch, and the norm of the DPO loss's gradient. Before the first update policy and reference are one, every
logratio is 0, and the gradient is beta/2 times the mean of d (rejected - chosen logps). Needs 16 bytes a parameter.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))  # run as a script, the path starts in benchmarks/

from benchmarks.trl_worker import Spec, gpu_memory, load_rows, peak_memory_bytes  # noqa: E402


def first_step(spec: Spec) -> dict[str, float]:
    """logps/chosen, logps/rejected and grad_norm of the first `global_batch_pairs` rows."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(spec.model)
    model: Any = AutoModelForCausalLM.from_pretrained(spec.model, dtype=torch.float64, attn_implementation="sdpa")
    model.to(spec.device).train()
    rows = load_rows(spec, tokenizer)[: spec.global_batch_pairs]
    sums = {"chosen": 0.0, "rejected": 0.0}
    for row in rows:
        prompt = tokenizer(row["prompt"])["input_ids"]
        for answer, sign in (("chosen", -1.0), ("rejected", 1.0)):
            ids = tokenizer(row["prompt"] + row[answer])["input_ids"] + [tokenizer.eos_token_id]
            logps = answer_logps(model, torch.tensor([ids], device=spec.device), len(prompt))
            (sign * spec.beta / 2 / len(rows) * logps).backward()
            sums[answer] += logps.item()
    squares = [parameter.grad.square().sum() for parameter in model.parameters() if parameter.grad is not None]
    means = {f"logps/{answer}": total / len(rows) for answer, total in sums.items()}
    return means | {"grad_norm": torch.stack(squares).sum().sqrt().item()}


def answer_logps(model: Any, ids: torch.Tensor, prompt: int) -> torch.Tensor:
    """Sum over the tokens after the first `prompt` ones; ids [1, tokens]. Only their logits are computed."""
    hidden = model.model(ids, use_cache=False).last_hidden_state[0, prompt - 1 : -1]
    logps = model.lm_head(hidden).log_softmax(-1)
    return logps.gather(-1, ids[0, prompt:, None]).sum()


def main() -> int:
    spec_path, result_path = sys.argv[1:]
    spec = Spec(**json.loads(Path(spec_path).read_text(encoding="utf-8")))
    torch.set_num_threads(spec.threads)
    content = {"first_step": first_step(spec), "peak_bytes": peak_memory_bytes(), **gpu_memory()}
    Path(result_path).write_text(json.dumps(content), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
