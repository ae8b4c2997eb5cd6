"""A file as a data set: compact, counted, fingerprinted."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace as Section
from typing import Any, cast

import pytest

from megadpo.config.architecture import Architecture
from megadpo.config.problems import DataError
from megadpo.config.schema import Config
from megadpo.data.chosen import hold_out
from megadpo.data.pairs import PairDataset
from megadpo.data.tokens.dataset import load_datasets, open_dataset
from megadpo.data.tokens.encode import DataSettings
from tests.data.builders import as_lists, dataset, row, write_rows
from tests.helpers.tiny_tokenizer import CHATML, tiny_tokenizer


def test_a_file_becomes_pairs_in_order_with_their_rows(tmp_path: Path) -> None:
    pairs = dataset(tmp_path, 5)
    assert len(pairs) == 5 and [pair.index for pair in pairs] == [0, 1, 2, 3, 4]
    assert pairs.max_token_id == max(int(t) for p in pairs for ids in as_lists(p)[1:] for t in ids)


def test_rows_and_lines_stay_those_of_the_file_when_pairs_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    write_rows(path, [row(0), row(1, prompt="the " * 400), row(2)])
    path.write_text("\n" + path.read_text(encoding="utf-8"), encoding="utf-8")
    settings = DataSettings(max_total_sequence_length=100, on_too_long="drop")
    pairs = open_dataset(path, tiny_tokenizer(adds_bos=True), settings)
    assert [pair.index for pair in pairs] == [0, 2]
    assert pairs.source_of(2) == f"{path}:4"
    assert (pairs.report.rows, pairs.report.pairs, pairs.report.dropped_too_long) == (3, 2, 1)
    assert "3 rows, 2 pairs, 1 dropped as too long; as plain text" in str(pairs.report)


def test_the_report_counts_what_happened(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(adds_bos=True)
    rows = [
        row(0, prompt="the " * 400),  # cut
        row(1, prompt="the", chosen="y" + "a" * 200, rejected="y" + "a" * 199 + "!"),  # equal once cut
        row(2, prompt="t", chosen="he", rejected="!"),  # merges over the line
    ]
    settings = DataSettings(max_total_sequence_length=100, on_too_long="truncate")
    report = open_dataset(write_rows(tmp_path / "p.jsonl", rows), tokenizer, settings).report
    assert (report.truncated, report.dropped_equal_after_truncation, report.tokenized_apart) == (1, 1, 1)
    assert (report.rows, report.pairs) == (3, 2)
    for words in ("1 cut to the limit", "1 dropped because", "1 with the answer tokenised alone"):
        assert words in str(report)


def test_a_cut_prompt_is_held_out_with_all_of_its_pairs(tmp_path: Path) -> None:
    """Longer answers leave less of their prompt, and the shortest ones all of it."""
    prompts, ends = ["the " * 60 + f"question {number}" for number in range(8)], [" yes", " sum" * 30, " sum" * 40]
    rows = [{"prompt": prompt, "chosen": end + "!", "rejected": end + "?"} for prompt in prompts for end in ends]
    settings = DataSettings(max_total_sequence_length=100, on_too_long="truncate")
    pairs = open_dataset(write_rows(tmp_path / "p.jsonl", rows), tiny_tokenizer(), settings)
    assert (
        len(pairs) == 24
        and len({pair.prompt_ids.tobytes() for pair in pairs}) == 3 * 8
        and pairs.report.truncated == 16
    )
    rest, held = hold_out(pairs, 0.25)
    held_prompts, left = ({pair.index // 3 for pair in one} for one in (held, rest))
    assert (len(held_prompts), len(left)) == (2, 6) and not held_prompts & left


def test_the_report_totals_tokens(tmp_path: Path) -> None:
    pairs = dataset(tmp_path, 7)
    report = pairs.report
    assert report.prompt_tokens == sum(pair.prompt_tokens for pair in pairs)
    assert report.chosen_tokens == sum(pair.chosen_tokens for pair in pairs)
    assert report.rejected_tokens == sum(pair.rejected_tokens for pair in pairs)
    shared, repeated = (int(pairs.packed_tokens(share_prompt=share).sum()) for share in (True, False))
    assert report.shared_prompt_saving == pytest.approx(1 - shared / repeated)


def test_a_too_long_pair_is_refused_at_its_line(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "p.jsonl", [row(0), row(1, prompt="the " * 400)])
    with pytest.raises(DataError, match=f"{path}:2: "):
        open_dataset(path, tiny_tokenizer(), DataSettings(max_total_sequence_length=100))


def test_a_file_of_which_nothing_is_left_is_refused(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "p.jsonl", [row(0, prompt="the " * 400)])
    settings = DataSettings(max_total_sequence_length=100, on_too_long="drop")
    with pytest.raises(DataError, match="1 pairs, all longer than 100 tokens"):
        open_dataset(path, tiny_tokenizer(), settings)


def test_the_fingerprint_follows_tokens_and_settings_but_not_the_files_name(tmp_path: Path) -> None:
    rows = [row(number) for number in range(4)]
    first = write_rows(tmp_path / "a.jsonl", rows)
    tokenizer, settings = tiny_tokenizer(), DataSettings(max_total_sequence_length=200)

    def fingerprint(path: Path, **changes: Any) -> str:
        changed = DataSettings(**{**vars(settings), **changes})
        return open_dataset(path, tokenizer, changed).fingerprint

    assert fingerprint(first) == fingerprint(write_rows(tmp_path / "b.jsonl", rows)) and len(fingerprint(first)) == 64
    others = [
        fingerprint(write_rows(tmp_path / "f.jsonl", [row(0, chosen=" 0 is rught"), *rows[1:]])),  # as many tokens
        fingerprint(write_rows(tmp_path / "c.jsonl", rows[::-1])),
        fingerprint(write_rows(tmp_path / "d.jsonl", rows[:3])),
        fingerprint(write_rows(tmp_path / "e.jsonl", [*rows[:3], row(3, chosen="else")])),
        fingerprint(first, max_total_sequence_length=201),
        fingerprint(first, on_too_long="drop"),
        fingerprint(first, chat_template=CHATML),
    ]
    assert len({fingerprint(first), *others}) == 8


def test_the_boundary_between_texts_is_part_of_the_fingerprint(tmp_path: Path) -> None:
    tokenizer, settings = tiny_tokenizer(), DataSettings(max_total_sequence_length=200)
    rows = [[row(0, prompt="a", chosen="bc")], [row(0, prompt="ab", chosen="c")]]
    one, other = (
        open_dataset(write_rows(tmp_path / f"{n}.jsonl", some), tokenizer, settings) for n, some in enumerate(rows)
    )
    assert one.tokens.tolist() == other.tokens.tolist() and one.fingerprint != other.fingerprint


def test_the_config_decides(tmp_path: Path) -> None:
    cfg = Section(
        policy=Section(
            max_total_sequence_length=64,
            tokenizer=Section(chat_template=CHATML, chat_template_kwargs=None),
        ),
        data=Section(
            max_input_seq_length=32,
            on_too_long="truncate",
            format_options={"prompt_key": "q", "chosen_key": "good", "rejected_key": "bad"},
            dataset_name="BinaryPreferenceDataset",
            loss_on="differing_turns",
            on_bad_row="drop",
            cache_dir=str(tmp_path / "cache"),
            num_tokenize_workers=None,
        ),
    )
    settings = DataSettings.from_config(cast(Config, cfg))
    assert settings == DataSettings(
        max_total_sequence_length=32,
        on_too_long="truncate",
        chat_template=CHATML,
        chat_template_kwargs={},
        format_options={"prompt_key": "q", "chosen_key": "good", "rejected_key": "bad"},
        dataset_name="BinaryPreferenceDataset",
        loss_on="differing_turns",
        on_bad_row="drop",
    )
    arch = cast(Architecture, Section(vocab_size=10**6, media_tokens=()))
    path = write_rows(tmp_path / "p.jsonl", [{"q": "the " * 50, "good": "yes", "bad": "no"}])
    pairs = load_datasets(cast(Config, cfg), {"train": str(path)}, tiny_tokenizer(), arch)["train"]
    assert pairs[0].longest_sequence_tokens == 32 and pairs.report.with_chat_template
    assert pairs.fingerprint == open_dataset(path, tiny_tokenizer(), settings).fingerprint
    assert len(list((tmp_path / "cache").glob("*/header.json"))) == 1
    cfg.data.on_bad_row = "refuse"
    for wrong, words in (({"vocab_size": 2}, "vocabulary of 2"), ({"media_tokens": (3,)}, "stands for an image")):
        other = cast(Architecture, Section(**{**vars(arch), **wrong}))
        with pytest.raises(DataError, match=words):  # of its own cache, where the pairs of another model are
            load_datasets(cast(Config, cfg), {"train": str(path)}, tiny_tokenizer(), other)


TURNS = [
    {"role": "assistant", "content": "the sum"},
    {"role": "user", "content": "sure?"},
    {"role": "assistant", "content": "it is"},
]


def test_loss_masks_come_back_and_are_part_of_the_fingerprint(tmp_path: Path) -> None:
    other = [{**TURNS[0], "content": "that"}, *TURNS[1:]]
    path = write_rows(tmp_path / "p.jsonl", [row(0), {"prompt": "so?", "chosen": TURNS, "rejected": other}])

    def read(loss_on: Any) -> PairDataset:
        settings = DataSettings(max_total_sequence_length=256, chat_template=CHATML, loss_on=loss_on)
        return open_dataset(path, tiny_tokenizer(), settings)

    last, differing = read("last_turn"), read("differing_turns")
    plain, turns = last[0], last[1]
    assert plain.chosen_mask is None and plain.rejected_mask is None
    assert turns.chosen_mask is not None and 0 < turns.chosen_mask.sum() < turns.chosen_tokens
    tokenizer = tiny_tokenizer()
    assert tokenizer.decode(turns.chosen_ids[turns.chosen_mask]) == "it is<|im_end|>\n"
    assert tokenizer.decode(differing[1].chosen_ids[differing[1].chosen_mask]) == "the sum<|im_end|>\n"
    assert turns.chosen_ids.tolist() == differing[1].chosen_ids.tolist(), "only the mask differs"
    assert last.fingerprint != differing.fingerprint
    assert last.max_token_id == differing.max_token_id == max(max(map(max, as_lists(pair)[1:])) for pair in last)


def test_the_largest_token_id_may_be_outside_the_loss(tmp_path: Path) -> None:
    largest = len(tiny_tokenizer()) - 1
    asked = {"role": "user", "content": tiny_tokenizer().decode([largest])}
    turns = [TURNS[0], asked, TURNS[2]]
    path = write_rows(tmp_path / "p.jsonl", [{"prompt": "so?", "chosen": turns, "rejected": "yes"}])
    settings = DataSettings(max_total_sequence_length=256, chat_template=CHATML.replace("\n", ""))
    pairs = open_dataset(path, tiny_tokenizer(), settings)
    place = pairs[0].chosen_ids.tolist().index(largest)
    assert pairs[0].chosen_mask is not None and not pairs[0].chosen_mask[place]
    assert pairs.max_token_id == largest


def test_unusable_rows_are_left_out_and_counted(tmp_path: Path) -> None:
    rows = [row(0), {"prompt": "x"}, row(2, chosen="</s>"), row(3), row(4, chosen="x" * 999)]
    path = write_rows(tmp_path / "p.jsonl", rows)
    settings = DataSettings(max_total_sequence_length=256, on_bad_row="drop", on_too_long="drop")
    pairs = open_dataset(path, tiny_tokenizer(), settings)
    assert [pair.index for pair in pairs] == [0, 3] and pairs.source_of(3) == f"{path}:4"
    report = pairs.report
    assert (report.rows, report.pairs, report.dropped_bad_rows, report.dropped_too_long) == (5, 2, 2, 1)
    assert f"2 invalid rows left out (the first: {path}:2: got" in str(report)
    with pytest.raises(DataError, match="only special tokens"):
        open_dataset(write_rows(path, [row(2, chosen="</s>")]), tiny_tokenizer(), settings)
