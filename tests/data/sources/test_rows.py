"""Kinds of files, folders and hub datasets: the same pairs from each, in little memory, and what is said when not."""

from __future__ import annotations

import csv
import gzip
import io
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest
import zstandard

from megadpo.config.problems import DataError
from megadpo.data.formats import PreferencePair
from megadpo.data.formats.read_pairs import read_pairs
from megadpo.data.sources.rows import source_digest
from tests.data.builders import read_all, row, write_rows

CALLS = [{"type": "function", "function": {"name": "add", "arguments": {name: 1}}} for name in "ab"]
CHATS: list[dict[str, Any]] = [
    {
        "prompt": [{"role": "system", "content": "be"}, {"role": "user", "content": f"ask {n}"}],
        "chosen": [{"role": "assistant", "content": "good", **({"tool_calls": CALLS} if n % 2 else {})}],
        "rejected": [{"role": "assistant", "content": "bad", "reasoning_content": "hm"}],
    }
    for n in range(5)
]
PLAIN = [row(n, chosen=f'good, "{n}"\nand so on é') for n in range(5)]


def jsonl(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(one) + "\n" for one in rows).encode()


def comma_separated(rows: list[dict[str, Any]]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    cells = [{k: v if isinstance(v, str) else json.dumps(v) for k, v in one.items()} for one in rows]
    writer.writerows(cells)
    return text.getvalue().encode()


def parquet(rows: list[dict[str, Any]]) -> bytes:
    sink = io.BytesIO()
    pa.parquet.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue()


def arrow(rows: list[dict[str, Any]], *, file: bool, rows_a_batch: int | None = 2) -> bytes:
    sink, table = io.BytesIO(), pa.Table.from_pylist(rows)
    with (pa.ipc.new_file if file else pa.ipc.new_stream)(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=rows_a_batch)
    return sink.getvalue()


KINDS: dict[str, Callable[[list[dict[str, Any]]], bytes]] = {
    "p.jsonl": jsonl,
    "p.jsonl.gz": lambda rows: gzip.compress(jsonl(rows)),
    "p.jsonl.zst": lambda rows: b"".join(zstandard.compress(jsonl([one])) for one in rows),  # frames end to end
    "p.json": lambda rows: json.dumps(rows, indent=1).encode(),
    "many.json": lambda rows: "\n".join(json.dumps(one, indent=2) for one in rows).encode(),
    "lists.json": lambda rows: (json.dumps(rows[:2]) + "\n" + json.dumps(rows[2:])).encode(),
    "p.json.gz": lambda rows: gzip.compress(json.dumps(rows).encode()),
    "lines.json": jsonl,
    "p.csv": comma_separated,
    "p.CSV.zst": lambda rows: zstandard.compress(b"\xef\xbb\xbf" + comma_separated(rows)),
    "p.parquet": parquet,
    "p.arrow": lambda rows: arrow(rows, file=True),
    "one_batch.arrow": lambda rows: arrow(rows, file=True, rows_a_batch=None),
    "stream.arrow": lambda rows: arrow(rows, file=False),
}


def texts(pairs: list[PreferencePair]) -> list[tuple[Any, ...]]:
    return [(pair.prompt, pair.chosen, pair.rejected, pair.place.row) for pair in pairs]


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("rows", [PLAIN, CHATS], ids=["strings", "messages"])
def test_every_kind_of_file_gives_the_same_pairs(name: str, rows: list[dict[str, Any]], tmp_path: Path) -> None:
    expected = texts(read_all(write_rows(tmp_path / "plain.jsonl", rows)))
    path = tmp_path / name
    path.write_bytes(KINDS[name](rows))
    assert texts(read_all(path)) == expected and len(expected) == 5


def test_lines_of_rows_that_span_lines(tmp_path: Path) -> None:
    (tmp_path / "p.json").write_bytes(b"\n[" + b",\n".join(json.dumps(one, indent=1).encode() for one in CHATS) + b"]")
    height = json.dumps(CHATS[0], indent=1).count("\n") + 1
    assert [pair.place.line for pair in read_all(tmp_path / "p.json")][:2] == [2, 2 + height]
    (tmp_path / "p.csv").write_bytes(comma_separated(PLAIN))
    assert [pair.place.line for pair in read_all(tmp_path / "p.csv")] == [2, 4, 6, 8, 10]
    (tmp_path / "p.parquet").write_bytes(parquet(PLAIN))
    assert [pair.place.line for pair in read_all(tmp_path / "p.parquet")] == [1, 2, 3, 4, 5]


# Folders and the hub, through `datasets`; nothing here uses a network


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()


def hub_folder(folder: Path) -> Path:
    """A folder as a clone of a hub dataset has it: two subsets, two splits."""
    names = {"a": {"train": "a1.jsonl", "test": "a2.jsonl"}, "b": {"train": "b1.jsonl", "test": "b2.jsonl"}}
    lines = ["---", "configs:"]
    for subset, splits in names.items():
        lines += [f"- config_name: {subset}", "  data_files:"]
        for split, name in splits.items():
            lines += [f"  - split: {split}", f"    path: {name}"]
            write_rows(folder / name, [row(n, rejected=f"{subset} {split} {n}") for n in range(3)])
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]))
    return folder


