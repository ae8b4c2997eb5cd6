"""dpo.reference.mode cached: a resident reference's numbers, computed once, in any layout, and never another model's."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from megadpo.config.load import load_config
from megadpo.config.problems import ConfigError
from megadpo.reference import LogpsCache, positions_by_use
from megadpo.train.reference import cache_folder
from tests.helpers.distributed import run_distributed
from tests.helpers.equal_runs import assert_equal_runs, run
from tests.helpers.overrides import CP2, PP2, SP, TP2, VPP2
from tests.helpers.runs import make_config, make_model, read_metrics, train, train_and_read

CACHED = {"reference": {"mode": "cached"}}
APART = {"group_prompts": False}
"""Answers 2p and 2p + 1 of the table are those of pair p."""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def resident(model, tmp_path_factory):
    return run(tmp_path_factory.mktemp("resident") / "run", model, 1, [])


@pytest.mark.distributed
def test_the_same_bits_as_a_resident_reference(model, resident, tmp_path):
    """In the first epoch, in the same layout: the same packs."""
    got = run(tmp_path / "cached", model, 1, [], dpo=CACHED)
    for mine, theirs in zip(got.metrics, resident.metrics, strict=True):
        assert without_times(mine) == without_times(theirs)


@pytest.mark.distributed
@pytest.mark.parametrize("layout", [(4, [TP2, SP, PP2, VPP2]), (4, [CP2])], ids=["tp2_sp_pp2_vpp2", "dp2_cp2"])
def test_any_layout_equals_one_process(layout, model, resident, tmp_path):
    assert_equal_runs(run(tmp_path / "run", model, *layout, dpo=CACHED), resident)


class Runs:
    """Runs of two steps that share a folder for the log-probabilities."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.model = folder, model
        self.count = 0
        self.printed = ""
        """By every rank of the last run."""

    def __call__(self, *, ranks: int = 1, overrides: tuple[str, ...] = (), **dpo: Any) -> list[dict[str, Any]]:
        """The logged steps, without times."""
        folder = self.folder / str(self.count)
        self.count += 1
        folder.mkdir()
        config = make_config(folder, self.model, pairs=27, dpo={"max_num_steps": 2, **CACHED, **dpo}, data=APART)
        cache = f"dpo.reference.cache_dir={self.folder / 'cache'}"
        ended = run_distributed(train_and_read, ranks, str(config), [cache, *overrides], init_process_group=False)
        assert [code for code, _ in ended] == [0] * ranks
        self.printed = " ".join(printed for _, printed in ended)
        return [without_times(row) for row in read_metrics(folder / "logs")]

    def files(self, name: str = "train") -> list[Path]:
        return sorted((self.folder / "cache").glob(f"{name}-*.safetensors"))


def table_in(file: Path) -> np.ndarray:
    """[pairs, 2]"""
    return load_file(file)["logps"].reshape(-1, 2)


def without_times(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if not name.startswith(("timing/", "machine/"))}


@pytest.mark.distributed
def test_a_later_run_reads_the_file_and_computes_what_it_lacks(model, tmp_path):
    runs = Runs(tmp_path, model)
    first = runs()
    (file,) = runs.files()
    table = table_in(file)
    assert table.shape == (27, 2)
    used = ~np.isnan(table).any(axis=1)
    assert used.sum() == 16, "two steps of eight pairs, and no more is computed"

    marked = table.copy()
    marked[np.flatnonzero(used)[0]] += [100, 0]  # read, it shows; computed anew, it would not
    LogpsCache(file).write(marked.ravel())
    shifted = runs()
    assert any(a["train/loss"] != b["train/loss"] for a, b in zip(first, shifted, strict=True))

    marked[used] = np.where(np.arange(16)[:, None] < 5, np.nan, table[used])
    LogpsCache(file).write(marked.ravel())
    for again, before in zip(runs(ranks=2, overrides=(PP2,)), first, strict=True):
        assert again["train/loss"] == pytest.approx(before["train/loss"], rel=1e-5)
    np.testing.assert_allclose(table_in(file), table, rtol=1e-6)


