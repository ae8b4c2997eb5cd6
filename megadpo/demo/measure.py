"""Scores a model on the held-out sums. It uses only transformers, so it also checks the export."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from megadpo.demo.sums import Sum, is_right, question, worked_answer

ANSWER_TOKENS = 40  # a worked answer has up to 27


@dataclass(frozen=True, kw_only=True)
class Score:
    """The score of one model on the held-out pairs."""

    preference_accuracy: float
    """Share (0..1) of pairs whose chosen answer is more likely for the model than the rejected one."""
    mean_margin: float
    """Mean of log p(chosen) - log p(rejected), sums over the answer's tokens, in nats."""
    right_answers: float
    """Share (0..1) of questions whose greedy answer ends with the right sum."""
    example: str
    """The greedy answer to the first question that needs a carry."""
    margins: list[float]
    """Per pair, in nats."""


def score(folder: Path, sums: Sequence[Sum]) -> Score:
    """Open a Hugging Face folder with transformers and score it on every sum."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False, dtype=torch.float32).eval()
    chosen = answer_logps(model, tokenizer, [(question(a, b), worked_answer(a, b)) for a, b in sums])
    rejected = answer_logps(model, tokenizer, [(question(a, b), worked_answer(a, b, slip=True)) for a, b in sums])
    answers = greedy_answers(model, tokenizer, [question(a, b) for a, b in sums])
    margins = chosen - rejected
    first_carry = next(i for i, (a, b) in enumerate(sums) if a % 10 + b % 10 >= 10)
    return Score(
        preference_accuracy=(margins > 0).float().mean().item(),
        mean_margin=margins.mean().item(),
        right_answers=sum(is_right(a, b, text) for (a, b), text in zip(sums, answers, strict=True)) / len(sums),
        example=question(*sums[first_carry]).strip() + " " + answers[first_carry],
        margins=margins.tolist(),
    )


@torch.inference_mode()
def answer_logps(model: Any, tokenizer: Any, texts: Sequence[tuple[str, str]]) -> torch.Tensor:
    """log p(answer, EOS | question) in nats for (question, answer) texts: float32 [len(texts)]."""
    rows, starts = [], []
    for prompt, answer in texts:
        rows.append([*tokenizer(prompt + answer).input_ids, tokenizer.eos_token_id])
        starts.append(len(tokenizer(prompt).input_ids))
    longest = max(map(len, rows))
    ids = torch.tensor([row + [tokenizer.pad_token_id] * (longest - len(row)) for row in rows])
    position = torch.arange(longest)
    lengths = torch.tensor([len(row) for row in rows])
    is_answer = (position >= torch.tensor(starts)[:, None]) & (position < lengths[:, None])
    logits = model(ids).logits[:, :-1]  # causal: padding after the answer has no effect
    token_logps = -F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    return (token_logps * is_answer[:, 1:]).sum(dim=1)


@torch.inference_mode()
def greedy_answers(model: Any, tokenizer: Any, prompts: Sequence[str]) -> list[str]:
    """The greedy continuation of each prompt; all prompts have the same number of tokens."""
    ids = torch.tensor(tokenizer(list(prompts)).input_ids)
    output = model.generate(ids, max_new_tokens=ANSWER_TOKENS, do_sample=False)
    return [str(text) for text in tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)]


def read_metrics(log_dir: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl."""
    return [json.loads(line) for line in (log_dir / "metrics.jsonl").read_text().splitlines()]
