"""The pairing scripts of NeMo Gym's DPO guides, run as they stand, give what the right flags give.

The guides don't ship with the project; where they are absent this is skipped, saying so."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import re
from pathlib import Path
from typing import Any

import pytest

from megadpo.messages.responses import to_messages
from megadpo.rollouts.build import build_pairs
from megadpo.rollouts.options import BuildOptions
from megadpo.rollouts.pairing import PairingOptions
from megadpo.rollouts.row import RowOptions
from tests.rollouts.builders import message, older, write

FOLDER = Path(os.environ.get("MEGADPO_SEEDS") or Path(__file__).resolve().parents[3] / "shared" / "seeds")
GUIDES = sorted(FOLDER.glob("*.txt"))

pytestmark = pytest.mark.skipif(not GUIDES, reason=f"no guides in {FOLDER}: set MEGADPO_SEEDS to their folder")


def script(mark: str) -> str:
    """The one Python block of the guides that holds `mark`."""
    texts = [path.read_text(encoding="utf-8") for path in GUIDES]
    (found,) = [
        block for text in texts for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if mark in block
    ]
    return found


def rollouts(num_repeats: int) -> list[dict[str, Any]]:
    """Plain one-turn rows in the order of collection, with ties and gaps of about 0.1 among them."""
    draw = random.Random(11)
    return [
        older(f"question {n}?", [message(f"answer {n}.{k}"), message("with more")][: 1 + (n + k) % 2], reward)
        for n in range(60)
        for k in range(num_repeats)
        for reward in [draw.choice([0.0, 0.25, 0.5, 0.6, 0.7, 0.85, 1.0])]
    ]


def run_in(folder: Path, code: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {}
    with contextlib.redirect_stdout(io.StringIO()):
        exec(code, names)
    return names


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_pair_of_an_input_with_a_gap_of_0_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """megadpo pairs rollouts.jsonl --pairing all --min-gap 0.1 --group-by input --text"""
    path = write(tmp_path / "rollouts.jsonl", rollouts(4))
    run_in(tmp_path, script("create_dpo_pairs"), monkeypatch)
    want = read(tmp_path / "dpo_train.jsonl")
    options = BuildOptions(
        row=RowOptions(text=True), pairing=PairingOptions(pairing="all", min_gap=0.1), group_by="input"
    )
    build_pairs([path], tmp_path / "pairs.jsonl", options)
    got = read(tmp_path / "pairs.jsonl")
    assert [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in got] == want and len(want) > 100


@pytest.mark.parametrize("left_over", [0, 2])
def test_best_and_worst_of_three_consecutive_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left_over: int
) -> None:
    """megadpo pairs dpo_rollouts.jsonl --num-repeats 3 --min-gap 0.15"""
    rows = rollouts(3)
    path = write(tmp_path / "dpo_rollouts.jsonl", rows[: len(rows) - 3 + left_over])
    want = run_in(tmp_path, script("num_repeats = 3"), monkeypatch)["pairs"]
    options = BuildOptions(pairing=PairingOptions(min_gap=0.15), num_repeats=3)
    build_pairs([path], tmp_path / "pairs.jsonl", options)
    got = [
        {key: row[key] for key in ("prompt", "chosen", "rejected", "reward_gap")}
        for row in read(tmp_path / "pairs.jsonl")
    ]
    as_messages = [
        {key: value if key == "reward_gap" else to_messages(value, key)[0] for key, value in pair.items()}
        for pair in want
    ]
    assert got == as_messages and len(want) > 30