@pytest.mark.distributed
def test_another_reference_has_a_file_of_its_own(model, tmp_path):
    runs = Runs(tmp_path, model)
    runs()
    other = make_model(tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    save_file({**weights, "model.norm.weight": 2 * weights["model.norm.weight"]}, other / "model.safetensors")
    against_other = runs(reference={"mode": "cached", "model_name": str(other)})
    assert len(runs.files()) == 2
    assert abs(against_other[0]["train/rewards/margins"]) > 1e-3


@given(st.data(), st.integers(1, 20), st.integers(1, 5), st.integers(0, 30) | st.none(), st.booleans())
def test_positions_are_those_of_the_steps_each_where_it_is_first_taken(data, pairs, size, steps, repeats):
    """repeats: as in a mixture, where a pair may be in an epoch several times."""
    per_epoch = data.draw(st.integers(1, -(-pairs // size)))
    generators = [np.random.default_rng(epoch) for epoch in range(31)]
    orders = [one.integers(pairs, size=pairs) if repeats else one.permutation(pairs) for one in generators]
    loader = SimpleNamespace(
        dataset=range(pairs),
        batches_per_epoch=per_epoch,
        order=orders.__getitem__,
        cut=lambda order: [order[start : start + size] for start in range(0, len(order), size)],
    )
    batches = [divmod(step, per_epoch) for step in range(per_epoch if steps is None else steps)]
    taken = [position for epoch, batch in batches for position in orders[epoch][batch * size : (batch + 1) * size]]
    assert positions_by_use(loader, steps).tolist() == list(dict.fromkeys(taken))


@pytest.mark.distributed
def test_a_damaged_file_is_computed_again(model, tmp_path):
    runs = Runs(tmp_path, model)
    first = runs()
    (file,) = runs.files()
    whole = file.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    zeroed = whole[:start] + bytes(64) + whole[start + 64 :]
    for damaged, aside in ((zeroed, f"{file.name}.damaged"), (whole[:-100], f"{file.name}.damaged2")):
        file.write_bytes(damaged)
        assert runs() == first
        assert runs.printed.count("damaged (") == 1 and f"it is now {aside}, " in runs.printed
        assert file.with_name(aside).read_bytes() == damaged
        assert file.read_bytes() == whole


TABLE = np.linspace(-9, -1, 27, dtype=np.float32)


def with_flipped_bit(path: Path, name: bytes, after: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[content.index(name) + after] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "short": lambda path: LogpsCache(path).write(TABLE[:5]),
    "torn": lambda path: path.write_bytes(path.read_bytes()[:-7]),
    "empty": lambda path: path.write_bytes(b""),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "a bit of a number": lambda path: with_flipped_bit(path, TABLE.tobytes(), after=50),
    "a bit of the table's name": lambda path: with_flipped_bit(path, b"logps"),
    "a bit of the checksum": lambda path: with_flipped_bit(path, b"xxh3", after=7),
    "another type": lambda path: with_flipped_bit(path, b"F32", after=1),
    "no checksum": lambda path: save_file({"logps": TABLE}, path),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_file_that_is_not_what_was_written_is_moved_aside(damage, tmp_path, capsys):
    cache = LogpsCache(tmp_path / "train-x.safetensors")
    cache.write(TABLE)
    assert cache.read(27).tobytes() == TABLE.tobytes()
    damage(cache.path)
    damaged = cache.path.read_bytes()
    assert np.isnan(cache.read(27)).all()
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("train-x.safetensors.damaged", damaged)]
    (line,) = capsys.readouterr().err.splitlines()
    assert "train-x.safetensors: damaged (" in line and "it is now train-x.safetensors.damaged" in line


def test_a_damaged_file_that_cannot_be_renamed_is_refused(tmp_path, monkeypatch):
    cache = LogpsCache(tmp_path / "train-x.safetensors")
    cache.path.write_bytes(b"torn")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    with pytest.raises(ConfigError, match=r"train-x.safetensors.*Permission denied.*delete the file"):
        cache.read(27)


@pytest.mark.distributed
def test_a_reference_without_finite_numbers_is_said_before_the_first_step(model, tmp_path):
    broken = make_model(tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    save_file({**weights, "model.norm.weight": np.nan * weights["model.norm.weight"]}, broken / "model.safetensors")
    config = make_config(tmp_path, model, dpo={**CACHED, "on_nonfinite_loss": "skip"})
    overrides = [f"dpo.reference.model_name={broken}"]
    [(code, printed)] = run_distributed(train_and_read, 1, str(config), overrides, init_process_group=False)
    assert code == 0 and "not finite for 24 pairs of train, the first in rows" in printed


def test_the_folder_may_be_below_the_home_folder(model, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    config = str(make_config(tmp_path, model, dpo=CACHED))
    assert cache_folder(load_config(config, [])) == tmp_path / "checkpoints" / "reference"
    named = load_config(config, ["dpo.reference.cache_dir=~/logps"])
    assert cache_folder(named) == tmp_path / "home" / "logps"


@pytest.mark.distributed
def test_later_epochs_have_every_pair(model, tmp_path):
    """27 pairs in batches of 8: 3 are left out of each epoch, others in each."""
    runs = Runs(tmp_path, model)
    cached = runs(max_num_epochs=3, max_num_steps=None)
    (file,) = runs.files()
    assert (~np.isnan(table_in(file))).all(axis=1).sum() > 24
    no_cache = ("dpo.reference.mode=resident", "dpo.reference.cache_dir=null")
    resident = runs(max_num_epochs=3, max_num_steps=None, overrides=no_cache)
    for mine, theirs in zip(cached, resident, strict=True):
        assert mine["train/loss"] == pytest.approx(theirs["train/loss"], rel=1e-5)


def train_until_the_second_write(config: str, overrides: list[str]) -> int:
    """Target for run_distributed: a run whose folder is full, from the second write on."""
    from megadpo.reference import cached

    written, save = [], cached.save_file
    cached.SAVE_EVERY_BATCHES = 1

    def save_file(tensors: Any, path: Path, **options: Any) -> None:
        written.append(path)
        save(tensors, path, **options)
        if len(written) == 2:
            raise OSError(28, "No space left on device")

    cached.save_file = save_file
    return train(config, overrides)


@pytest.mark.distributed
def test_a_full_folder_ends_every_rank_and_the_next_start_goes_on(model, tmp_path):
    config = make_config(tmp_path, model, dpo=CACHED, data=APART)
    two = [PP2, f"dpo.reference.cache_dir={tmp_path / 'cache'}"]
    assert run_distributed(train_until_the_second_write, 2, str(config), two, init_process_group=False) == [2, 2]
    (file,) = (tmp_path / "cache").iterdir()
    assert (~np.isnan(table_in(file))).all(axis=1).sum() == 8
    assert run_distributed(train, 2, str(config), two, init_process_group=False) == [0, 0]
    interrupted = read_metrics(tmp_path / "logs")
    whole = [PP2, "dpo.reference.mode=resident", f"logger.log_dir={tmp_path / 'whole'}"]
    assert run_distributed(train, 2, str(config), whole, init_process_group=False) == [0, 0]
    for mine, theirs in zip(interrupted, read_metrics(tmp_path / "whole"), strict=True):
        assert without_times(mine) == without_times(theirs)


def model_after_attaching(config: str) -> tuple[int, list[bool]]:
    """Target for run_distributed: weights of the reference, and which of them are still there, without collecting."""
    import gc
    import weakref

    from megadpo.config.grid import Grid
    from megadpo.parallel import initialize, setup_device
    from megadpo.train import inputs, reference
    from megadpo.train.check import checked_config

    cfg = checked_config(config, [], 1)
    parallel = initialize(Grid.of(cfg), setup_device("cpu"))
    opened = inputs.open_run_inputs(cfg, parallel.grid)
    weights: list[weakref.ref[torch.Tensor]] = []
    build = reference.build_reference

    def build_reference(*arguments: Any) -> Any:
        made = build(*arguments)
        made.itself = made  # as a layer may refer to itself
        weights.extend(weakref.ref(one) for chunk in made.model for one in chunk.parameters())
        return made

    reference.build_reference = build_reference
    gc.disable()
    reference.attach_logps(cfg, opened, parallel, 3)
    return len(weights), [one() is not None for one in weights]


@pytest.mark.distributed
def test_the_model_is_gone_before_the_policy_is_built(model, tmp_path):
    config = make_config(tmp_path, model, dpo=CACHED)
    [(count, left)] = run_distributed(model_after_attaching, 1, str(config), init_process_group=False)
    assert count > 0 and not any(left)
