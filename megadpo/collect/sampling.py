"""Finds out if the server doesn't sample: then it gives the same answer to every repetition of a prompt, at any
temperature."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from typing import Any

NEARLY_ALL = 0.9
"""Share of the prompts with several answers."""
LEAST_PROMPTS = 2
_IDS = ("id", "call_id", "status")

SERVERS = {
    "transformers serve": "samples only where the model's generation_config.json says do_sample: true",
    "vLLM and SGLang": "take top_k from the model's generation_config.json if a request has none, and 1 means the likeliest "
    "token: send another, or start vLLM with --generation-config vllm, SGLang with --sampling-defaults openai",
    "SGLang with --enable-deterministic-inference": "gives every request without a seed the same one: "
    "num_repeats_add_seed=true",
    "a server or proxy with a cache of answers": "repeats the first answer: switch the cache off, or num_repeats_add_seed=true",
}
"""Server -> the usual reason, and what to do."""


def answer_digest(output: Any) -> bytes:
    """16 bytes that are equal for answers with the same texts and tool calls. output: `response.output` of a rollout."""
    return hashlib.blake2b(json.dumps(_without_ids(output), sort_keys=True).encode(), digest_size=16).digest()


def _without_ids(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_ids(one) for key, one in value.items() if key not in _IDS}
    return [_without_ids(one) for one in value] if isinstance(value, list) else value


def not_sampling(answers: Iterable[tuple[int, bytes, float | None]]) -> list[str]:
    """Lines for the user if the server doesn't seem to sample; none else. answers: (prompt, digest, temperature) of each
    rollout. Those at temperature 0 are left out, since equal answers are right there."""
    by_prompt: dict[int, Counter[bytes]] = {}
    temperatures: set[float | None] = set()
    for prompt, digest, temperature in answers:
        if temperature != 0:
            by_prompt.setdefault(prompt, Counter())[digest] += 1
            temperatures.add(temperature)
    several = [digests for digests in by_prompt.values() if digests.total() > 1]
    same = sum(len(digests) == 1 for digests in several)
    if len(several) < LEAST_PROMPTS or same < NEARLY_ALL * len(several):
        return []
    sent = sorted(one for one in temperatures if one is not None)
    at = f"at temperature {', '.join(f'{one:g}' for one in sent)}" if sent else "and no temperature was sent"
    lines = [
        f"the server doesn't seem to sample: all answers to {same:,} of {len(several):,} prompts are the same, {at}"
    ]
    lines += [f"  {server}: {meaning}" for server, meaning in SERVERS.items()]
    return [*lines, "  a higher temperature changes nothing then; equal answers make no pair"]
