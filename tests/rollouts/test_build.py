"""Rollouts to a file of pairs: rows, options, what is left out, and that files are whole or absent."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from megadpo.config.problems import DataError
from megadpo.rollouts import build
from megadpo.rollouts.build import build_pairs
from megadpo.rollouts.options import BuildOptions, rejected_path
from megadpo.rollouts.pairing import PairingOptions
from megadpo.rollouts.report import BuildReport
from megadpo.rollouts.row import RowOptions
from tests.data.builders import read_all
from tests.rollouts.builders import call, call_output, current, message, reasoning, write


def built(
    tmp_path: Path, rows: list[Any], options: BuildOptions | None = None
) -> tuple[list[dict], list[dict], BuildReport]:
    """(pairs, what was left out, report)"""
    output = tmp_path / "pairs.jsonl"
    report = build_pairs([write(tmp_path / "r.jsonl", rows)], output, options or BuildOptions())
    pairs = [json.loads(line) for line in output.read_text().splitlines()] if output.exists() else []
    return pairs, [json.loads(line) for line in rejected_path(output).read_text().splitlines()], report


def test_a_row_says_all_that_training_and_people_need(tmp_path: Path) -> None:
    tool = {"type": "function", "name": "add", "parameters": {}}
    more = {"_ng_task_index": 4, "agent_ref": {"name": "sums"}, "params": {"tools": [tool]}}
    right = [reasoning("add"), call("add", '{"a": 2}'), call_output("4"), message("4")]
    (pair,), aside, _ = built(
        tmp_path,
        [
            current("2 + 2?", "5", -0.5, _ng_rollout_index=0, **more),
            current("2 + 2?", right, 1, _ng_rollout_index=1, **more),
        ],
    )
    called = {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
    assert pair == {
        "prompt": [{"role": "user", "content": "2 + 2?"}],
        "tools": [{"type": "function", "function": {"name": "add", "parameters": {}}}],
        "chosen": [
            {"role": "assistant", "content": "", "reasoning_content": "add", "tool_calls": [called]},
            {"role": "tool", "content": "4", "tool_call_id": "call_1", "name": "add"},
            {"role": "assistant", "content": "4"},
        ],
        "rejected": [{"role": "assistant", "content": "5"}],
        "reward_gap": 1.5,
        "chosen_reward": 1.0,
        "rejected_reward": -0.5,
        "chosen_from": f"{tmp_path}/r.jsonl:2 (rollout 1)",
        "rejected_from": f"{tmp_path}/r.jsonl:1 (rollout 0)",
        "task_index": 4,
        "agent": "sums",
    }
    assert aside == []


@pytest.mark.parametrize("text", [False, True])
def test_training_reads_what_was_built(tmp_path: Path, text: bool) -> None:
    rows = [current(f"question {n}?", [message(f"answer {k}")], k) for n in range(5) for k in range(3)]
    options = BuildOptions(row=RowOptions(text=text), pairing=PairingOptions(pairing="all"))
    pairs, _, report = built(tmp_path, rows, options)
    read = read_all(tmp_path / "pairs.jsonl")
    assert len(read) == len(pairs) == len(report.pairs) == 15
    assert isinstance(read[0].prompt, str) == text
    assert (pairs[0]["chosen"] if text else pairs[0]["chosen"][0]["content"]) == "answer 2"


@pytest.mark.parametrize("text", [False, True])
@pytest.mark.parametrize("more", [{}, {"dedupe": True}, {"balance_lengths": True}])
def test_rows_of_answers_make_the_same_pairs(tmp_path: Path, text: bool, more: dict[str, Any]) -> None:
    """With equal answers, equal rewards and a gap that some pairs don't have."""
    rng = random.Random(3)
    said = [(rng.choice(["yes", "no", "perhaps " * 3, "a b"]), rng.choice([0.0, 0.05, 0.5, 1.0])) for _ in range(30)]
    rows = [
        current(f"question {n // 5}?", [message(text)], reward, _ng_task_index=n // 5)
        for n, (text, reward) in enumerate(said)
    ]
    choice = {"row": RowOptions(text=text), "pairing": PairingOptions(pairing="all"), **more}
    alone, _, _ = built(tmp_path, rows, BuildOptions(**choice))
    pairs = read_all(tmp_path / "pairs.jsonl")
    grouped, _, _ = built(tmp_path, rows, BuildOptions(**choice, rows="answers"))
    same = read_all(tmp_path / "pairs.jsonl")
    assert len(grouped) < len(alone) == len(pairs)
    assert [(p.prompt, p.chosen, p.rejected) for p in same] == [(p.prompt, p.chosen, p.rejected) for p in pairs]
    assert grouped[0]["task_index"] == 0 and grouped[0]["answers"][0]["from"].startswith(f"{tmp_path}/r.jsonl:")


def test_groups_without_pairs_go_aside_by_reason(tmp_path: Path) -> None:
    rows = [
        *(current("alone", "a", 1), current("equal", "a", 1), current("equal", "b", 1)),
        *(current("close", "a", 0.55), current("close", "b", 0.5)),
        *(current("same", "a", 1), current("same", "a", 0)),
        *(current("poor", "a", 0.2), current("poor", "b", 0)),
        *(current("long", "a", 1), current("long", "b" * 50, 0)),
        *(current("good", "a", 1), current("good", "b", 0)),
    ]
    options = BuildOptions(pairing=PairingOptions(min_chosen_reward=0.5, max_length_ratio=10))
    pairs, aside, report = built(tmp_path, rows, options)
    assert [pair["prompt"][0]["content"] for pair in pairs] == ["good"]
    reasons = ["one_rollout", "equal_rewards", "small_gap", "same_answers", "low_chosen_reward", "length_ratio"]
    assert [record["reason"] for record in aside] == reasons and set(report.left_out.counts) == set(reasons)
    assert aside[2]["rewards"] == [0.55, 0.5]
    assert aside[2]["rollouts"] == [f"{tmp_path}/r.jsonl:4", f"{tmp_path}/r.jsonl:5"]
    assert all(record["fix"] for record in aside)


def test_every_row_is_in_a_pair_or_aside_or_in_a_group_with_a_pair(tmp_path: Path) -> None:
    draw = random.Random(3)
    rows: list[Any] = []
    for _ in range(200):
        row = current(f"q{draw.randrange(40)}", f"a{draw.randrange(5)}", draw.choice([0, 0.5, 1]))
        rows.append(draw.choice([row, row, row, {**row, "reward": None}, b"{"]))
    for dedupe in (False, True):
        pairs, aside, report = built(tmp_path, rows, BuildOptions(dedupe=dedupe))
        alone = {record["where"] for record in aside if "rollouts" not in record}
        of_groups = {where for record in aside for where in record.get("rollouts", [])}
        with_pairs = {pair["prompt"][0]["content"] for pair in pairs}
        paired = {
            f"{tmp_path}/r.jsonl:{line}"
            for line, row in enumerate(rows, start=1)
            if isinstance(row, dict) and prompt_of(row) in with_pairs
        }
        assert pairs and of_groups and alone and not (of_groups & (paired | alone))
        assert alone | of_groups | paired == {f"{tmp_path}/r.jsonl:{line}" for line in range(1, 201)}
        assert sum(report.left_out.counts.values()) == len(aside)


def prompt_of(row: dict) -> str:
    return row["responses_create_params"]["input"][0]["content"]


def test_dedupe_takes_equal_answers_once_and_none_with_two_rewards(tmp_path: Path) -> None:
    rows = [
        *(current("q", answer, reward) for answer, reward in [("a", 1), ("a", 1), ("b", 0), ("c", 1), ("c", 0)]),
        *(current("q", answer, reward, _ng_task_index=1) for answer, reward in [("a", 1), ("b", 0)]),
    ]
    rows[:5] = [{**row, "_ng_task_index": 0} for row in rows[:5]]
    everything = BuildOptions(pairing=PairingOptions(pairing="all"))
    assert len(built(tmp_path, rows, everything)[0]) == 3 * 2 - 1 + 1  # c over c is no pair
    pairs, aside, report = built(tmp_path, rows, BuildOptions(pairing=everything.pairing, dedupe=True))
    assert [(pair["chosen"][0]["content"], pair["rejected"][0]["content"]) for pair in pairs] == [("a", "b")]
    assert (
        report.left_out.counts == {"duplicate": 1, "contradictory_reward": 2, "duplicate_pair": 1} and len(aside) == 4
    )
    assert report.counts()[3] == (1, "groups with pairs, 1 without (1 of them lost every rollout or pair)")


def test_a_group_that_dedupe_leaves_one_answer_says_so(tmp_path: Path) -> None:
    rows = [current("q", "a", 1), current("q", "a", 1)]
    _, aside, report = built(tmp_path, rows, BuildOptions(dedupe=True))
    assert [record["reason"] for record in aside] == ["duplicate", "one_answer"]
    assert report.counts()[3] == (0, "groups with pairs, 1 without")


def test_balancing_leaves_out_pairs_and_says_so(tmp_path: Path) -> None:
    rows = []
    for n in range(6):
        rows += [current(f"q{n}", "long answer" if n else "s", 1 - n / 20), current(f"q{n}", "short", 0)]
    pairs, aside, report = built(tmp_path, rows, BuildOptions(balance_lengths=True))
    assert report.length_bias == (1, 0, 1) and len(pairs) == 2
    assert [record["reason"] for record in aside] == ["length_balance"] * 4
    assert max(record["reward_gap"] for record in aside) < min(pair["reward_gap"] for pair in pairs)
    assert {at.min_gap: at.pairs for at in report.at_gaps}[0.1] == 2


def test_the_table_of_other_gaps_is_what_other_gaps_give(tmp_path: Path) -> None:
    draw = random.Random(5)
    rows = [current(f"q{n // 4}", f"a{n}" * draw.randrange(1, 9), draw.random() * 1.5) for n in range(200)]
    for pairing in ("best-worst", "all", "best-each", "random"):
        for balance in (False, True):

            def options(gap: float, pairing: str = pairing, balance: bool = balance) -> BuildOptions:
                most = 3 if pairing in ("all", "random") else None
                chosen = PairingOptions(pairing=pairing, min_gap=gap, max_pairs_per_prompt=most)  # type: ignore[arg-type]
                return BuildOptions(pairing=chosen, balance_lengths=balance)

            _, _, report = built(tmp_path, rows, options(0.25))
            assert [at.min_gap for at in report.at_gaps] == [0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.5, 1]
            for at in report.at_gaps:
                _, _, other = built(tmp_path, rows, options(at.min_gap))
                assert (at.pairs, at.prompts) == (len(other.pairs), len({pair.group for pair in other.pairs}))


def test_a_task_of_several_inputs_gives_no_pair_and_says_why(tmp_path: Path) -> None:
    rows = [current(f"Your hand: {hand}", "hit", hand, _ng_task_index=0) for hand in (1, 2)]
    pairs, aside, report = built(tmp_path, rows)
    assert not pairs and [record["reason"] for record in aside] == ["inputs_differ"] * 2
    assert "2 different inputs (lines 1, 2)" in report.remarks()[0]


def test_grouping_by_task_sets_rows_without_an_index_aside(tmp_path: Path) -> None:
    rows = [current("q", "a", 1, _ng_task_index=0), current("q", "b", 0, _ng_task_index=0), current("q", "c", 0)]
    pairs, aside, _ = built(tmp_path, rows, BuildOptions(group_by="task"))
    assert len(pairs) == 1 and [record["reason"] for record in aside] == ["no_task_index"]
    assert aside[0]["where"] == f"{tmp_path}/r.jsonl:3"


def test_without_a_pair_an_older_file_stays(tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text("older\n")
    output = tmp_path / "pairs.jsonl"
    report = build_pairs([write(tmp_path / "r.jsonl", [current("q", "a", 1)])], output, BuildOptions())
    assert not report.pairs and output.read_text() == "older\n"
    assert rejected_path(output).read_text().count("\n") == 1


def test_an_error_in_the_middle_leaves_no_file_and_takes_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "r.jsonl", [current("q", "a", 1), current("q", "b", 0)])
    output = tmp_path / "pairs.jsonl"
    output.write_text("older\n")

    def fails(*_: object, **__: object) -> dict:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(build, "pair_row", fails)
    with pytest.raises(DataError, match="No space left"):
        build_pairs([path], output, BuildOptions())
    assert sorted(file.name for file in tmp_path.iterdir()) == ["pairs.jsonl", "r.jsonl"]
    assert output.read_text() == "older\n"


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    rows = [current(f"q{n // 5}", f"a{n}" * (n % 7 + 1), (n * 7 % 5) / 4) for n in range(100)]
    options = BuildOptions(pairing=PairingOptions(pairing="random", max_pairs_per_prompt=2), balance_lengths=True)
    built(tmp_path, rows, options)
    first = (tmp_path / "pairs.jsonl").read_bytes()
    built(tmp_path, rows, options)
    assert (tmp_path / "pairs.jsonl").read_bytes() == first