def test_a_folder_with_subsets_and_splits(tmp_path: Path) -> None:
    folder = hub_folder(tmp_path)
    assert [pair.rejected for pair in read_all(f"{folder}:b@test")] == [f"b test {n}" for n in range(3)]
    assert [pair.rejected for pair in read_all(f"{folder}:a")] == [f"a train {n}" for n in range(3)]
    (pair,) = read_all(f"{folder}:a@train[2:]")
    assert (pair.rejected, str(pair.place)) == ("a train 2", f"{folder}:a@train[2:]:1")


def test_a_folder_that_changed_is_read_anew(tmp_path: Path) -> None:
    """`datasets` alone would give the old rows again."""
    folder = hub_folder(tmp_path)
    assert len(read_all(f"{folder}:a")) == 3
    write_rows(folder / "a1.jsonl", [row(9, rejected="new")])
    assert [pair.rejected for pair in read_all(f"{folder}:a")] == ["new"]


def test_a_hub_name_goes_to_datasets_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, load_dataset = hub_folder(tmp_path), datasets.load_dataset
    asked = []

    def from_folder(path: str, subset: str | None, split: str) -> Any:
        asked.append((path, subset, split))
        return load_dataset(str(folder), subset, split=split)

    monkeypatch.setattr("datasets.load_dataset", from_folder)
    assert len(read_all("org/name:b@test")) == len(read_all("org/name:a")) == 3
    assert asked == [("org/name", "b", "test"), ("org/name", "a", "train")]


def test_saved_datasets(tmp_path: Path) -> None:
    saved = datasets.Dataset.from_list(CHATS)
    saved.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": saved, "test": saved.select([3])}).save_to_disk(tmp_path / "some")
    expected = texts(read_all(write_rows(tmp_path / "plain.jsonl", CHATS)))
    assert texts(read_all(tmp_path / "one")) == texts(read_all(tmp_path / "some")) == expected
    assert [pair.prompt for pair in read_all(f"{tmp_path}/some@test")] == [expected[3][0]]


def refusal(source: str | Path) -> str:
    with pytest.raises(DataError) as refused:
        read_all(source)
    assert all(problem.fix and problem.expected for problem in refused.value.problems)
    return str(refused.value)


def test_without_a_network_the_field_and_the_fix_are_named() -> None:
    said = refusal("org/name:subset@test")
    assert said.startswith("org/name:subset@test: got ") and "split 'test'" in said
    assert "data.train_data_path" in said and "hf download --repo-type dataset org/name" in said


