"""Problems that only some ranks have end all ranks, with the same words. Otherwise the others would wait for them."""

from __future__ import annotations

import dataclasses
import itertools
import os
import pickle
import socket
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from megadpo.config.problems import Attempts, ConfigError, Made, Problem
from megadpo.launcher import world_size

if TYPE_CHECKING:
    from torch.distributed import Store

_MOST_READ = 64
"""Ranks whose problems are read, where more have some."""
_MOST_NAMED = 3
_CALLS = itertools.count()
"""Of `before_groups`: each uses keys of its own."""


def before_groups(make: Callable[[], Made]) -> Made:
    """`make()`, before there are process groups. Raises ConfigError on every rank with the problems of all ranks.

    All ranks call it equally often. Under torchrun and `launch` they exchange their problems over the agent's store, and wait
    there for each other. Other launchers have none; then each rank raises its own.
    """
    attempt = Attempts()
    made = attempt(make)
    ranks = world_size()
    if ranks > 1 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        import torch.distributed as dist  # not for --help, or for a refusal of one process

        store, rank, _ = next(dist.rendezvous("env://"))
        prefix = f"megadpo/attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{next(_CALLS)}"
        if found := _exchanged(dist.PrefixStore(prefix, store), rank, ranks, attempt.problems):
            raise ConfigError(merged(found, ranks))
    attempt.refuse()
    assert made is not None
    return made


def _exchanged(store: Store, rank: int, ranks: int, problems: Sequence[Problem]) -> list[RankProblems]:
    """The problems of every rank that has some. A rank that refuses ends its launcher, and with it perhaps the store: so none
    returns before all have read them."""
    if problems:
        number = store.add("refusals", 1)
        store.set(f"refusal {number}", pickle.dumps(RankProblems(rank, socket.gethostname(), list(problems))).hex())
    _wait_for_all(store, "arrived", ranks)
    count = store.add("refusals", 0)
    texts = [store.get(f"refusal {number}").decode() for number in range(1, min(count, _MOST_READ) + 1)]
    found: list[RankProblems] = [pickle.loads(bytes.fromhex(text)) for text in texts]
    if found:
        _wait_for_all(store, "read", ranks)
    return found


def _wait_for_all(store: Store, what: str, ranks: int) -> None:
    if store.add(what, 1) == ranks:
        store.set(f"all {what}", "")
    store.wait([f"all {what}"])


@dataclasses.dataclass(frozen=True)
class RankProblems:
    """The problems of one rank."""

    rank: int
    host: str
    problems: list[Problem]


def merged(found: Sequence[RankProblems], ranks: int) -> list[Problem]:
    """The problems of all ranks, each once. Those that not each of the `ranks` ranks has name the hosts."""
    having: dict[str, tuple[Problem, list[RankProblems]]] = {}
    for one in sorted(found, key=lambda one: one.rank):
        for problem in one.problems:
            having.setdefault(str(problem), (problem, []))[1].append(one)
    return [
        problem if len(some) == ranks else dataclasses.replace(problem, where=f"{problem.where} on {_places(some)}")
        for problem, some in having.values()
    ]


def _places(some: Sequence[RankProblems]) -> str:
    """Such as "node7 (rank 8)": each host with its first rank."""
    first_of: dict[str, int] = {}
    for one in some:
        first_of.setdefault(one.host, one.rank)
    named = [f"{host} (rank {rank})" for host, rank in first_of.items()]
    return ", ".join(named[:_MOST_NAMED]) + (f" and {len(named) - _MOST_NAMED} more" if named[_MOST_NAMED:] else "")
