"""What is left out of the pairs: the list of reasons, each with its fix, and the file of the rows, rollouts, groups and
pairs that were left out (PAIRS.rejected.jsonl).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from megadpo.files.jsonl import to_line

MOST_EXAMPLES = 3
"""Examples of a reason in the report. The file has all."""

_MOST_LINE_BYTES = 2**20


@dataclass(frozen=True)
class Reason:
    expected: str
    fix: str


ROW_REASONS: dict[str, Reason] = {
    "line_too_long": Reason(
        "a line of at most 64 MiB", "end each row with a line break, or correct a row that isn't closed"
    ),
    "broken_utf8": Reason("UTF-8", "convert the file to UTF-8, for instance with iconv -t UTF-8"),
    "broken_json": Reason("one JSON object on each line", "correct the line, or collect the rollout again"),
    "not_an_object": Reason("one JSON object on each line", "write each rollout as an object on its own line (JSONL)"),
    "no_reward": Reason("a field 'reward' with a number", "verify the rollout, or collect it again"),
    "reward_not_a_number": Reason("a number as 'reward'", "write the reward as a JSON number"),
    "reward_not_finite": Reason("a finite reward", "correct the verifier: it divides by zero or overflows"),
    "no_input": Reason(
        "responses_create_params.input as a text or a list of messages", "collect with ng_collect_rollouts' row format"
    ),
    "no_output": Reason("the answer under response.output (or output, in older rows)", "collect the rollout again"),
    "both_generations": Reason("the answer in one field", "remove either 'output' or 'response' from the row"),
    "mixed_generations": Reason(
        "one kind of rows in a file: all with response.output, or all with output",
        "write each kind of rows to its own file, and name both files",
    ),
    "failed_response": Reason("a response without an error", "collect the rollout again"),
    "incomplete_response": Reason(
        "a complete answer", "raise max_output_tokens and collect again, or build with --keep-incomplete"
    ),
    "no_answer": Reason(
        "an answer that ends with text or a tool call of the assistant",
        "raise max_output_tokens if the answer was cut within the reasoning",
    ),
    "answer_begins_elsewhere": Reason(
        "an answer that begins with the assistant's turn", "move the turns before it into the input"
    ),
    "prompt_ends_in_assistant": Reason(
        "an input that the assistant answers next", "end the input with a user or tool turn"
    ),
    "unsupported_item": Reason(
        "messages, reasoning, function_call and function_call_output items",
        "remove the row: only text can be trained on",
    ),
    "broken_arguments": Reason(
        "tool calls whose arguments are a JSON object", "remove the row: chat templates need an object"
    ),
    "half_character": Reason("text that UTF-8 can encode", "write both halves of the surrogate pair"),
    "bad_task_index": Reason("an integer or a string as _ng_task_index", "correct it, or use --group-by input"),
    "no_task_index": Reason("_ng_task_index in every row", "use --group-by input, or --num-repeats N"),
    "not_plain_text": Reason(
        "one user message and an answer of plain text, for --text", "build without --text, or with --reasoning drop"
    ),
}
"""Reasons why a row can't be used."""

ROLLOUT_REASONS: dict[str, Reason] = {
    "duplicate": Reason("each answer once in a group", "nothing: --dedupe keeps the first of equal answers"),
    "contradictory_reward": Reason(
        "one reward for one answer", "correct the verifier, or build without --dedupe, which keeps all of them"
    ),
}
"""Reasons why --dedupe leaves out a usable rollout."""

GROUP_REASONS: dict[str, Reason] = {
    "one_rollout": Reason("at least two rollouts of one prompt", "collect with num_repeats of 2 or more"),
    "one_answer": Reason("two different answers", "raise temperature: after --dedupe the group has one answer left"),
    "inputs_differ": Reason(
        "another rollout of the task with the same input",
        "seed the environment by task, so that all rollouts of a task have the same input",
    ),
    "equal_rewards": Reason(
        "rewards that differ", "raise temperature or num_repeats, or leave out prompts that are too easy or too hard"
    ),
    "small_gap": Reason("two rewards that differ by --min-gap", "lower --min-gap, or raise temperature"),
    "low_chosen_reward": Reason(
        "a chosen reward of at least --min-chosen-reward", "lower it, or leave out prompts that are too hard"
    ),
    "same_answers": Reason(
        "different answers if rewards differ", "correct the verifier: it gives one answer two rewards"
    ),
    "length_ratio": Reason("a pair within --max-length-ratio", "raise it, or collect more answers for each prompt"),
}
"""Reasons why a group gives no pair."""

PAIR_REASONS: dict[str, Reason] = {
    "length_balance": Reason(
        "an equal number of pairs with a longer and with a shorter chosen answer",
        "nothing: --balance-lengths leaves out the pairs with the smallest gaps on the larger side",
    ),
    "duplicate_pair": Reason("each pair once", "nothing: --dedupe keeps the first of equal pairs"),
}
"""Reasons why a pair is left out."""

REASONS = ROW_REASONS | ROLLOUT_REASONS | GROUP_REASONS | PAIR_REASONS


class Unusable(Exception):
    """A row can't be used. `reason`: a key of ROW_REASONS; `found`: what was found in the row."""

    def __init__(self, reason: str, found: str) -> None:
        assert reason in ROW_REASONS, reason
        super().__init__(found)
        self.reason = reason


@dataclass
class LeftOut:
    """Writes what is left out to `file`, one object on each line, and counts it."""

    file: BinaryIO
    counts: Counter[str] = field(default_factory=Counter)
    """Reason -> count."""
    examples: dict[str, list[str]] = field(default_factory=dict)
    """Reason -> its first places, at most MOST_EXAMPLES."""

    def add_row(self, where: str, reason: str, found: str, line: bytes) -> None:
        """Adds an unusable row with its line (bytes that are not UTF-8 as \\xNN; of a long line the first MiB)."""
        text = line[:_MOST_LINE_BYTES].decode("utf-8", errors="backslashreplace")
        self._write(where, reason, {"where": where, "value": found}, {"line": text})

    def add(self, where: str, reason: str, **facts: object) -> None:
        """Adds a rollout, group or pair. `where`: its place, for the report."""
        self._write(where, reason, {"where": where}, facts)

    def _write(self, where: str, reason: str, first: dict[str, str], last: dict[str, Any]) -> None:
        self.counts[reason] += 1
        examples = self.examples.setdefault(reason, [])
        if len(examples) < MOST_EXAMPLES:
            examples.append(f"{where}: {first['value']}" if "value" in first else where)
        known = REASONS[reason]
        self.file.write(to_line({"reason": reason, **first, "expected": known.expected, "fix": known.fix, **last}))
