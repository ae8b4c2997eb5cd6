"""What is left out of the pairs, and why: the list of reasons, each with what to do about it, and the file of the rows,
rollouts, groups and pairs that were left out (PAIRS.rejected.jsonl).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from megadpo.files.jsonl import to_line

MOST_EXAMPLES = 3
"""Places that a report names for a reason; the file has all."""

_MOST_LINE_BYTES = 2**20


@dataclass(frozen=True)
class Reason:
    expected: str
    fix: str


ROW_REASONS: dict[str, Reason] = {
    "line_too_long": Reason(
        "a line of at most 64 MiB", "split the file by lines, or mend the line that was not closed"
    ),
    "broken_utf8": Reason("UTF-8", "write the file in UTF-8, for instance with iconv -t UTF-8"),
    "broken_json": Reason("one JSON object a line", "mend the line, or collect the rollout again"),
    "not_an_object": Reason("one JSON object a line", "write each rollout as an object, one a line (JSONL)"),
    "no_reward": Reason("a field 'reward' with a number", "verify the rollout, or collect it again"),
    "reward_not_a_number": Reason("a number as 'reward'", "write the reward as a JSON number"),
    "reward_not_finite": Reason("a finite reward", "mend the verifier: it divides by zero or overflows"),
    "no_input": Reason(
        "responses_create_params.input as a text or a list of messages", "collect with ng_collect_rollouts' row format"
    ),
    "no_output": Reason("the answer under response.output (or output, in older rows)", "collect the rollout again"),
    "both_generations": Reason("the answer in one place", "remove either 'output' or 'response' from the row"),
    "mixed_generations": Reason(
        "rows of one generation in a file: all with response.output, or all with output",
        "write the rows of each generation to a file of their own and name both",
    ),
    "failed_response": Reason("a response without an error", "collect the rollout again"),
    "incomplete_response": Reason(
        "an answer that came to its end", "raise max_output_tokens and collect again, or build with --keep-incomplete"
    ),
    "no_answer": Reason(
        "an answer that ends in text or a tool call of the assistant",
        "raise max_output_tokens if the answer was cut while the model was thinking",
    ),
    "answer_begins_elsewhere": Reason(
        "an answer that begins with the assistant's turn", "move the turns before it into the input"
    ),
    "prompt_ends_in_assistant": Reason("an input that waits for the assistant", "end the input in a user or tool turn"),
    "unsupported_item": Reason(
        "messages, reasoning, function_call and function_call_output items", "leave such rollouts out: text is trained"
    ),
    "broken_arguments": Reason(
        "tool calls whose arguments are a JSON object", "leave such rollouts out: chat templates write no others"
    ),
    "half_character": Reason("text that UTF-8 can hold", "write both halves of the surrogate pair"),
    "bad_task_index": Reason("an integer or a string as _ng_task_index", "mend it, or use --group-by input"),
    "no_task_index": Reason("_ng_task_index in every row", "use --group-by input, or --num-repeats N"),
    "not_plain_text": Reason(
        "one user message and an answer of plain text, as --text needs", "build without --text, or --reasoning drop"
    ),
}
"""Of rows that can't be used, each written with its line."""

ROLLOUT_REASONS: dict[str, Reason] = {
    "duplicate": Reason("an answer once a group", "nothing: --dedupe keeps the first of equal answers"),
    "contradictory_reward": Reason(
        "one reward for one answer", "mend the verifier, or build without --dedupe, which would keep all of them"
    ),
}
"""Of good rollouts that --dedupe leaves out."""

GROUP_REASONS: dict[str, Reason] = {
    "one_rollout": Reason("at least two rollouts of one prompt", "collect with num_repeats of 2 or more"),
    "one_answer": Reason("two different answers", "raise temperature: after --dedupe the group has one answer left"),
    "inputs_differ": Reason(
        "another rollout of the task with the same input",
        "seed the environment by task: one that starts anew for each rollout gives no pairs",
    ),
    "equal_rewards": Reason(
        "rewards that differ", "raise temperature or num_repeats, or leave out prompts that are too easy or too hard"
    ),
    "small_gap": Reason("two rewards that differ by --min-gap", "lower --min-gap, or raise temperature"),
    "low_chosen_reward": Reason(
        "a chosen reward of --min-chosen-reward with a gap", "lower it, or leave out what the model can't do yet"
    ),
    "same_answers": Reason(
        "different answers where rewards differ", "mend the verifier: it rewards one answer in two ways"
    ),
    "length_ratio": Reason("a pair within --max-length-ratio", "raise it, or collect more answers a prompt"),
}
"""Of groups that give no pair."""

PAIR_REASONS: dict[str, Reason] = {
    "length_balance": Reason(
        "as many pairs whose chosen is longer as pairs whose chosen is shorter",
        "nothing: --balance-lengths leaves out the smallest gaps of the more common side",
    ),
    "duplicate_pair": Reason("a pair once a file", "nothing: --dedupe keeps the first of equal pairs"),
}
"""Of single pairs."""

REASONS = ROW_REASONS | ROLLOUT_REASONS | GROUP_REASONS | PAIR_REASONS


class Unusable(Exception):
    """Why a row can't be used: a key of ROW_REASONS; its text is what was found."""

    def __init__(self, reason: str, found: str) -> None:
        assert reason in ROW_REASONS, reason
        super().__init__(found)
        self.reason = reason


@dataclass
class LeftOut:
    """Writes what is left out to `file`, one object a line, and counts it."""

    file: BinaryIO
    counts: Counter[str] = field(default_factory=Counter)
    """How many of each reason."""
    examples: dict[str, list[str]] = field(default_factory=dict)
    """The first places of each reason, MOST_EXAMPLES at the most."""

    def add_row(self, where: str, reason: str, found: str, line: bytes) -> None:
        """A row that can't be used, with its line (bytes that are no UTF-8 as \\xNN; the first MiB of a long one)."""
        text = line[:_MOST_LINE_BYTES].decode("utf-8", errors="backslashreplace")
        self._write(where, reason, {"where": where, "value": found}, {"line": text})

    def add(self, where: str, reason: str, **facts: object) -> None:
        """A rollout, group or pair; `where` is what the report names."""
        self._write(where, reason, {"where": where}, facts)

    def _write(self, where: str, reason: str, first: dict[str, str], last: dict[str, Any]) -> None:
        self.counts[reason] += 1
        examples = self.examples.setdefault(reason, [])
        if len(examples) < MOST_EXAMPLES:
            examples.append(f"{where}: {first['value']}" if "value" in first else where)
        known = REASONS[reason]
        self.file.write(to_line({"reason": reason, **first, "expected": known.expected, "fix": known.fix, **last}))
