"""Pairs for the tests of this folder: made up, read back, and compared."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
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
