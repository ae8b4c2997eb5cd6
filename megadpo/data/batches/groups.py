"""Which pairs share their prompt, which of their answers are the same, and what answers begin with in common.

A group is one prompt, its distinct answers, and the pairs over them. In a pack the prompt, each answer, and what answers
have in common beyond the prompt (prefixes.py) are computed once, whatever the number of pairs they are in: with all pairs
of K answers, a prompt once instead of K (K - 1) / 2 times, and an answer once instead of K - 1 times. Loss and gradients
stay those of the pairs.

Shapes: N pairs of the data set, P of them looked at.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from megadpo.data.batches.deal import Deal, deal_batch
from megadpo.data.batches.prefixes import PrefixTree, with_beginnings
from megadpo.data.batches.rebalance import BALANCE
from megadpo.data.batches.work import WorkModel, keys_up_to
from megadpo.data.pairs import Ints, Pairs

LOOK_AHEAD = 64
"""Groups that wait for a global batch with room for all of their pairs, at most."""


@dataclass(frozen=True, eq=False)
class PairGroups:
    """Prompts and answers of N pairs by number. Numbers count from 0 by first appearance."""

    prompts: Ints
    """[N] which prompt: the group of the pair."""
    answers: Ints
    """[N, 2] which chosen and which rejected answer. The same number: the same tokens and loss mask after the same
    prompt."""
    tree: PrefixTree
    """Of the prompts and answers, by their numbers."""

    @classmethod
    def of(cls, pairs: Pairs, *, share_answers: bool = True) -> PairGroups:
        """By the hashes of their texts; pack_pairs holds the texts themselves against each other. share_answers: false
        gives each answer of each pair a number of its own, and computes it whole."""
        texts, identities = pairs.text_tokens(), pairs.identities.reshape(-1, 4)
        prompts = _by_appearance(identities[:, 0])
        answers = np.arange(2 * len(prompts))
        if share_answers:
            answers = _by_appearance(np.repeat(prompts, 2), identities[:, 1:3].ravel())
        groups = cls.made(prompts, answers.reshape(-1, 2), texts[:, 0], texts[:, 1:])
        if not share_answers:
            return groups
        _, first = np.unique(answers, return_index=True)
        return replace(groups, tree=with_beginnings(groups.tree, pairs, first // 2 * 3 + 1 + first % 2))

    @classmethod
    def made(cls, prompts: Ints, answers: Ints, prompt_tokens: Ints, answer_tokens: Ints) -> PairGroups:
        """Answers that have no beginnings in common. prompt_tokens: [N]; answer_tokens: [N, 2]."""
        number = int(answers.max(initial=-1)) + 1
        roots = number + prompts
        parents = np.full(number + int(prompts.max(initial=-1)) + 1, -1, dtype=np.int64)
        ends = np.zeros_like(parents)
        parents[answers] = roots[:, None]
        ends[roots] = prompt_tokens
        ends[answers] = prompt_tokens[:, None] + answer_tokens
        return cls(prompts, answers, PrefixTree(number, parents, ends))

    @classmethod
    def alone(cls, text_tokens: Ints) -> PairGroups:
        """Pairs that share nothing. text_tokens: [N, 3], of prompt, chosen and rejected."""
        number = len(text_tokens)
        answers = np.arange(2 * number).reshape(-1, 2)
        return cls.made(np.arange(number), answers, text_tokens[:, 0], text_tokens[:, 1:])

    def __len__(self) -> int:
        return len(self.prompts)

    def at(self, positions: Ints) -> PairGroups:
        """The pairs at `positions`, in this order, with their numbers."""
        return PairGroups(self.prompts[positions], self.answers[positions], self.tree)

    @property
    def num_prompts(self) -> int:
        return int(self.prompts.max(initial=-1)) + 1

    @property
    def prompts_in_common(self) -> bool:
        return self.num_prompts < len(self)

    @property
    def tokens_alone(self) -> int:
        """Of all pairs, each with its own prompt and two answers."""
        return int(self.prompt_tokens.sum() + self.answer_tokens.sum())

    @property
    def prompt_tokens(self) -> Ints:
        """[N]"""
        return self.tree.ends[self.tree.num_answers + self.prompts]

    @property
    def answer_tokens(self) -> Ints:
        """[N, 2]"""
        return self.tree.ends[self.answers] - self.prompt_tokens[:, None]

    @property
    def pair_tokens(self) -> Ints:
        """[N]: tokens of each pair in a pack of its own."""
        tree = self.tree
        one, other = self.answers.T
        apart = tree.ends[one] + tree.ends[other]
        while (differ := one != other).any():  # up to the last node that both have
            later = tree.ends[one] >= tree.ends[other]
            one, other = (
                np.where(differ & moves, tree.parents[node], node) for node, moves in ((one, later), (other, ~later))
            )
        tokens: Ints = apart - tree.ends[one]
        return tokens

    def text_tokens(self, labels: Ints) -> Ints:
        """int64 [labels, 1 + K]: tokens of the prompt and of each distinct answer of the pairs with one label [N], from 0, that
        have one prompt. K is the most answers; 0 where there are fewer."""
        of_answers = np.repeat(labels, 2)
        first = _first_of_each(of_answers, self.answers.ravel())
        first = first[np.argsort(of_answers[first], kind="stable")]
        of_answers = of_answers[first]
        counts = np.bincount(of_answers)
        column = np.arange(len(first)) - np.repeat(np.cumsum(counts) - counts, counts)
        found = np.zeros((len(counts), 1 + counts.max()), dtype=np.int64)
        found[labels, 0] = self.prompt_tokens
        found[of_answers, 1 + column] = self.answer_tokens.ravel()[first]
        return found

    def totals(self, positions: Ints, labels: Ints, num_labels: int, model: WorkModel | None) -> tuple[Ints, Ints]:
        """Tokens and work, int64 [num_labels] each, of the pairs at `positions` [P]; those with the same label [P] are
        computed together. Without a model, work is tokens."""
        label, node = self._computed(positions, labels)
        start, end, answer = self.tree.starts(node), self.tree.ends[node], self.tree.parents[node] >= 0
        tokens, answer_tokens = np.zeros((2, num_labels), dtype=np.int64)
        np.add.at(tokens, label, end - start)
        if model is None:
            return tokens, tokens
        np.add.at(answer_tokens, label[answer], (end - start)[answer])
        keys = {window: np.zeros(num_labels, dtype=np.int64) for window in model.windows}
        for window, seen in keys.items():
            np.add.at(seen, label, keys_up_to(end, window) - keys_up_to(start, window))
        return tokens, model.work(tokens, answer_tokens, keys)

    def _computed(self, positions: Ints, labels: Ints) -> tuple[Ints, Ints]:
        """Labels and nodes, int64 [n] each: every node that the pairs with a label need, once."""
        label, node = np.repeat(labels, 2), self.answers[positions].ravel()
        first = _first_of_each(label, node)
        found = [(label[first], node[first])]
        while len(found[-1][1]):
            label, node = found[-1]
            before = self.tree.parents[node]
            found.append((label[before >= 0], before[before >= 0]))
        label, node = (np.concatenate(columns) for columns in zip(*found, strict=True))
        first = _first_of_each(label, node)
        return label[first], node[first]

    def members_of(self, prompts: Ints) -> Ints:
        """Positions: all pairs of the first of `prompts`, then of the second, ..."""
        members = self.members()
        return np.concatenate([members[prompt] for prompt in prompts])

    def members(self) -> list[Ints]:
        """For each prompt the positions of its pairs."""
        return _members(self.prompts)

    def order(self, shuffled: Iterable[int], batch_size: int) -> Ints:
        """[N] positions: the groups in the order `shuffled`, a permutation of their numbers, cut into global batches of
        `batch_size` pairs so that few groups are split.

        A group that doesn't fit into what is left of a global batch waits for the next one, and smaller ones take the
        room. A group is split where none fits: larger than a global batch, at most LOOK_AHEAD waiting, or the end.
        """
        sizes = np.bincount(self.prompts)
        members = np.argsort(self.prompts, kind="stable")
        if len(sizes) == len(members):
            return members[np.fromiter(shuffled, dtype=np.int64, count=len(members))]
        starts = np.concatenate([[0], np.cumsum(sizes)])
        parts = _in_batches(iter(shuffled), sizes.tolist(), batch_size)
        return np.concatenate([members[starts[group] + a : starts[group] + b] for group, a, b in parts])


def deal_groups(
    groups: PairGroups,
    positions: Ints,
    *,
    num_ranks: int,
    budget_tokens: int,
    work_model: WorkModel | None,
    micro_batch_multiple: int,
    whole: bool = False,
) -> Deal:
    """deal_batch for a global batch of pairs at `positions` [P] whose groups stay together.

    A group is split where it doesn't fit into a pack, and where otherwise a rank would have more work than the others:
    the deal whose busiest rank has the least work is taken. whole: no group is split; each must fit into a pack.
    Deterministic; raises ValueError as deal_batch does.
    """
    labels = _by_appearance(groups.prompts[positions])
    if not whole:
        labels = _split_too_long(groups, positions, labels, budget_tokens)
    best: tuple[int, Deal, Ints] | None = None
    for _ in range(4 * num_ranks):
        lengths, work = groups.totals(positions, labels, _number_of(labels), work_model)
        deal = deal_batch(
            lengths,
            num_ranks=num_ranks,
            budget_tokens=budget_tokens,
            work=work,
            micro_batch_multiple=micro_batch_multiple,
        )
        by_rank = [int(work[[number for pack in rank for number in pack]].sum()) for rank in deal]
        busiest = max(by_rank)
        if best is None or busiest < best[0]:
            best = busiest, deal, labels
        if min(by_rank) >= (1 - BALANCE) * busiest:
            break
        sizes = np.bincount(labels)
        splittable = [n for pack in deal[by_rank.index(busiest)] for n in pack if sizes[n] > 1 and not whole]
        if not splittable:
            break
        labels = _halved(groups, positions, labels, max(splittable, key=lambda number: (work[number], -number)))
    assert best is not None
    _, deal, labels = best
    members = _members(labels)
    return [[sorted(int(pair) for number in pack for pair in members[number]) for pack in rank] for rank in deal]


def _in_batches(shuffled: Iterator[int], sizes: Sequence[int], batch_size: int) -> Iterator[tuple[int, int, int]]:
    """(group, a, b): its pairs a to b are next."""
    waiting: deque[tuple[int, int]] = deque()  # group, its first pair that has not been taken
    room = batch_size
    ended = False
    while not ended or waiting:
        fitting = next((one for one in waiting if sizes[one[0]] - one[1] <= room), None)
        while fitting is None and not ended and len(waiting) < LOOK_AHEAD:
            group = next(shuffled, None)
            if group is None:
                ended = True
            elif sizes[group] <= room:
                fitting = group, 0
            else:
                waiting.append((group, 0))
                if sizes[group] > batch_size:
                    break
        if fitting is not None:
            group, first = fitting
            if waiting and fitting in waiting:
                waiting.remove(fitting)
            end = sizes[group]
        elif waiting:
            group, first = waiting.popleft()
            end = first + room
            waiting.appendleft((group, end))
        else:
            return
        yield group, first, end
        room -= end - first
        room = room or batch_size


def _split_too_long(groups: PairGroups, positions: Ints, labels: Ints, budget_tokens: int) -> Ints:
    """`labels` with new ones for the pairs that a pack has no room for beside the others of their group."""
    lengths, _ = groups.totals(positions, labels, _number_of(labels), None)
    labels, members = labels.copy(), _members(labels)
    for number in np.flatnonzero(lengths > budget_tokens).tolist():
        label, taken = number, set[int]()
        for pair in _by_answers(groups, positions, members[number]):
            nodes = {node for answer in groups.answers[positions[pair]].tolist() for node in groups.tree.path(answer)}
            if taken and groups.tree.sizes(np.array(list(taken | nodes))).sum() > budget_tokens:
                label, taken = int(labels.max()) + 1, set()
            labels[pair] = label
            taken |= nodes
    return labels


def _halved(groups: PairGroups, positions: Ints, labels: Ints, number: int) -> Ints:
    """`labels` with a new one for half of the pairs of `number`, those with other answers where there are some."""
    labels = labels.copy()
    pairs = _by_answers(groups, positions, np.flatnonzero(labels == number))
    labels[pairs[len(pairs) // 2 :]] = labels.max() + 1
    return labels


def _by_answers(groups: PairGroups, positions: Ints, pairs: Ints) -> Ints:
    """`pairs`, with those that share answers side by side."""
    answers = np.sort(groups.answers[positions[pairs]], axis=1)
    order: Ints = pairs[np.lexsort((answers[:, 1], answers[:, 0]))]
    return order


def _members(labels: Ints) -> list[Ints]:
    """For each label, from 0: where it stands in `labels`."""
    order = np.argsort(labels, kind="stable")
    bounds = np.searchsorted(labels[order], np.arange(_number_of(labels) + 1))
    return [order[start:end] for start, end in pairwise(bounds)]


def _number_of(labels: Ints) -> int:
    return int(labels.max(initial=-1)) + 1


def _by_appearance(*columns: Ints) -> Ints:
    """int64 [n]: equal rows of the columns, each [n], get the same number, counted by first appearance."""
    order = np.lexsort(columns)
    changes = np.zeros(len(order), dtype=bool)
    for column in columns:
        changes[1:] |= np.diff(column[order]) != 0
    first = order[np.concatenate([[True], changes[1:]])] if len(order) else order  # lexsort is stable
    place = np.empty(len(order), dtype=np.int64)
    place[order] = np.cumsum(changes)
    rank = np.empty(len(first), dtype=np.int64)
    rank[np.argsort(first, kind="stable")] = np.arange(len(first))
    numbers: Ints = rank[place]
    return numbers


def _first_of_each(*columns: Ints) -> Ints:
    """Where each distinct row of the columns, each [n], stands for the first time."""
    _, first = np.unique(_by_appearance(*columns), return_index=True)
    return first
