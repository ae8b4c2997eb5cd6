"""The demo's data: every right answer is right, every slip is wrong, and no held-out sum is trained on."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

from megadpo.demo.sums import (
    FORGETS_TO_CARRY,
    is_right,
    pupils_answer,
    question,
    split_sums,
    worked_answer,
    write_preferences,
    write_warm_up,
)

ALL_SUMS = [(a, b) for a in range(10, 100) for b in range(10, 100)]


def test_worked_answers():
    assert worked_answer(17, 25) == "7+5=12, carry 1. 1+2+1=4. Answer: 42"
    assert worked_answer(17, 25, slip=True) == "7+5=12, carry 0. 1+2+0=3. Answer: 32"
    assert worked_answer(99, 99) == "9+9=18, carry 1. 9+9+1=19. Answer: 198"
    assert worked_answer(12, 34, slip=True) == "2+4=6, carry 1. 1+3+1=5. Answer: 56"


def test_every_worked_answer_is_right_and_every_slip_is_wrong():
    for a, b in ALL_SUMS:
        assert is_right(a, b, worked_answer(a, b))
        assert not is_right(a, b, worked_answer(a, b, slip=True))
        # each step of the right one is true, not only the result
        for step, total in re.findall(r"([\d+]+)=(\d+)", worked_answer(a, b)):
            assert sum(map(int, step.split("+"))) == int(total)


def test_an_answer_without_a_number_is_wrong():
    assert not is_right(1, 2, "I don't know.")


def test_the_pupil_slips_only_where_there_is_a_carry_and_as_often_as_said():
    rng = random.Random(0)
    right = {pair: is_right(*pair, pupils_answer(*pair, rng)) for pair in ALL_SUMS}
    carries = [right[a, b] for a, b in ALL_SUMS if a % 10 + b % 10 >= 10]
    assert all(right[a, b] for a, b in ALL_SUMS if a % 10 + b % 10 < 10)
    assert abs((1 - sum(carries) / len(carries)) - FORGETS_TO_CARRY) < 0.03


def test_held_out_sums_are_in_neither_order_among_the_training_sums():
    training, held_out = split_sums(held_out=200, seed=1)
    assert len(held_out) == 200
    assert not {frozenset(pair) for pair in held_out} & {frozenset(pair) for pair in training}
    assert {frozenset(pair) for pair in [*held_out, *training]} == {frozenset(pair) for pair in ALL_SUMS}
    assert split_sums(held_out=200, seed=1) == (training, held_out)
    other = split_sums(held_out=200, seed=2)[1]
    assert len({frozenset(pair) for pair in held_out} & {frozenset(pair) for pair in other}) < 50


def test_files(tmp_path: Path):
    sums = [(17, 25), (12, 34)]
    write_warm_up(tmp_path / "new/warm_up.jsonl", sums, seed=1)
    write_preferences(tmp_path / "new/preferences.jsonl", sums)
    warm_up, preferences = (
        [json.loads(line) for line in (tmp_path / "new" / name).read_text().splitlines()]
        for name in ("warm_up.jsonl", "preferences.jsonl")
    )
    assert [row["prompt"] for row in warm_up] == [question(*pair) for pair in sums]
    assert preferences[0] == {
        "prompt": "What is 17+25?\n",
        "chosen": worked_answer(17, 25),
        "rejected": worked_answer(17, 25, slip=True),
    }
