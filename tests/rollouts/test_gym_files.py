"""Real rollouts of NeMo Gym: every file builds or says why not. Skipped, saying so, where they are absent."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import pytest

from megadpo.rollouts.build import build_pairs
from megadpo.rollouts.options import BuildOptions, rejected_path
from megadpo.rollouts.report import BuildReport
from tests.data.builders import read_all

FOLDER = Path(os.environ.get("MEGADPO_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data")
FILES = sorted((FOLDER / "gym_rollouts").glob("*.jsonl"))

pytestmark = pytest.mark.skipif(not FILES, reason=f"no gym_rollouts in {FOLDER}: set MEGADPO_DATA to their folder")

# groups (all as they should be: these examples hold no two rewards for one input), and why they give no pair
EXPECTED = {
    "aalcr": (2, {"equal_rewards": 2}),
    "arc_agi": (2, {"equal_rewards": 1, "one_rollout": 1}),
    "blackjack": (5, {"inputs_differ": 5}),
    "calendar": (5, {"one_rollout": 5}),
    "instruction_following": (5, {"one_rollout": 5}),
    "reasoning_gym": (5, {"one_rollout": 5}),
    "workplace_assistant": (5, {"one_rollout": 5}),
}


def build(paths: list[Path], output: Path) -> BuildReport:
    return build_pairs(paths, output, BuildOptions())


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_as_it_is_says_why_it_gives_no_pair(path: Path, tmp_path: Path) -> None:
    report = build([path], tmp_path / "pairs.jsonl")
    assert len(report.rewards) == 5
    if path.stem in EXPECTED:
        assert (len(report.grouping.groups), dict(report.left_out.counts)) == EXPECTED[path.stem]
    assert rejected_path(tmp_path / "pairs.jsonl").read_text().count("\n") == sum(report.left_out.counts.values())


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_second_answer_with_another_reward_makes_a_pair(path: Path, tmp_path: Path) -> None:
    """Each row once more, with its last words changed and a reward 0.5 lower."""
    rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    doubled = [variant for row in rows for variant in (row, worse(row))]
    made = tmp_path / "rollouts.jsonl"
    made.write_text("".join(json.dumps(row) + "\n" for row in doubled))
    report = build([made], tmp_path / "pairs.jsonl")
    pairs = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    assert len(pairs) == len(report.grouping.groups) and not report.left_out.counts
    for pair in pairs:
        original = rows[(int(pair["chosen_from"].split(".jsonl:")[1].split()[0]) - 1) // 2]
        assert_same_words(original, pair)
    assert len(read_all(tmp_path / "pairs.jsonl")) == len(pairs)


def worse(row: dict[str, Any]) -> dict[str, Any]:
    changed = copy.deepcopy(row)
    changed["reward"] -= 0.5
    changed["response"]["output"][-1]["content"][0]["text"] += " I think."
    return changed


def assert_same_words(row: dict[str, Any], pair: dict[str, Any]) -> None:
    """Every text of the row's input and output is in the pair, in order, and nothing else is."""
    assert said(pair["prompt"]) == said_by_items(row["responses_create_params"]["input"])
    assert said(pair["chosen"]) == said_by_items(row["response"]["output"])
    assert len(pair.get("tools", [])) == len(row["responses_create_params"]["tools"])


def said(messages: list[dict[str, Any]]) -> list[Any]:
    texts: list[Any] = []
    for message in messages:
        texts += [message[key] for key in ("reasoning_content", "content") if message.get(key)]
        texts += [call["function"]["arguments"] for call in message.get("tool_calls", [])]
    return texts


def said_by_items(items: list[dict[str, Any]]) -> list[Any]:
    texts: list[Any] = []
    for item in items:
        if item["type"] == "function_call":
            texts.append(json.loads(item["arguments"]))
        else:
            content = item.get("summary") or item.get("content") or item.get("output")
            texts.append(content if isinstance(content, str) else content[0]["text"])
    return texts
