"""What answers to one prompt begin with in common: trees of pieces of text, each computed once.

    prompt + common beginning + rest of answer 1        prompt
    prompt + common beginning + rest of answer 2        |-- common beginning
    prompt + answer 3                                   |   |-- rest of answer 1
                                                        |   `-- rest of answer 2
                                                        `-- answer 3

Answers begin alike as far as their tokens and loss masks are the same. Every answer keeps a token of its own. A piece costs a
call of some attention kernels, and one more copy of the keys before it; so a common beginning has a piece of its own only
where it is LEAST_TOKENS longer than the one before it, and only in a data set in which they save LEAST_SHARE of the tokens.
That depends on the data alone: not on ranks, batches, or where a run went on.

Shapes: K answers, G prompts, M nodes, at least K + G.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from megadpo.data.pairs import Ints, Pairs, TokenIds

LEAST_TOKENS = 16
"""Of a piece that answers have in common."""
LEAST_SHARE = 0.02
"""Of a data set's tokens, prompts and distinct answers once: what pieces in common save, or there are none."""

_ROWS = 1 << 16  # answers whose beginnings are looked at together
_FACTOR = 0x9E3779B97F4A7C15  # odd, of a hash modulo 2^64


class PathPiece(NamedTuple):
    """Part of a sequence, prompt + answer."""

    node: int
    """The node at its end. Pieces with the same node are the same tokens after the same tokens."""
    start: int
    """The piece is the tokens [start, end) of the sequence."""
    end: int


@dataclass(frozen=True, eq=False)
class PrefixTree:
    """The trees of all prompts. Nodes 0 to K - 1 are what each answer has for itself, by the answers' numbers; the next G nodes
    are the prompts, which are the roots; the others are what answers have in common. A sequence is the path from its prompt to
    its answer's own node."""

    num_answers: int
    """K."""
    parents: Ints
    """[M] the node before; -1 before a prompt."""
    ends: Ints
    """[M] tokens of the sequence up to the node's end."""

    def starts(self, nodes: Ints) -> Ints:
        """[nodes] tokens of the sequence before each of these nodes."""
        before = self.parents[nodes]
        starts: Ints = np.where(before < 0, 0, self.ends[before])
        return starts

    def sizes(self, nodes: Ints) -> Ints:
        """[nodes] tokens of these nodes themselves."""
        sizes: Ints = self.ends[nodes] - self.starts(nodes)
        return sizes

    @property
    def tokens(self) -> int:
        """Of all nodes."""
        return int(self.sizes(np.arange(len(self.ends))).sum())

    def path(self, node: int) -> list[int]:
        """From its prompt to `node`."""
        nodes = [node]
        while (before := int(self.parents[nodes[-1]])) >= 0:
            nodes.append(before)
        return nodes[::-1]

    def pieces(self, answers: Iterable[int]) -> dict[int, list[PathPiece]]:
        """For each of `answers` its sequence in the fewest pieces in which those that several of `answers` share are apart."""
        paths = {answer: self.path(answer) for answer in answers}
        children = defaultdict[int, set[int]](set)
        for path in paths.values():
            for node, child in pairwise(path):
                children[node].add(child)
        found: dict[int, list[PathPiece]] = {}
        for answer, path in paths.items():
            ends = [node for node in path if len(children[node]) != 1]
            borders = [0, *self.ends[ends].tolist()]
            found[answer] = [PathPiece(node, *both) for node, both in zip(ends, pairwise(borders), strict=True)]
        return found


def with_beginnings(tree: PrefixTree, pairs: Pairs, texts: Ints) -> PrefixTree:
    """`tree`, in which answers share only prompts, with nodes for what answers begin with in common. If they save less than
    LEAST_SHARE: `tree` itself.

    texts: int64 [K], which text of `pairs` (Pairs.text) each answer is.
    """
    parents, new = tree.parents.copy(), _NewNodes(len(tree.parents), [], [])
    for answers in _alike(tree, pairs, texts):
        root = int(parents[answers[0]])
        parents[answers] = new.add(root, int(tree.ends[root]), [pairs.text(text) for text in texts[answers].tolist()])
    ends = np.concatenate([tree.ends, np.array(new.ends, dtype=np.int64)])
    grown = PrefixTree(tree.num_answers, np.concatenate([parents, np.array(new.parents, dtype=np.int64)]), ends)
    return grown if tree.tokens - grown.tokens >= LEAST_SHARE * tree.tokens else tree


def _alike(tree: PrefixTree, pairs: Pairs, texts: Ints) -> Iterator[list[int]]:
    """Answers to one prompt whose first LEAST_TOKENS tokens have the same hash, two at least."""
    roots = tree.parents[: tree.num_answers]
    long = np.flatnonzero(tree.ends[: tree.num_answers] - tree.ends[roots] > LEAST_TOKENS)
    hashes = np.empty(len(long), dtype=np.uint64)
    factors = np.cumprod(np.full(LEAST_TOKENS, _FACTOR, dtype=np.uint64), dtype=np.uint64)
    for first in range(0, len(long), _ROWS):
        rows = slice(first, first + _ROWS)
        hashes[rows] = pairs.first_tokens(texts[long[rows]], LEAST_TOKENS).astype(np.uint64) @ factors
    order = np.lexsort((hashes, roots[long]))
    long, hashes = long[order], hashes[order]
    borders = np.flatnonzero((np.diff(roots[long]) != 0) | (hashes[1:] != hashes[:-1])) + 1
    bounds = np.concatenate([[0], borders, [len(long)]])
    for number in np.flatnonzero(np.diff(bounds) > 1).tolist():
        yield long[bounds[number] : bounds[number + 1]].tolist()


@dataclass(frozen=True)
class _NewNodes:
    """Nodes for what answers have in common."""

    first: int
    """Number of the first of them in the tree."""
    parents: list[int]
    ends: list[int]

    def add(self, root: int, prompt_tokens: int, texts: Sequence[TokenIds]) -> list[int]:
        """Adds what these answers to the prompt `root` have in common. Returns the node before each answer's own."""
        # Those that begin alike, side by side
        order = sorted(range(len(texts)), key=lambda number: texts[number].tobytes())
        common = [_common(texts[one], texts[other]) for one, other in pairwise(order)]
        before = [root] * len(texts)
        # Answers [first, last) in this order, and the tokens and the node that they have in common so far
        waiting = [(0, len(order), 0, root)]
        while waiting:
            first, last, shared, node = waiting.pop()
            if last - first == 1:
                before[order[first]] = node
                continue
            least = min(common[first : last - 1])
            if least - shared >= LEAST_TOKENS:
                self.parents.append(node)
                self.ends.append(prompt_tokens + least)
                shared, node = least, self.first + len(self.parents) - 1
            borders = [number + 1 for number in range(first, last - 1) if common[number] == least]
            waiting += [(a, b, shared, node) for a, b in pairwise([first, *borders, last])]
        return before


def _common(one: TokenIds, other: TokenIds) -> int:
    """How many tokens both begin with, so that each has one left."""
    most = min(len(one), len(other)) - 1
    different = np.flatnonzero(one[:most] != other[:most])
    return int(different[0]) if len(different) else most