def test_a_folder_without_data_and_a_split_that_is_not_there(tmp_path: Path) -> None:
    assert "data.train_data_path" in refusal(tmp_path)
    folder = hub_folder(tmp_path)
    said = refusal(f"{folder}:a@valid")
    assert "no split 'valid'" in said and "one of its splits: " in said and "train" in said and "test" in said
    saved = tmp_path / "saved"
    datasets.DatasetDict({"train": datasets.Dataset.from_list(CHATS)}).save_to_disk(saved)
    assert "no split 'valid'" in refusal(f"{saved}@valid")
    other = tmp_path / "other"
    datasets.DatasetDict(
        {name: datasets.Dataset.from_list(CHATS) for name in ("train_prefs", "test_prefs")}
    ).save_to_disk(other)
    said = refusal(other)
    assert "no split 'train', which is taken where none is named" in said
    assert "one of its splits: train_prefs, test_prefs" in said and f"{other}@train_prefs" in said


@pytest.mark.parametrize(
    ("files", "left_out"),
    [
        ({"a.jsonl": 1, "b.csv": 1}, ["b.csv"]),
        ({"train.jsonl": 1, "more.jsonl": 1, "valid.jsonl": 1}, ["more.jsonl"]),
        ({"train/a.jsonl": 1, "test/b.jsonl": 1, "other/c.jsonl": 1, "other/d.jsonl": 1}, ["other/c.jsonl", "other/d.jsonl"]),
        ({"train-1.jsonl": 1, "train-2.jsonl": 1, "dataset_infos.json": 0, ".hidden.jsonl": 1, "notes.txt": 0}, []),
    ],
)  # fmt: skip
def test_a_folders_file_that_no_split_reads_is_refused(
    files: dict[str, int], left_out: list[str], tmp_path: Path
) -> None:
    for name, rows in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        content = comma_separated(PLAIN[:rows]) if name.endswith(".csv") else jsonl(PLAIN[:rows]) or b"{}"
        (tmp_path / name).write_bytes(content)
    if left_out:
        said = refusal(tmp_path).splitlines()
        assert [line.split(": ")[0] for line in said] == [str(tmp_path / name) for name in left_out]
    else:
        assert len(read_all(tmp_path)) == 2


def test_a_clone_of_a_hub_dataset_is_read_as_the_hub_reads_it(tmp_path: Path) -> None:
    for name in ("train.jsonl", "red_team.jsonl"):
        write_rows(tmp_path / name, PLAIN[:1])
    (tmp_path / "README.md").write_text("# mine\n")
    assert "red_team.jsonl" in refusal(tmp_path)
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    assert len(read_all(tmp_path)) == 1


def test_a_folders_column_of_mixed_types_keeps_its_texts(tmp_path: Path) -> None:
    # `datasets` makes JSON text of such a column, in which "bad" is in quotes and 3 is not
    write_rows(tmp_path / "p.jsonl", [row(0, rejected="bad"), row(1, rejected=3)])
    assert "p.jsonl" not in refusal(tmp_path) and f"{tmp_path}:2: got \"field 'rejected' of type int" in refusal(
        tmp_path
    )
    messages = [{"role": "assistant", "content": "bad"}]
    write_rows(tmp_path / "p.jsonl", [row(0, rejected="bad"), row(1, rejected=messages)])
    assert [pair.rejected for pair in read_all(tmp_path)] == ["bad", tuple(messages)]


