"""Token ids on disk: the same as without a cache, never of another input, whole or made anew."""

from __future__ import annotations

import importlib
import json
import os
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megadpo.config.problems import ConfigError, DataError
from megadpo.data.pairs import PairDataset
from megadpo.data.sources.rows import source_digest
from megadpo.data.tokens import cache
from megadpo.data.tokens.cache import TokenCache
from megadpo.data.tokens.cache_key import cache_key
from megadpo.data.tokens.dataset import open_dataset
from megadpo.data.tokens.encode import DataSettings
from tests.data.builders import equal_pairs, row, write_rows
from tests.helpers.distributed import processes
from tests.helpers.tiny_tokenizer import CHATML, tiny_tokenizer

SETTINGS = DataSettings(max_total_sequence_length=200)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "pairs.jsonl", (row(number) for number in range(50)))


def load(path: Path, folder: Path, settings: DataSettings = SETTINGS, **options: Any) -> PairDataset:
    return open_dataset(path, tiny_tokenizer(), settings, cache=TokenCache(folder), **options)


def caches(folder: Path) -> list[Path]:
    return [entry for entry in folder.iterdir() if entry.is_dir()]


@contextmanager
def no_reading(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fails where a data file is tokenised."""
    with monkeypatch.context() as patch:
        patch.setattr("megadpo.data.tokens.dataset.encode_source", lambda *a, **k: pytest.fail("tokenised once more"))
        yield


def test_what_comes_out_of_the_cache_is_what_tokenising_gives(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = DataSettings(max_total_sequence_length=25, on_too_long="truncate")
    plain = open_dataset(path, tiny_tokenizer(), settings)
    built = load(path, tmp_path / "cache", settings)
    with no_reading(monkeypatch):
        opened = load(path, tmp_path / "cache", settings)
    assert plain.report.truncated > 0
    for cached in (built, opened):
        assert cached.fingerprint == plain.fingerprint and cached.report == plain.report
        assert cached.max_token_id == plain.max_token_id == plain.tokens.max()
        assert equal_pairs(list(cached), list(plain))
        assert cached.source_of(7) == plain.source_of(7)


def test_the_arrays_are_mapped_and_can_not_be_written(path: Path, tmp_path: Path) -> None:
    pairs = load(path, tmp_path / "cache")
    (made,) = caches(tmp_path / "cache")
    maps = Path("/proc/self/maps").read_text()
    for name in ("tokens", "offsets", "rows"):
        assert not getattr(pairs, name).flags.writeable
        assert f"{made / name}.bin" in maps


def test_released_pages_are_mapped_no_more_and_stay_readable(path: Path, tmp_path: Path) -> None:
    pairs = load(path, tmp_path / "cache")
    (made,) = caches(tmp_path / "cache")

    def resident_kb() -> int:
        mapping = Path("/proc/self/smaps").read_text().split(f"{made / 'tokens.bin'}\n")[1]
        return int(next(line for line in mapping.splitlines() if line.startswith("Rss:")).split()[1])

    before = pairs.tokens.tolist()
    assert resident_kb() > 0
    pairs.release()
    assert resident_kb() == 0
    assert pairs.tokens.tolist() == before


def test_a_moved_file_meets_its_cache_again_under_its_new_name(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(path, tmp_path / "cache")
    moved = path.rename(tmp_path / "moved.jsonl")
    with no_reading(monkeypatch):
        found = load(moved, tmp_path / "cache")
    assert found.report.path == str(moved) and found.source_of(3) == f"{moved}:4"


def test_a_changed_file_of_the_same_size_and_time_meets_no_old_cache(path: Path, tmp_path: Path) -> None:
    before, times = load(path, tmp_path / "cache"), path.stat()
    path.write_text(path.read_text().replace("7 is right", "7 is rigid"))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (times.st_size, times.st_mtime_ns)
    after = load(path, tmp_path / "cache")
    assert after.fingerprint != before.fingerprint and len(caches(tmp_path / "cache")) == 2


def test_the_key_changes_with_every_input(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    template = tmp_path / "own.jinja"
    template.write_text(CHATML)

    def key(tokenizer: Any = None, **changes: Any) -> str:
        return cache_key(
            source_digest(path), tokenizer or tiny_tokenizer(), DataSettings(**{**vars(SETTINGS), **changes})
        )

    keys = [
        key(),
        key(tiny_tokenizer(vocab_size=300)),
        key(tiny_tokenizer(adds_bos=True)),
        key(max_total_sequence_length=201),
        key(on_too_long="drop"),
        key(chat_template=str(template)),
        key(chat_template=CHATML + "{{ mood }}", chat_template_kwargs={"mood": 1}),
        key(chat_template=CHATML + "{{ mood }}", chat_template_kwargs={"mood": 2}),
        key(format_options={"rejected_key": "worse"}),
    ]
    assert len(set(keys)) == len(keys) and key() == keys[0]
    template.write_text(CHATML + " ")
    assert key(chat_template=str(template)) not in keys
    for module in ("data.formats.fields", "data.sources.text", "data.tokens.turns", "data.pairs", "messages.chat"):
        with monkeypatch.context() as patch:
            code = Path(importlib.import_module(f"megadpo.{module}").__file__ or "")
            read_bytes = Path.read_bytes
            patch.setattr(Path, "read_bytes", lambda path, c=code, r=read_bytes: r(path) + b" " * (path == c))
            assert key() not in keys, module
    assert key() == keys[0]


def test_using_a_tokenizer_does_not_change_its_key(path: Path) -> None:
    tokenizer = tiny_tokenizer()
    settings = DataSettings(max_total_sequence_length=200, chat_template=CHATML)
    fresh = cache_key(source_digest(path), tokenizer, settings)
    tokenizer(["a", "text of another length"], padding=True, truncation=True, max_length=3)
    assert cache_key(source_digest(path), tokenizer, settings) == fresh


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-4])


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGES: list[Callable[[Path], None]] = [cut, flip, lambda file: file.write_bytes(b""), Path.unlink]


@pytest.mark.parametrize("name", ["tokens.bin", "offsets.bin", "rows.bin", "lines.bin", "header.json"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_cache_is_noticed_and_built_anew(
    path: Path, tmp_path: Path, name: str, damage: Callable[[Path], None],
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    sound = open_dataset(path, tiny_tokenizer(), SETTINGS)
    load(path, tmp_path / "cache")
    (made,) = caches(tmp_path / "cache")
    damage(made / name)
    mended = load(path, tmp_path / "cache")
    assert mended.fingerprint == sound.fingerprint and equal_pairs(list(mended), list(sound))
    assert f"{made}: damaged" in capsys.readouterr().err
    with no_reading(monkeypatch):
        load(path, tmp_path / "cache")
    assert caches(tmp_path / "cache") == [made]


def test_another_caches_folder_under_this_name_is_not_taken(path: Path, tmp_path: Path) -> None:
    sound = load(path, tmp_path / "cache")
    (right,) = caches(tmp_path / "cache")
    other = load(path, tmp_path / "cache", DataSettings(max_total_sequence_length=199))
    (wrong,) = set(caches(tmp_path / "cache")) - {right}
    shutil.rmtree(right)
    shutil.copytree(wrong, right)
    assert load(path, tmp_path / "cache").fingerprint == sound.fingerprint != other.fingerprint


# A source's digest


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The sources that were hashed; files that have just been written count as settled."""
    hashed: list[str] = []
    monkeypatch.setattr(cache, "_SETTLED_S", 0.0)
    monkeypatch.setattr(cache, "source_digest", lambda source: hashed.append(source) or source_digest(source))
    return hashed


def test_a_source_is_hashed_once_in_a_start(path: Path, tmp_path: Path, hashed: list[str]) -> None:
    digests = {TokenCache(tmp_path / "cache").source_digest(str(path)) for _ in range(4)}
    assert digests == {source_digest(path)} and len(hashed) == 1
    folder = tmp_path / "folder"
    folder.mkdir()
    shutil.copy(path, folder / "train.jsonl")
    assert len({TokenCache(tmp_path / "cache").source_digest(f"{folder}@train") for _ in range(4)}) == 1
    assert len(hashed) == 2


def test_a_note_hides_no_change_of_the_same_size_and_time(path: Path, tmp_path: Path, hashed: list[str]) -> None:
    before, times = TokenCache(tmp_path / "cache").source_digest(str(path)), path.stat()
    path.write_text(path.read_text().replace("7 is right", "7 is rigid"))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert TokenCache(tmp_path / "cache").source_digest(str(path)) == source_digest(path) != before


def test_an_old_note_is_not_believed(path: Path, tmp_path: Path, hashed: list[str]) -> None:
    for _ in range(2):
        TokenCache(tmp_path / "cache").source_digest(str(path))
        (note,) = (tmp_path / "cache").glob("source-*.json")
        os.utime(note, (time.time() - 3600,) * 2)
    assert len(hashed) == 2


def test_a_file_that_has_just_been_written_gets_no_note(path: Path, tmp_path: Path) -> None:
    assert TokenCache(tmp_path / "cache").source_digest(str(path)) == source_digest(path)
    assert not (tmp_path / "cache").exists()


# Several processes


def _load_together(arguments: tuple[str, str, float]) -> tuple[str, int, int]:
    """In a process of its own: the fingerprint (or the refusal), and how often this process hashed and tokenised."""
    import megadpo.data.tokens.dataset as dataset

    path, folder, seconds = arguments
    hashes: list[int] = []
    cache._SETTLED_S = 0.0

    def counted(source: str) -> str:
        hashes.append(1)
        time.sleep(seconds)
        return source_digest(source)

    cache.source_digest = counted  # type: ignore[assignment]
    calls, encode = [], dataset.encode_source

    def slow(*args: Any, **options: Any) -> Any:
        calls.append(1)
        time.sleep(seconds)
        return encode(*args, **options)

    dataset.encode_source = slow  # type: ignore[assignment]
    try:
        return load(Path(path), Path(folder)).fingerprint, len(hashes), len(calls)
    except DataError as error:
        return str(error), len(hashes), len(calls)


def in_processes(path: Path, folder: Path, count: int = 3) -> list[tuple[str, int, int]]:
    with ProcessPoolExecutor(count, mp_context=processes()) as pool:
        return list(pool.map(_load_together, [(str(path), str(folder), 0.5)] * count))


def test_one_process_hashes_and_builds_and_the_others_wait(path: Path, tmp_path: Path) -> None:
    results = in_processes(path, tmp_path / "cache")
    assert {fingerprint for fingerprint, *_ in results} == {load(path, tmp_path / "cache").fingerprint}
    assert [sum(calls) for calls in list(zip(*results, strict=True))[1:]] == [1, 1]


def test_a_refused_file_is_read_by_one_and_refused_by_all(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "p.jsonl", [row(0), {"prompt": "x"}])
    results = in_processes(path, tmp_path / "cache")
    (message,) = {message for message, *_ in results}
    assert f"{path}:2: " in message and "no field 'chosen'" in message
    assert sum(calls for *_, calls in results) == 1


def test_a_mended_file_is_no_longer_refused(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "p.jsonl", [row(0), {"prompt": "x"}])
    for _ in range(2):
        with pytest.raises(DataError, match=f"{path}:2"):
            load(path, tmp_path / "cache")
    assert len(load(write_rows(path, [row(0)]), tmp_path / "cache")) == 1


def test_an_old_refusal_is_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_rows(tmp_path / "p.jsonl", [row(0), {"prompt": "x"}])
    with pytest.raises(DataError):
        load(path, tmp_path / "cache")
    (refusal,) = (tmp_path / "cache").glob("*.refused.json")
    os.utime(refusal, (time.time() - 3600,) * 2)
    read: list[int] = []
    monkeypatch.setattr("megadpo.data.tokens.dataset.encode_source", lambda *a, **k: read.append(1) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        load(path, tmp_path / "cache")
    assert read == [1] and not refusal.exists()


def test_a_build_that_fails_or_was_killed_leaves_nothing(path: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    (
        folder / f"{cache_key(source_digest(path), tiny_tokenizer(), SETTINGS)}.building-{os.uname().nodename}-left"
    ).mkdir(parents=True)
    with pytest.raises(DataError):
        load(write_rows(tmp_path / "bad.jsonl", [{"prompt": "x"}]), folder)
    load(path, folder)
    assert len(caches(folder)) == 1 and (caches(folder)[0] / "header.json").exists()


def test_a_file_that_changes_while_it_is_read_is_refused(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import megadpo.data.tokens.dataset as dataset

    encode = dataset.encode_source

    def changing(*args: Any, **options: Any) -> Any:
        write_rows(path, [row(1)])
        return encode(*args, **options)

    monkeypatch.setattr(dataset, "encode_source", changing)
    with pytest.raises(DataError, match="changed while it was read"):
        load(path, tmp_path / "cache")
    assert caches(tmp_path / "cache") == []


# A folder that can't be written


def test_a_cache_that_is_there_needs_no_writing(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load(path, tmp_path / "cache")
    monkeypatch.setattr("megadpo.data.tokens.cache._SETTLED_S", -1.0)

    def read_only(*_: object) -> None:
        raise PermissionError("read-only file system")

    monkeypatch.setattr("filelock.FileLock", read_only)
    assert len(load(path, tmp_path / "cache")) == 50


def test_an_unusable_folder_is_refused_by_its_key(path: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError) as refused:
        load(path, tmp_path / "file" / "cache")
    (problem,) = refused.value.problems
    assert problem.where == "data.cache_dir" and problem.value == str(tmp_path / "file" / "cache")
    assert "Not a directory" in problem.expected and "null" in problem.fix


def test_a_full_disk_is_refused_and_leaves_nothing(path: Path, tmp_path: Path) -> None:
    """The kernel's limit on a file's size stands for the disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(ConfigError, match=r"data.cache_dir: .*File too large.*free some space"):
            load(path, tmp_path / "cache")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caches(tmp_path / "cache") == []


def test_the_header_says_what_the_files_hold(path: Path, tmp_path: Path) -> None:
    pairs = load(path, tmp_path / "cache")
    (made,) = caches(tmp_path / "cache")
    header = json.loads((made / "header.json").read_text())["header"]
    assert header["arrays"]["offsets"]["length"] == 151 and header["report"]["fingerprint"] == pairs.fingerprint
    assert np.fromfile(made / "tokens.bin", "<i4").tolist() == pairs.tokens.tolist()


def test_a_folder_and_loss_masks_come_back_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    folder = tmp_path / "folder"
    folder.mkdir()
    turns = [("assistant", "the sum"), ("user", "sure?"), ("assistant", "it is")]
    chosen = [{"role": role, "content": content} for role, content in turns]
    write_rows(folder / "train.jsonl", [{"prompt": [chosen[1]], "chosen": chosen, "rejected": chosen[:1]}])
    settings = DataSettings(max_total_sequence_length=256, chat_template=CHATML)
    kept = TokenCache(tmp_path / "cache")
    made, found = (open_dataset(folder, tiny_tokenizer(), settings, cache=kept) for _ in range(2))
    assert equal_pairs(made, found) and found[0].chosen_mask is not None and found[0].rejected_mask is None
    other = DataSettings(max_total_sequence_length=256, chat_template=CHATML, on_bad_row="drop")
    assert len({cache_key(source_digest(folder), tiny_tokenizer(), one) for one in (settings, other)}) == 2
    before = cache_key(source_digest(folder), tiny_tokenizer(), settings)
    write_rows(folder / "train.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    assert cache_key(source_digest(folder), tiny_tokenizer(), settings) != before
