"""What must be the same on every rank: a difference, or a problem of one rank alone, ends all of them with the same words."""

from __future__ import annotations

import os
import shutil

import pytest

from megadpo.config.problems import Problem
from megadpo.train.agreement import _of_all
from tests.helpers.distributed import run_distributed
from tests.helpers.runs import evaluate_and_read, make_config, make_model, make_pairs, read_metrics, train_and_read


def test_a_problem_is_there_once_with_the_hosts_that_have_it():
    everywhere, some, one = (Problem(name, 1, "2", "change it") for name in ("a", "b", "c"))
    hosts = ["node0", "node0", "node1", "node1", "node2", "node3"]
    problems = _of_all(hosts, [[everywhere], [everywhere], [everywhere, some, one], *[[everywhere, some]] * 3])
    assert [problem.where for problem in problems] == [
        "a",
        "b on node1 (rank 2), node2 (rank 4), node3 (rank 5)",
        "c on node1 (rank 2)",
    ]
    many = _of_all([f"node{number}" for number in range(9)], [[], *[[some]] * 8])
    assert many[0].where == "b on node1 (rank 1), node2 (rank 2), node3 (rank 3) and 5 more"


def train_with_own(config: str, of_ranks: list[list[str]]) -> tuple[int, str]:
    """Target for run_distributed: `megadpo train` with this rank's overrides; the exit code, and what was printed."""
    return train_and_read(config, of_ranks[int(os.environ["RANK"])])


def evaluate_with_own(config: str, of_ranks: list[list[str]]) -> tuple[int, str]:
    """The same of `megadpo evaluate`."""
    return evaluate_and_read(config, of_ranks[int(os.environ["RANK"])])


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """40 pairs in train.jsonl; other.jsonl has as many others, fewer.jsonl 24 of them."""
    folder = tmp_path_factory.mktemp("run")
    make_pairs(folder / "other.jsonl", 40, seed=7)
    make_pairs(folder / "fewer.jsonl", 24)
    return make_config(folder, make_model(folder / "model"))


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("override", "where", "words"),
    [
        ("data.train_data_path={folder}/other.jsonl", "data.train_data_path", "other.jsonl: 40 pairs, 5 batches"),
        ("data.train_data_path={folder}/fewer.jsonl", "data.train_data_path", "fewer.jsonl: 24 pairs, 3 batches"),
        ("data.train_data_path={folder}/none.jsonl", "none.jsonl", "No such file"),
        ("dpo.seed=7", "dpo.seed", "got '7'; expected the same on every rank"),
    ],
)
def test_what_differs_on_one_rank_is_refused_on_every_rank(config, override, where, words):
    own = [[], [override.format(folder=config.parent)]]
    results = run_distributed(train_with_own, 2, str(config), own, init_process_group=False, timeout_s=60)
    for code, printed in results:
        assert code == 2 and f"{where} on " in printed and "(rank 1): got" in printed and words in printed, printed
    assert not (config.parent / "logs").exists()


@pytest.mark.distributed
def test_a_validation_set_that_differs_is_refused_by_an_evaluation(config):
    own = [[], [f"data.val_data_paths.held_out={config.parent}/other.jsonl"]]
    for code, printed in run_distributed(evaluate_with_own, 2, str(config), own, init_process_group=False):
        assert code == 2 and "data.val_data_paths.held_out on " in printed and "has " in printed, printed


@pytest.mark.distributed
def test_the_same_pairs_may_lie_elsewhere_on_another_node(config, tmp_path):
    shutil.copy(config.parent / "train.jsonl", tmp_path / "copy.jsonl")
    own = [["dpo.max_num_steps=1", f"logger.log_dir={tmp_path}"] for _ in range(2)]
    own[1] += [f"data.train_data_path={tmp_path}/copy.jsonl", f"data.cache_dir={tmp_path}/cache"]
    assert [code for code, _ in run_distributed(train_with_own, 2, str(config), own, init_process_group=False)] == [
        0,
        0,
    ]
    assert len(read_metrics(tmp_path)) == 1
