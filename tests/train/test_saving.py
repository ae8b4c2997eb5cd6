"""Saving beside the next steps: one at a time, failures are said and tried again, the end waits, and what is saved is what
training had at that step."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from megadpo.checkpoint import TrainingPosition
from megadpo.config.problems import SaveError
from megadpo.config.schema import CheckpointingConfig
from megadpo.train import saving
from megadpo.train.resume import claim
from megadpo.train.saving import Saver
from tests.helpers.distributed import run_distributed
from tests.helpers.overrides import DIST, TP2
from tests.helpers.runs import make_config, make_model, train


def at(step: int) -> TrainingPosition:
    return TrainingPosition(step=step, epoch=0, batch=step)


class Saves:
    """In place of begin_save: saves that end when they are told to, well or not."""

    def __init__(self) -> None:
        self.begun: list[int] = []
        self.finished: list[int] = []
        self.given: list[dict] = []
        self.failing: set[int] = set()
        self.not_begun: set[int] = set()
        self.nice: list[int] = []
        self.may_end = threading.Event()
        self.may_end.set()

    def __call__(self, folder, position, parallel, **given):
        self.begun.append(position.step)
        self.given.append(given)
        number = len(self.begun)
        if number in self.not_begun:
            raise SaveError(f"no room for number {number}")

        def finish(allowed):
            if number in self.failing:
                raise SaveError(f"no room for number {number}")
            allowed()
            self.finished.append(position.step)

        def write():
            self.nice.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
            self.may_end.wait(20)

        return SimpleNamespace(write=write, finish=finish)


class OneRank:
    """In place of torch.distributed."""

    broadcast_object_list = staticmethod(lambda words, src: None)


@pytest.fixture
def made(tmp_path, monkeypatch):
    saves, said, pruned = Saves(), [], []
    monkeypatch.setattr(saving, "dist", OneRank)
    monkeypatch.setattr(saving, "begin_save", saves)
    monkeypatch.setattr(saving, "prune_checkpoints", lambda folder, **how: pruned.append(how))
    monkeypatch.setattr(saving, "model_card", lambda run, position: f"step {position.step}")

    def make(**options):
        options = {"checkpoint_dir": str(tmp_path), "keep_top_k": 3, "higher_is_better": True, **options}
        run = SimpleNamespace(
            cfg=SimpleNamespace(checkpointing=CheckpointingConfig(**options)),
            owner=claim(tmp_path),
            parallel=SimpleNamespace(rank=0, largest=lambda number: number),
            position=at(0),
            ranking_metric="validation-a/loss",
            inputs=SimpleNamespace(source=SimpleNamespace(hf_files="files")),
            own_files={"tokenizer.json": b"{}"},
            trainer=SimpleNamespace(model_to_save=lambda: "whole", optimizer="adam", scheduler="cosine"),
        )
        return Saver(run, SimpleNamespace(message=said.append))

    return SimpleNamespace(make=make, saves=saves, said=said, pruned=pruned, folder=tmp_path)


def test_a_save_at_once_is_pruned_and_never_made_in_another_runs_folder(made):
    saver = made.make(save_optimizer=False)
    saver.save(at(7), wait=False)
    (given,) = made.saves.given
    assert given["own_files"] == {"tokenizer.json": b"{}", "README.md": b"step 7"}
    assert (given["model"], given["optimizer"], given["copies"]) == ("whole", None, None)
    assert made.pruned == [{"keep_top_k": 3, "metric": "validation-a/loss", "higher_is_better": True}]
    assert (made.saves.finished, saver.newest_step) == ([7], 7)
    claim(made.folder)
    with pytest.raises(SaveError, match="another run has started"):
        saver.save(at(8), wait=False)
    assert made.saves.begun == [7]


def test_another_run_in_the_folder_is_told_in_the_same_words_whatever_it_broke(made):
    """The other run deletes what this one is writing."""
    for asynchronous in (True, False):
        saver = made.make(async_save=asynchronous)
        made.saves.failing = {len(made.saves.begun) + 1}
        made.saves.may_end.clear()
        threading.Timer(0.1, lambda: (claim(made.folder), made.saves.may_end.set())).start()
        with pytest.raises(SaveError, match="another run has started"):
            saver.save(at(3), wait=True)


def test_beside_the_steps_there_is_one_at_a_time(made):
    saver = made.make(async_save=True)
    made.saves.may_end.clear()
    saver.save(at(2), wait=False)
    saver.look(at(3))
    saver.save(at(2), wait=False)
    assert (made.saves.begun, made.saves.finished, saver.newest_step) == ([2], [], 0)
    assert made.saves.given[0]["copies"] is not None
    threading.Timer(0.1, made.saves.may_end.set).start()
    saver.save(at(4), wait=False)
    assert (made.saves.begun, made.saves.finished[0]) == ([2, 4], 2)
    assert made.saves.given[1]["copies"] is made.saves.given[0]["copies"]
    saver.save(at(4), wait=True)
    assert (made.saves.begun, made.saves.finished, saver.newest_step) == ([2, 4], [2, 4], 4)
    saver.save(at(5), wait=True)
    saver.end()
    assert made.saves.finished == [2, 4, 5] and made.said == []


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a priority is of a process")
def test_steps_come_before_what_is_written_beside_them(made):
    for asynchronous in (False, True):
        made.make(async_save=asynchronous).save(at(2), wait=True)
    assert made.saves.nice[1] == min(19, made.saves.nice[0] + saving.BACKGROUND_NICE)
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == made.saves.nice[0]


def test_a_failure_is_said_at_the_next_step_and_its_weights_saved(made):
    saver = made.make(async_save=True)
    made.saves.failing = {1}
    saver.save(at(2), wait=False)
    saver._writing[1].join()
    saver.look(at(3))
    assert made.said == ["NOT SAVED: step 2; tried again now: no room for number 1"]
    assert (made.saves.begun, made.saves.finished, saver.newest_step) == ([2, 3], [], 0)
    saver.end()
    assert (made.saves.finished, saver.newest_step) == ([3], 3)


@pytest.mark.parametrize("failing", [{1}, {1, 2}])
def test_a_failure_at_the_end_of_a_run_is_said_and_hides_no_other_error(made, failing):
    saver = made.make(async_save=True)
    made.saves.failing = failing
    saver.save(at(2), wait=False)
    if len(failing) > 1:
        saver.save(at(3), wait=False)
    saver.end()
    assert made.said[-1] == f"NOT SAVED: step {1 + len(failing)}; the run ends: no room for number {len(failing)}"
    assert (len(made.said), made.saves.finished) == (len(failing), [])


@pytest.mark.parametrize("when", ["failing", "not_begun"])
@pytest.mark.parametrize(("failing", "raises"), [({1}, False), ({1, 2}, True)])
def test_the_last_save_is_tried_twice(made, when, failing, raises):
    saver = made.make(async_save=True)
    setattr(made.saves, when, failing)
    if raises:
        with pytest.raises(SaveError, match="number 2"):
            saver.save(at(9), wait=True)
    else:
        saver.save(at(9), wait=True)
    assert made.saves.finished == ([] if raises else [9]) and len(made.said) == 1


def test_a_run_begins_without_what_a_killed_one_left(made):
    for name in (".step_9.partial/model", "step_3/model", "step_4.damaged"):
        (made.folder / name).mkdir(parents=True)
    made.make(enabled=False)
    assert list(made.folder.glob(".step*"))
    made.make(enabled=True)
    assert sorted(path.name for path in made.folder.iterdir() if path.is_dir()) == ["step_3", "step_4.damaged"]


def slow_async(config: str, overrides: list[str]) -> tuple[int, list[int]]:
    """Target for run_distributed: a run whose files are written after two more steps, and after which steps there was a
    complete checkpoint more."""
    import megadpo.checkpoint.writer as writer
    from megadpo.train import saving

    steps: list[int] = []
    write_file, look, save = writer._write_file, saving.Saver.look, saving.Saver.save
    may_write = threading.Event()

    def later(*given):
        assert may_write.wait(60)
        return write_file(*given)

    def looked(saver, position):
        if saver._writing is None:
            return
        if position.step == saver._saving_step + 2:
            may_write.set()
            saver._writing[1].join(60)
        before = saver.newest_step
        look(saver, position)
        if saver.newest_step != before:
            steps.append(position.step)
            may_write.clear()

    def saved(saver, position, *, wait):
        if wait:  # no step follows
            may_write.set()
        save(saver, position, wait=wait)

    writer._write_file, saving.Saver.look, saving.Saver.save = later, looked, saved
    return train(config, overrides), steps


@pytest.mark.distributed
@pytest.mark.parametrize("layout", [[TP2], [DIST, "policy.precision=bfloat16"]], ids=["tp2", "dp2_bf16"])
def test_what_is_written_later_is_what_there_was_at_its_step(layout, tmp_path):
    """Byte for byte the files of a run that saves at once; the later ones hold the later weights."""
    model = make_model(tmp_path / "model")
    files = {}
    for name, target in (("sync", train), ("async", slow_async)):
        folder = tmp_path / name
        folder.mkdir()
        given = {"enabled": True, "save_period": 3, "async_save": name == "async"}
        config = make_config(folder, model, pairs=80, checkpointing=given, dpo={"max_num_steps": 8})
        results = run_distributed(target, 2, str(config), layout, init_process_group=False)
        assert results == ([(0, [5, 8])] * 2 if name == "async" else [0, 0]), "training went on meanwhile"
        found = sorted(path for path in (folder / "checkpoints").glob("step_*/*/*") if "hf" not in path.parts)
        files[name] = {str(path.relative_to(folder)): path.read_bytes() for path in found}
        assert {path.parts[-3] for path in found} == {"step_3", "step_6", "step_8"}
        assert not list(Path(folder / "checkpoints").glob(".step*"))
    shards = [one for one in files["sync"] if one.endswith((".distcp", ".pt"))]
    assert shards and [one for one in shards if files["sync"][one] != files["async"].get(one)] == []
    assert (
        files["async"]["checkpoints/step_3/model/__0_0.distcp"]
        != files["async"]["checkpoints/step_6/model/__0_0.distcp"]
    )
