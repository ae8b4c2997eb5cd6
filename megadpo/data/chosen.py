"""Pairs of several data sets together, and the pairs of a data set that are held out. Token ids stay where they are."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megadpo.config.problems import DataError, Problem
from megadpo.data.pairs import DataReport, Ints, OpenedPairs, TokenIds, TokenizedPair


@dataclass(frozen=True, eq=False)
class ChosenPairs(OpenedPairs):
    """N pairs of several data sets, set by set. A set's rows follow those of the sets before it."""

    sets: tuple[OpenedPairs, ...]
    of_set: Ints
    """int64 [N]: the number of each pair's set."""
    places: Ints
    """int64 [N]: and its place there."""
    rows: Ints
    identities: Ints
    values: npt.NDArray[np.float64]
    report: DataReport

    @classmethod
    def of(cls, sets: Sequence[OpenedPairs], kept: Sequence[Ints] | None = None, *, suffix: str = "") -> ChosenPairs:
        """All pairs of the sets, or of each those at the places `kept`. suffix: added to the path in the report."""
        places = [np.arange(len(one)) for one in sets] if kept is None else list(kept)
        firsts = _first_rows(sets)
        rows = [one.rows[at] + first for one, at, first in zip(sets, places, firsts, strict=True)]
        identities = [one.identities.reshape(-1, 4)[at].ravel() for one, at in zip(sets, places, strict=True)]
        values = [one.values.reshape(-1, 3)[at].ravel() for one, at in zip(sets, places, strict=True)]
        tokens = sum(one.text_tokens()[at].sum(axis=0) for one, at in zip(sets, places, strict=True))
        digest = hashlib.sha256(b"megadpo sets 1\n")
        for one, at in zip(sets, places, strict=True):
            digest.update(f"{one.fingerprint} {len(at)}\n".encode())
            if len(at) < len(one):
                digest.update(at.astype("<i8").tobytes())
        report = _added([one.report for one in sets])
        prompt, chosen, rejected = (int(total) for total in np.asarray(tokens))
        report = dataclasses.replace(
            report,
            path=report.path + suffix,
            pairs=sum(map(len, places)),
            prompt_tokens=prompt,
            chosen_tokens=chosen,
            rejected_tokens=rejected,
            fingerprint=digest.hexdigest(),
        )
        of_set = np.repeat(np.arange(len(sets)), [len(at) for at in places])
        return cls(
            tuple(sets),
            of_set,
            np.concatenate(places),
            np.concatenate(rows),
            np.concatenate(identities),
            np.concatenate(values),
            report,
        )

    @property
    def reports(self) -> Sequence[DataReport]:
        return [one.report for one in self.sets] if len(self) == sum(map(len, self.sets)) else [self.report]

    def release(self) -> None:
        for one in self.sets:
            one.release()

    def pair(self, number: int) -> TokenizedPair:
        found: TokenizedPair = self.sets[self.of_set[number]].pair(int(self.places[number]))
        row: int = self.rows[number].item()
        return dataclasses.replace(found, index=row)

    def text_tokens(self) -> Ints:
        parts = [one.text_tokens()[self.places[self.of_set == number]] for number, one in enumerate(self.sets)]
        return np.concatenate(parts)

    def text(self, number: int) -> TokenIds:
        pair, which = divmod(number, 3)
        found: TokenIds = self.sets[self.of_set[pair]].text(3 * int(self.places[pair]) + which)
        return found

    def first_tokens(self, texts: Ints, count: int) -> TokenIds:
        pairs, which = np.divmod(texts, 3)
        found = np.empty((len(texts), count), dtype=np.int32)
        for number, one in enumerate(self.sets):
            of_set = self.of_set[pairs] == number
            found[of_set] = one.first_tokens(3 * self.places[pairs[of_set]] + which[of_set], count)
        return found

    def source_of(self, row: int) -> str:
        firsts = _first_rows(self.sets)
        number = int(np.searchsorted(firsts, row, side="right")) - 1
        return self.sets[number].source_of(row - int(firsts[number]))


def hold_out(pairs: OpenedPairs, share: float) -> tuple[ChosenPairs, ChosenPairs]:
    """(the rest, the pairs that are held out): those of `share` (0..1) of the prompts, at least one. Which, is decided by a
    hash of each whole prompt's tokens: the same prompts for every seed, order of the rows and number of processes.

    Raises DataError where no prompt would be left.
    """
    prompts = pairs.identities[3::4].view(np.uint64)
    distinct = np.unique(prompts)
    number = max(1, round(share * len(distinct)))
    if number >= len(distinct):
        got, fix = f"{len(distinct)} prompts", "add pairs of other prompts, or name a set in data.val_data_paths"
        raise DataError(Problem(pairs.report.path, got, "some to hold out and some to train on", fix))
    held = prompts <= distinct[number - 1]
    sets = pairs.sets if isinstance(pairs, ChosenPairs) else (pairs,)
    of_set = pairs.of_set if isinstance(pairs, ChosenPairs) else np.zeros(len(pairs), dtype=np.int64)
    places = pairs.places if isinstance(pairs, ChosenPairs) else np.arange(len(pairs))

    def those(wanted: npt.NDArray[np.bool_], suffix: str) -> ChosenPairs:
        kept = [places[wanted & (of_set == one)] for one in range(len(sets))]
        return ChosenPairs.of(sets, kept, suffix=suffix)

    return those(~held, f" without {number:,} prompts"), those(held, f", {number:,} of {len(distinct):,} prompts")


def _first_rows(sets: Sequence[OpenedPairs]) -> Ints:
    """int64 [sets]: what the first row of each set is called."""
    return np.cumsum([0, *(one.report.rows for one in sets)])[:-1]


def _added(reports: Sequence[DataReport]) -> DataReport:
    """One report of all; its tokens, pairs and fingerprint are to be replaced."""
    counts = {
        field.name: sum(getattr(one, field.name) for one in reports)
        for field in dataclasses.fields(DataReport)
        if field.type == "int" and field.name != "max_token_id"
    }
    return dataclasses.replace(
        reports[0],
        **counts,
        path=" + ".join(one.path for one in reports),
        max_token_id=max(one.max_token_id for one in reports),
        first_bad_row=next((one.first_bad_row for one in reports if one.first_bad_row), ""),
    )
