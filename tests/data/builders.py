"""Pairs for the tests of this folder: made up, read back, and compared."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

from megadpo.data.formats import PreferencePair
from megadpo.data.formats.read_pairs import read_pairs
from megadpo.data.pairs import LossMask, PairDataset, TokenIds, TokenizedPair
from megadpo.data.sources import Place
from megadpo.data.tokens.dataset import open_dataset
from megadpo.data.tokens.encode import DataSettings
from tests.helpers.tiny_tokenizer import tiny_tokenizer

_ids = st.lists(st.integers(1, 99), min_size=1, max_size=7)


def ids(*tokens: int) -> TokenIds:
    return np.array(tokens, dtype=np.int32)


@st.composite
def tokenized_pairs(draw: st.DrawFn, max_pairs: int = 5) -> list[TokenizedPair]:
    """Up to max_pairs pairs of short texts, some with loss masks, with rows that are not their places in the list."""
    texts = draw(st.lists(st.tuples(_ids, _ids, _ids), max_size=max_pairs))
    return [
        TokenizedPair(10 + 3 * n, ids(*p), ids(*c), ids(*r), draw(loss_masks(len(c))), draw(loss_masks(len(r))))
        for n, (p, c, r) in enumerate(texts)
    ]


def pairs_that_begin_alike(vocab: int = 50, seed: int = 0) -> list[TokenizedPair]:
    """Of six answers to two prompts: 35 and 18 tokens that some begin with, once with a loss mask, and a pair's own 20."""
    rng = np.random.default_rng(seed)

    def text(length: int) -> TokenIds:
        return rng.integers(1, vocab, length).astype(np.int32)

    prompt, one, other, further = text(9), text(18), text(17), text(20)
    a, b, c = (np.concatenate(parts) for parts in ((one, other, text(3)), (one, other, text(5)), (one, text(4))))
    mask_a, mask_b, mask_c = (np.arange(len(ids)) % 7 > 1 for ids in (a, b, c))
    return [
        TokenizedPair(0, prompt, a, b, mask_a, mask_b),
        TokenizedPair(1, prompt, c, text(6), mask_c, None),
        TokenizedPair(2, text(3), np.concatenate([further, text(1)]), np.concatenate([further, text(4)])),
    ]


@st.composite
def branching_pairs(draw: st.DrawFn) -> list[TokenizedPair]:
    """All pairs of the distinct answers to each of some prompts, answers made of few long parts, so that many begin alike."""
    parts = st.sampled_from([(letter, length) for letter in (1, 2) for length in (1, 7, 15, 16, 17, 40)])
    answers = st.tuples(st.lists(parts, max_size=4), st.integers(3, 9), st.sampled_from([None, 2, 5]))
    pairs: list[TokenizedPair] = []
    for number in range(draw(st.integers(1, 3))):
        texts = {}
        for made_of, last, every in draw(st.lists(answers, min_size=2, max_size=5)):
            text = ids(*(letter for letter, length in made_of for _ in range(length)), last)
            mask = None if every is None else np.arange(len(text))[::-1] % every == 0
            texts[(text if mask is None else np.where(mask, text, ~text)).tobytes()] = text, mask
        prompt = ids(*range(1, 2 + draw(st.integers(0, 5))), 90 + number)
        pairs += [
            TokenizedPair(len(pairs) + at, prompt, one, other, one_mask, other_mask)
            for at, ((one, one_mask), (other, other_mask)) in enumerate(combinations(texts.values(), 2))
        ]
    return pairs


@st.composite
def loss_masks(draw: st.DrawFn, tokens: int) -> LossMask | None:
    """A mask with something in the loss and something outside, or None."""
    mask = np.array(draw(st.lists(st.booleans(), min_size=tokens, max_size=tokens)), dtype=bool)
    return mask if mask.any() and not mask.all() else None


def text_pair(prompt: Any, chosen: Any, rejected: Any, line: int = 1) -> PreferencePair:
    return PreferencePair(prompt=prompt, chosen=chosen, rejected=rejected, place=Place("pairs.jsonl", line, line - 1))


def row(number: int = 0, **changes: object) -> dict[str, object]:
    """A good row, whose texts differ by number."""
    words = " the sum" * (number % 5 + 1)
    return {"prompt": f"Human: {number}?{words}", "chosen": f" {number} is right", "rejected": " it is not", **changes}


def write_rows(path: Path, rows: Iterable[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_all(source: str | Path, keys: dict[str, str] | None = None, **options: Any) -> list[PreferencePair]:
    return list(read_pairs(source, keys, **options))


def dataset(folder: Path, num_pairs: int, **settings: Any) -> PairDataset:
    """A data set of `num_pairs` good rows."""
    path = write_rows(folder / f"pairs_{num_pairs}.jsonl", (row(number) for number in range(num_pairs)))
    return open_dataset(
        path, tiny_tokenizer(adds_bos=True), DataSettings(**{"max_total_sequence_length": 256, **settings})
    )


def equal_pairs(some: Sequence[TokenizedPair], others: Sequence[TokenizedPair]) -> bool:
    return len(some) == len(others) and all(
        as_lists(a) == as_lists(b) and _masks(a) == _masks(b) for a, b in zip(some, others, strict=True)
    )


def as_lists(pair: TokenizedPair) -> tuple[int, list[int], list[int], list[int]]:
    return pair.index, pair.prompt_ids.tolist(), pair.chosen_ids.tolist(), pair.rejected_ids.tolist()


def _masks(pair: TokenizedPair) -> list[Any]:
    return [None if mask is None else mask.tolist() for mask in (pair.chosen_mask, pair.rejected_mask)]
