"""Weights and rewards of rows: read in every format, kept with the tokens, and part of the fingerprint."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from megadpo.config.problems import DataError
from megadpo.data.pairs import PairDataset
from megadpo.data.tokens.cache import TokenCache
from megadpo.data.tokens.dataset import open_dataset
from megadpo.data.tokens.encode import DataSettings
from tests.data.builders import read_all, row, write_rows
from tests.helpers.tiny_tokenizer import tiny_tokenizer

RANKED = {"context": "2+2?", "completions": [{"rank": 1, "completion": "5"}, {"rank": 0, "completion": "4"}]}


@pytest.mark.parametrize(
    "given", [row(), RANKED, {"context": "a?", "response1": "b", "response2": "c", "overall_preference": 2}]
)
@pytest.mark.parametrize(
    ("fields", "weight", "rewards"),
    [
        ({}, 1.0, None),
        ({"weight": None}, 1.0, None),
        ({"weight": 0}, 0.0, None),
        ({"weight": 2.5, "chosen_reward": 1, "rejected_reward": -0.5}, 2.5, (1.0, -0.5)),
        ({"score_chosen": 9.5, "score_rejected": 4}, 1.0, (9.5, 4.0)),
        ({"chosen_reward": 1, "rejected_reward": None, "score_chosen": 2, "score_rejected": 1}, 1.0, (1.0, math.nan)),
        ({"chosen_reward": "high", "rejected_reward": True}, 1.0, None),
    ],
)
def test_fields(
    given: dict[str, Any], fields: dict[str, Any], weight: float, rewards: tuple[float, float] | None, tmp_path: Path
) -> None:
    (pair,) = read_all(write_rows(tmp_path / "p.jsonl", [{**given, **fields}]))
    assert pair.weight == weight
    assert pair.rewards == pytest.approx(rewards or (math.nan, math.nan), nan_ok=True)


def test_scores_are_the_rewards(tmp_path: Path) -> None:
    answers = [{"text": "5", "score": 0}, {"text": "4", "score": 1.5}, {"text": "6", "score": -1}]
    rows = [
        {"prompt": "2+2?", "answers": answers, "weight": 0.5},
        {"prompt": "1+1?", "answers": [{"text": "2"}, {"text": "3"}], "pairs": [[0, 1]]},
    ]
    *ranked, unscored = read_all(write_rows(tmp_path / "p.jsonl", rows))
    assert [(pair.chosen, pair.rejected, *pair.rewards, pair.weight) for pair in ranked] == [
        ("4", "5", 1.5, 0.0, 0.5), ("4", "6", 1.5, -1.0, 0.5), ("5", "6", 0.0, -1.0, 0.5)
    ]  # fmt: skip
    assert all(math.isnan(reward) for reward in unscored.rewards)


@pytest.mark.parametrize("weight", [-1, "heavy", True, [1]])
def test_a_weight_that_is_none_is_refused(weight: object, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"p.jsonl:1: got .*weight .*0 or more"):
        read_all(write_rows(tmp_path / "p.jsonl", [row(weight=weight)]))


def opened(folder: Path, name: str, rows: list[dict[str, Any]]) -> PairDataset:
    path = write_rows(folder / name, rows)
    return open_dataset(
        path,
        tiny_tokenizer(),
        DataSettings(max_total_sequence_length=100, on_too_long="truncate"),
        cache=TokenCache(folder / "cache"),
    )


def test_they_are_kept_with_the_tokens(tmp_path: Path) -> None:
    plain = [row(number) for number in range(4)]
    long = row(9, prompt="the " * 300)  # is cut
    weighted = [
        {**plain[0], "weight": 0.5},
        plain[1],
        {**long, "weight": 3, "chosen_reward": 2, "rejected_reward": 1.25},
    ]
    pairs = opened(tmp_path, "weighted.jsonl", weighted)
    assert pairs.weights.tolist() == [0.5, 1.0, 3.0] == [pair.weight for pair in pairs]
    assert pairs.reward_gaps.tolist() == pytest.approx([math.nan, math.nan, 0.75], nan_ok=True)
    assert pairs[2].rewards == (2.0, 1.25) and pairs.report.truncated == 1
    assert "2 with a weight other than 1" in str(pairs.report)
    same = opened(tmp_path, "plain.jsonl", [plain[0], plain[1], long])
    ones = opened(tmp_path, "ones.jsonl", [{**one, "weight": 1} for one in (plain[0], plain[1], long)])
    assert same.fingerprint == ones.fingerprint != pairs.fingerprint
