"""What docs/running.md promises of a power loss, by the calls that are made: nothing is named before it is on the disk.
(tests/collect/test_journal.py has those of a rollout.)"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megadpo.commands import main
from tests.helpers.disk_calls import DiskCalls, disk_calls
from tests.helpers.distributed import REPOSITORY, run_distributed
from tests.helpers.overrides import TP2
from tests.helpers.runs import make_config, make_model, train
from tests.rollouts.builders import current, write

PROMISED = {
    "a checkpoint": True,
    "`config.yaml` of a run": True,
    "an export, an import": True,
    "pairs, and the rollouts that were left out": True,
    "a collected rollout": True,
    "`metrics.jsonl`": False,
    "an evaluation": False,
    "caches: token ids, the reference's log-probabilities": False,
}


def test_the_page_promises_what_is_tested():
    page = (REPOSITORY / "docs/running.md").read_text(encoding="utf-8")
    table = page.partition("| written | survives a power loss |")[2].partition("\n\n")[0]
    shown = dict(re.findall(r"^\| (.+?) \| (yes|no)[,:] .* \|$", table, flags=re.MULTILINE))
    assert shown == {name: "yes" if kept else "no" for name, kept in PROMISED.items()}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"))


def train_and_follow(config: str, overrides: list[str]) -> tuple[int, DiskCalls]:
    with disk_calls() as calls:
        return train(config, overrides), calls


@pytest.mark.distributed
@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_checkpoint_and_what_is_no_promise(model, tmp_path, asynchronous):
    saving = {"enabled": True, "save_period": 1, "keep_top_k": 1, "async_save": asynchronous}
    config = make_config(
        tmp_path,
        model,
        checkpointing=saving,
        data={"cache_dir": str(tmp_path / "cache")},
        dpo={"max_num_steps": 2, "reference": {"mode": "cached"}},
    )
    results = run_distributed(train_and_follow, 2, str(config), [TP2], init_process_group=False)
    assert [code for code, _ in results] == [0, 0]
    calls = results[0][1] + results[1][1]
    checkpoints = tmp_path / "checkpoints"
    assert calls.not_durable(checkpoints / "step_2") == []
    assert len([path for path in (checkpoints / "step_2").rglob("*") if path.is_file()]) > 10
    assert calls.not_durable(tmp_path / "logs/config.yaml") == []
    order = [Path(target).name for _, target, _ in calls.renamed if Path(target).parent == checkpoints]
    assert order == ["step_1", "step_2", ".deleted.step_1"], "the older one goes when the newer one is there"
    named = {Path(path).name: when for path, when in calls.synced.items()}
    assert named["checkpoints"] < [when for _, target, when in calls.renamed if ".deleted" in target][-1]
    assert not [path for path in calls.synced if "/cache" in path or "reference" in path or "metrics" in path]


def test_imports_and_exports(model, tmp_path):
    with disk_calls() as calls:
        assert main(["import", str(model), str(tmp_path / "megatron")]) == 0
        assert main(["export", str(tmp_path / "megatron"), str(tmp_path / "hf")]) == 0
    assert calls.not_durable(tmp_path / "megatron") == calls.not_durable(tmp_path / "hf") == []


def test_pairs(tmp_path):
    rows = [current("q", "a" * n, reward) for n, reward in ((1, 0.0), (2, 1.0))]
    write(tmp_path / "rollouts.jsonl", [*rows, current("alone", "a", 1)])
    with disk_calls() as calls:
        assert main(["pairs", str(tmp_path / "rollouts.jsonl"), "-o", str(tmp_path / "pairs.jsonl")]) == 0
    assert calls.not_durable(tmp_path / "pairs.jsonl") == []
    assert calls.not_durable(tmp_path / "pairs.rejected.jsonl") == []
