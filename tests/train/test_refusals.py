"""The words for problems of several ranks. That all ranks end with them is in test_agreement.py."""

from __future__ import annotations

from megadpo.config.problems import Problem
from megadpo.train.refusals import RankProblems, merged


def test_a_problem_is_there_once_with_the_hosts_that_have_it() -> None:
    everywhere, some, one = (Problem(name, 1, "2", "change it") for name in ("a", "b", "c"))
    of_ranks = [[everywhere], [everywhere], [everywhere, some, one], *[[everywhere, some]] * 3]
    hosts = ["node0", "node0", "node1", "node1", "node2", "node3"]
    found = [RankProblems(rank, hosts[rank], problems) for rank, problems in enumerate(of_ranks)]
    assert [problem.where for problem in merged(found[::-1], 6)] == [
        "a",
        "b on node1 (rank 2), node2 (rank 4), node3 (rank 5)",
        "c on node1 (rank 2)",
    ]
    (many,) = merged([RankProblems(rank, f"node{rank}", [some]) for rank in range(1, 9)], 9)
    assert many.where == "b on node1 (rank 1), node2 (rank 2), node3 (rank 3) and 5 more"
