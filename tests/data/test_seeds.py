"""The JSON snippets of the guides that users come from, as they stand there: rows to read, or a reason why not.

Sources: NeMo Gym's DPO training and DPO sampling guides, NeMo RL's DPO guide, and two DPO tutorials of NeMo RL."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megadpo.config.problems import DataError
from tests.data.builders import read_all

GYM_REQUIRED_FORMAT = """\
{
  "prompt": "What is 47 \xc3\u2014 23?",
  "chosen": "Let me calculate: 47 * 23 = 1,081",
  "rejected": "I think it's around 1,000"
}
"""

NEMO_RL_SCHEMA = """\
{
  "context": [], // list of dicts - The prompt message (including previous turns, if any)
  "completions": [ // list of dicts \u2014 The list of completions
    {
      "rank": 0, // int \u2014 The rank of the completion (lower rank is preferred)
      "completion": [] // list of dicts \u2014 The completion message(s)
    },
    {
      "rank": 1, // int \u2014 The rank of the completion (lower rank is preferred)
      "completion": [] // list of dicts \u2014 The completion message(s)
    }
  ]
}
"""

NEMO_RL_EXAMPLE = """\
{
    "context": [
        {
            "role": "user",
            "content": "What's the capital of France?"
        },
        {
            "role": "assistant",
            "content": "The capital of France is Paris."
        },
        {
            "role": "user",
            "content": "Thanks! And what's the capital of Germany?"
        }
    ],
    "completions": [
        {
            "rank": 0,
            "completion": [
                {
                    "role": "assistant",
                    "content": "The capital of Germany is Berlin."
                }
            ]
        },
        {
            "rank": 1,
            "completion": [
                {
                    "role": "assistant",
                    "content": "The capital of Germany is Munich."
                }
            ]
        }
    ]
}
"""

TUTORIAL_FORMAT = """\
{
    "prompt": "Your instruction or prompt here",
    "chosen": "Preferred model response",
    "rejected": "Non-preferred model response"
}
"""

GET_STARTED_FORMAT = """\
{
  "prompt": "What is the capital of France?",
  "chosen": "The capital of France is Paris.",
  "rejected": "I think it's London."
}
"""


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def bot(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


SNIPPETS: dict[str, tuple[str, Any]] = {
    GYM_REQUIRED_FORMAT: (
        "BinaryPreferenceDataset",
        ("What is 47 \xc3\u2014 23?", "Let me calculate: 47 * 23 = 1,081", "I think it's around 1,000"),
    ),
    NEMO_RL_EXAMPLE: (
        "PreferenceDataset",
        (
            (
                user("What's the capital of France?"),
                bot("The capital of France is Paris."),
                user("Thanks! And what's the capital of Germany?"),
            ),
            (bot("The capital of Germany is Berlin."),),
            (bot("The capital of Germany is Munich."),),
        ),
    ),
    TUTORIAL_FORMAT: (
        "BinaryPreferenceDataset",
        ("Your instruction or prompt here", "Preferred model response", "Non-preferred model response"),
    ),
    GET_STARTED_FORMAT: (
        "BinaryPreferenceDataset",
        ("What is the capital of France?", "The capital of France is Paris.", "I think it's London."),
    ),
}


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_a_snippet_is_a_row(snippet: str, tmp_path: Path) -> None:
    name, texts = SNIPPETS[snippet]
    (tmp_path / "verbatim.json").write_text(snippet * 2, encoding="utf-8")
    (tmp_path / "one_a_line.jsonl").write_text(json.dumps(json.loads(snippet)) + "\n")
    for path in ("verbatim.json", "one_a_line.jsonl"):
        for dataset_name in (None, name):
            for pair in read_all(tmp_path / path, dataset_name=dataset_name):
                assert (pair.prompt, pair.chosen, pair.rejected) == texts


def test_a_snippet_over_several_lines_of_a_jsonl_file_is_told_apart(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text(GYM_REQUIRED_FORMAT, encoding="utf-8")
    with pytest.raises(DataError) as refused:
        read_all(tmp_path / "p.jsonl")
    assert "p.jsonl:1: " in str(refused.value) and "name the file .json if objects span lines" in str(refused.value)


def test_the_schema_with_comments_is_no_data(tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text(NEMO_RL_SCHEMA, encoding="utf-8")
    with pytest.raises(DataError) as refused:
        read_all(tmp_path / "p.json")
    assert "p.json:2: " in str(refused.value) and "remove comments" in str(refused.value)
    bare = "\n".join(line.split(" //")[0] for line in NEMO_RL_SCHEMA.splitlines())
    (tmp_path / "p.json").write_text(bare, encoding="utf-8")
    with pytest.raises(DataError) as refused:
        read_all(tmp_path / "p.json")
    said = str(refused.value)
    assert "'context' without messages" in said and "completions[0].completion" in said


def test_the_guides_dpo_dataset_keys(tmp_path: Path) -> None:
    row = {"prompt": "q", "chosen_response": "yes", "rejected_response": "no"}
    (tmp_path / "p.jsonl").write_text(json.dumps(row))
    (pair,) = read_all(tmp_path / "p.jsonl")
    assert (pair.prompt, pair.chosen, pair.rejected) == ("q", "yes", "no")


def test_pairs_as_the_training_guides_script_writes_them(tmp_path: Path) -> None:
    """`all_pairs`, one json.dumps a line, with fields that training does not read beside them."""
    pairs = [{"prompt": f"q {n}", "chosen": "yes", "rejected": "no", "reward_gap": 0.5} for n in range(3)]
    with (tmp_path / "dpo_train.jsonl").open("w") as f:
        for pair in pairs:
            f.write(json.dumps(pair) + "\n")
    assert [pair.prompt for pair in read_all(tmp_path / "dpo_train.jsonl")] == ["q 0", "q 1", "q 2"]