def test_a_folders_broken_row_is_named_by_file_and_line(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_bytes(jsonl(PLAIN) + b"{broken\n" + jsonl(PLAIN) + b"{too\n")
    said = refusal(tmp_path).splitlines()
    assert [line.split(": ")[0] for line in said] == [f"{tmp_path / 'p.jsonl'}:{line}" for line in (6, 12)]


def test_a_digest_follows_the_rows_and_not_their_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        hub_folder(tmp_path / name)
    a, b = tmp_path / "a", tmp_path / "b"
    assert source_digest(a / "a1.jsonl") == source_digest(b / "a1.jsonl") != source_digest(b / "a2.jsonl")
    assert source_digest(f"{a}:a") == source_digest(f"{b}:a@train") != source_digest(f"{b}:a@test")
    write_rows(b / "a1.jsonl", [row(7)])
    assert source_digest(f"{a}:a") != source_digest(f"{b}:a")
    with pytest.raises(DataError, match="No such file"):
        source_digest(tmp_path / "none.jsonl")

    load_dataset = datasets.load_dataset
    monkeypatch.setattr("datasets.load_dataset", lambda _, subset, split: load_dataset(str(a), subset, split=split))
    assert source_digest("org/name:a") == source_digest("org/name:a@train") != source_digest("org/name:a@test")


# Bad files


def broken(name: str, content: bytes, folder: Path) -> str:
    (folder / name).write_bytes(content)
    return refusal(folder / name).replace(str(folder) + "/", "")


def two_columns_of_one_name() -> bytes:
    sink, names = io.BytesIO(), ["prompt", "chosen", "chosen", "rejected"]
    pa.parquet.write_table(pa.Table.from_arrays([pa.array([text]) for text in "abcd"], names=names), sink)
    return sink.getvalue()


BROKEN = [
    ("p.json", b'[{"prompt": 1}, {]', "p.json:1: "),
    ("p.json", json.dumps(PLAIN[:1]).encode()[:-1] + b"\n\n,\n{]", "p.json:4: got 'broken JSON"),
    ("p.json", json.dumps(PLAIN[:2], indent=0).encode().replace(b"},\n{", b"}\n\n{"), "',' or ']' is missing"),
    ("p.json", b'{"prompt": "caf\n\n\xe9"}', "p.json:3: got 'the byte 0xe9 at column 1'"),
    ("p.json", b"[1]", "a JSON int"),
    ("p.json", b"[]", "a file without rows"),
    ("p.json", b"[" * 100_000, "broken JSON"),
    ("p.csv", b"prompt,chosen,rejected\na,b\n", "p.csv:2: got '2 cells'"),
    ("p.csv", b'prompt,chosen,rejected\na,b,"c', "broken CSV"),
    ("p.csv", b"prompt,chosen,rejected\na,caf\xe9,c", "p.csv:2: "),
    ("p.csv", b"prompt,chosen,rejected\n", "a file without rows"),
    ("p.csv", b"", "a file without rows"),
    ("p.parquet", parquet(PLAIN)[:-9], "truncated or damaged"),
    ("p.parquet", b"", "truncated or damaged"),
    ("p.parquet", parquet([{"prompt": "a", "chosen": 3, "rejected": "b"}]), "p.parquet:1: "),
    ("p.arrow", arrow(PLAIN, file=True)[:300], "truncated or damaged"),
    ("p.arrow", arrow(PLAIN, file=False)[:-300], "truncated or damaged"),
    ("p.jsonl.gz", gzip.compress(jsonl(PLAIN))[:-20], "truncated or damaged"),
    ("p.jsonl.gz", jsonl(PLAIN), "truncated or damaged"),
    ("p.jsonl.zst", jsonl(PLAIN), "truncated or damaged"),
    ("p.parquet.gz", gzip.compress(parquet(PLAIN)), "uncompress it"),
    ("p.txt", jsonl(PLAIN), "rename the file by its kind"),
    ("p.jsonl.bz2", b"", "uncompress it"),
    ("p.jsonl", gzip.compress(jsonl(PLAIN)), "its name must end in .gz"),
    ("p.jsonl", jsonl(PLAIN).decode().encode("utf-16"), "iconv -f UTF-16"),
    ("p.csv", b"prompt,chosen,chosen,rejected\na,b,x,c\n", "p.csv:1: got 'two columns 'chosen'"),
    ("p.csv", b"prompt,chosen,rejected\na,caf\xe9,c", "the byte 0xe9 at column 4"),
    ("p.json", b'[{"prompt": "a", "prompt": "b"}]', "p.json:1: got 'broken JSON (the key 'prompt' twice"),
    ("p.parquet", two_columns_of_one_name(), "two columns 'chosen'"),
]


@pytest.mark.parametrize(("name", "content", "words"), BROKEN)
def test_a_broken_file_is_refused(name: str, content: bytes, words: str, tmp_path: Path) -> None:
    said = broken(name, content, tmp_path)
    assert said.startswith(name) and words in said.replace('"', "'").replace("\\'", "'")


def test_a_cut_off_zst_file_is_refused_and_not_taken_for_a_short_one(tmp_path: Path) -> None:
    frames = [zstandard.compress(jsonl([one])) for one in PLAIN]
    assert "truncated" in broken("p.jsonl.zst", b"".join(frames)[:-3], tmp_path)
    lines = zstandard.ZstdCompressor().compressobj()  # a frame that ends after a whole line, but has no end
    flushed = lines.compress(jsonl(PLAIN)) + lines.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
    assert "after 5 rows" in broken("p.jsonl.zst", flushed, tmp_path)


def test_a_file_with_a_split_and_names_of_nothing(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "p.jsonl", PLAIN)
    assert "only folders and hub data sets have splits" in refusal(f"{path}@test")
    assert "No such file" in refusal(tmp_path / "none.jsonl")
    assert "no such file" in refusal(tmp_path / "none") and "hub name" in refusal("name")


def test_a_line_of_100_mb_is_refused_unread_and_the_rest_is_judged(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    with path.open("wb") as file:
        file.write(jsonl(PLAIN[:1]) + b'{"prompt": "')
        for _ in range(100):
            file.write(b"x" * 2**20)
        file.write(b'"}\n' + jsonl([{"prompt": "no more"}]))
    said = refusal(path).splitlines()
    assert said[0].startswith(f"{path}:2: got 'a line of more than 64 MiB'") and len(said) == 3
    assert all(one.startswith(f"{path}:3: ") and "no field" in one for one in said[1:])


def test_a_file_that_is_cut_off_is_said_beside_its_bad_rows(tmp_path: Path) -> None:
    said = broken("p.jsonl.gz", gzip.compress(jsonl([PLAIN[0], {"prompt": "x"}, *PLAIN]))[:-4], tmp_path).splitlines()
    assert len(said) == 3 and "p.jsonl.gz:2: " in said[0] and "(after 7 rows)" in said[-1]


def test_a_long_cell(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_bytes(comma_separated([row(0, chosen="x" * 200_000)]))
    assert len(read_all(tmp_path / "p.csv")[0].chosen) == 200_000


@pytest.mark.parametrize("name", ["p.jsonl", "p.jsonl.gz", "p.jsonl.zst", "p.csv", "p.parquet", "one_batch.arrow"])
def test_memory_does_not_grow_with_the_file(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / name
    path.write_bytes(KINDS[name]([row(n, chosen=f"{n} " * 500) for n in range(6000)]))
    read = read_pairs(path)
    next(read)
    tracemalloc.start()
    assert sum(1 for _ in read) == 5999
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 4e6, "the file holds 12 MB of text"


def test_good_pairs_come_before_the_error(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "p.jsonl", [row(0), {"prompt": "x"}, row(2)])
    got: list[int] = []
    with pytest.raises(DataError, match=":2: "):
        got.extend(pair.place.row for pair in read_pairs(path))
    assert got == [0, 2]


def test_the_limit_of_a_line_is_what_the_message_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megadpo.files.jsonl.MAX_LINE_BYTES", 2**20)
    edge = {"prompt": "", "chosen": "a", "rejected": "b"}
    edge["prompt"] = "x" * (2**20 - len(jsonl([edge])))
    path = write_rows(tmp_path / "p.jsonl", [edge])
    assert path.stat().st_size == 2**20 and len(read_all(path)) == 1
    assert "more than 1 MiB" in refusal(write_rows(path, [{**edge, "prompt": edge["prompt"] + "x"}]))
