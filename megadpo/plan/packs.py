"""Counts of a run's packs: tokens, answer tokens, (query, key) pairs. With numpy, without torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise

import numpy as np
import numpy.typing as npt

from megadpo.config.architecture import Architecture
from megadpo.config.check import micro_batch_multiple
from megadpo.config.problems import ConfigError, Problem
from megadpo.config.schema import Config
from megadpo.data.batches.deal import Deal, deal_batch
from megadpo.data.batches.groups import PairGroups, deal_groups
from megadpo.data.batches.rankings import first_of_rankings
from megadpo.data.batches.work import WorkModel, keys_up_to

Lengths = npt.NDArray[np.int64]
"""int64 [N, 1 + K]: tokens of a prompt and of its answers; 0 where it has fewer than K. A pair that shares nothing has two
answers, chosen and rejected."""

MOST_BATCHES = 8
"""Number of global batches to count. They are random samples of the data, so a few are enough."""


@dataclass(frozen=True, eq=False)
class Pack:
    """Counts of one micro-batch, or of several together."""

    tokens: int
    answer_tokens: int
    segments: npt.NDArray[np.int64]
    """int64 [S, 2]: where each segment begins and ends in its sequence, prompt + answer."""

    @classmethod
    def of(cls, cfg: Config, lengths: Lengths) -> Pack:
        """Counts for pairs of these lengths, without padding."""
        prompts = np.repeat(lengths[:, :1], lengths.shape[1] - 1, axis=1)
        answers = np.stack([prompts, prompts + lengths[:, 1:]], axis=-1)[lengths[:, 1:] > 0]
        if shares_prompt(cfg):
            whole = np.stack([np.zeros(len(lengths), dtype=np.int64), lengths[:, 0]], axis=-1)
            segments = np.concatenate([whole, answers])
        else:
            segments = answers * np.array([0, 1])
        return cls(int(np.diff(segments).sum()), int(lengths[:, 1:].sum()), segments)

    @classmethod
    def of_pairs(cls, cfg: Config, pairs: PairGroups) -> Pack:
        """Counts for these pairs in one micro-batch, without padding."""
        if not groups_prompts(cfg):
            return cls.of(cfg, pairs_alone(pairs))
        pieces = pairs.tree.pieces(np.unique(pairs.answers).tolist())
        found = {piece.node: (piece.start, piece.end) for path in pieces.values() for piece in path}
        segments = np.array(list(found.values()), dtype=np.int64).reshape(-1, 2)
        _, first = np.unique(pairs.prompts, return_index=True)
        tokens = int(np.diff(segments).sum())
        return cls(tokens, tokens - int(pairs.prompt_tokens[first].sum()), segments)

    @classmethod
    def together(cls, packs: Sequence[Pack], *, tokens: int) -> Pack:
        """Several, with `tokens` in all."""
        return cls(tokens, sum(one.answer_tokens for one in packs), np.concatenate([one.segments for one in packs]))

    def query_keys(self, window: int | None = None) -> int:
        """(query, key) pairs that attention computes in a layer with this window."""
        start, end = self.segments.T
        return int((keys_up_to(end, window) - keys_up_to(start, window)).sum())

    def key_tokens(self, window: int | None = None) -> int:
        """Keys of all segments: what several share counts once for itself and, as far as the window reaches back, once for
        each of them."""
        before = self.segments[:, 0]
        return self.tokens + int((before if window is None else np.minimum(before, window - 1)).sum())


@dataclass(frozen=True, kw_only=True)
class Workload:
    """The work of a step, from global batches that are dealt to data-parallel ranks as in training."""

    pairs_per_batch: float
    """A mean if batches consist of rankings."""
    rankings_per_batch: int | None
    micro_batches: int
    """Largest number of micro-batches of a rank in a step."""
    batches: int
    """Number of counted global batches."""
    total: Pack
    """Their total, with padding."""
    origin: str
    """The origin of the lengths, for the report."""

    @property
    def tokens_per_step(self) -> float:
        return self.total.tokens / self.batches


def shares_prompt(cfg: Config) -> bool:
    """Whether prompts are shared. Without packing they are not, as in data/batches/loader.py."""
    return cfg.policy.sequence_packing.enabled and cfg.policy.sequence_packing.share_prompt


def groups_prompts(cfg: Config) -> bool:
    """Pairs with one prompt share it, and the answers that are in several of them (data/batches/loader.py)."""
    return shares_prompt(cfg) and cfg.data.group_prompts


def packed_lengths(lengths: Lengths, *, share_prompt: bool) -> npt.NDArray[np.int64]:
    """int64 [N]: tokens that each prompt and its answers take in a pack."""
    copies = 1 if share_prompt else _num_answers(lengths)
    tokens: npt.NDArray[np.int64] = copies * lengths[:, 0] + lengths[:, 1:].sum(axis=1)
    return tokens


def _num_answers(lengths: Lengths) -> npt.NDArray[np.int64]:
    number: npt.NDArray[np.int64] = (lengths[:, 1:] > 0).sum(axis=1)
    return number


def pairs_alone(pairs: PairGroups) -> Lengths:
    """int64 [N, 3]: prompt, chosen and rejected of each pair."""
    return np.concatenate([pairs.prompt_tokens[:, None], pairs.answer_tokens], axis=1)


def texts(cfg: Config, pairs: PairGroups) -> Lengths:
    """Prompts with all of their answers where pairs are grouped, else each pair."""
    if not groups_prompts(cfg):
        return pairs_alone(pairs)
    _, labels = np.unique(pairs.prompts, return_inverse=True)
    return pairs.text_tokens(labels)


def workload(cfg: Config, arch: Architecture, pairs: PairGroups, origin: str, *, dp: int) -> Workload:
    """The first global batches, in the order of `pairs`, dealt out as in training.

    Raises ConfigError if there is no whole global batch, or if a pair or ranking is longer than a pack.
    """
    size, by_rankings = cfg.policy.train_global_batch_size, cfg.dpo.loss.ranks
    unit = "ranking" if by_rankings else "pair"
    starts = first_of_rankings(pairs.prompts) if by_rankings else np.arange(len(pairs))
    if len(starts) < size:
        fix = f"lower policy.train_global_batch_size, or add {unit}s"
        where = "data.train_data_path"
        raise ConfigError(Problem(where, f"{len(starts)} {unit}s", f"one global batch of {size}", fix))
    longest = _longest_together(cfg, pairs, by_rankings=by_rankings)
    if cfg.policy.sequence_packing.enabled and longest > pack_tokens(cfg):
        where, given = "policy.sequence_packing.train_mb_tokens", cfg.policy.sequence_packing.train_mb_tokens
        fix = f"raise it to {longest} or more, or shorten the {unit}s"
        raise ConfigError(Problem(where, given, f"at least a {unit}'s {longest} tokens", fix))
    multiple, batches = cfg.policy.make_sequence_length_divisible_by, min(len(starts) // size, MOST_BATCHES)
    ends = np.append(starts, len(pairs))[::size][: batches + 1]
    padded = most = 0
    packs: list[Pack] = []
    for start, end in pairwise(ends):
        batch = pairs.at(np.arange(start, end))
        ranks = _dealt(cfg, arch, batch, dp)
        most = max([most, *(len(rank) for rank in ranks)])
        for members in (members for rank in ranks for members in rank):
            packs.append(Pack.of_pairs(cfg, batch.at(np.array(members, dtype=np.int64))))
            padded += max(-(-packs[-1].tokens // multiple), 1) * multiple
    total = Pack.together(packs, tokens=padded)
    return Workload(
        pairs_per_batch=int(ends[-1]) / batches if by_rankings else size,
        rankings_per_batch=size if by_rankings else None,
        micro_batches=most,
        batches=batches,
        total=total,
        origin=origin,
    )


def _longest_together(cfg: Config, pairs: PairGroups, *, by_rankings: bool) -> int:
    """Tokens of the largest pair or ranking in a pack."""
    if not groups_prompts(cfg):
        return int(packed_lengths(pairs_alone(pairs), share_prompt=shares_prompt(cfg)).max())
    labels = np.unique(pairs.prompts, return_inverse=True)[1] if by_rankings else np.arange(len(pairs))
    tokens, _ = pairs.totals(np.arange(len(pairs)), labels, int(labels.max()) + 1, None)
    return int(tokens.max())


def _dealt(cfg: Config, arch: Architecture, batch: PairGroups, dp: int) -> Deal:
    """A global batch as in training (data/batches/loader.py)."""
    packing, model, shared = cfg.policy.sequence_packing, WorkModel.of(arch), shares_prompt(cfg)
    multiple = micro_batch_multiple(cfg)
    if groups_prompts(cfg):
        return deal_groups(
            batch,
            np.arange(len(batch)),
            num_ranks=dp,
            budget_tokens=pack_tokens(cfg),
            work_model=model,
            micro_batch_multiple=multiple,
            whole=cfg.dpo.loss.ranks,
        )
    lengths = pairs_alone(batch)
    return deal_batch(
        packed_lengths(lengths, share_prompt=shared),
        num_ranks=dp,
        budget_tokens=pack_tokens(cfg) if packing.enabled else None,
        pairs_per_micro_batch=None if packing.enabled else cfg.policy.train_micro_batch_size,
        work=model.pair_work(lengths, share_prompt=shared),
        micro_batch_multiple=multiple,
    )


def pack_tokens(cfg: Config) -> int:
    """Tokens of the largest possible micro-batch: the budget, or without packing, the longest pairs that are allowed."""
    multiple, packing = cfg.policy.make_sequence_length_divisible_by, cfg.policy.sequence_packing
    if packing.enabled:
        return packing.train_mb_tokens // multiple * multiple
    return -(-2 * _longest(cfg) * cfg.policy.train_micro_batch_size // multiple) * multiple


def _longest(cfg: Config) -> int:
    """Limit on the tokens of prompt + answer."""
    return min(cfg.policy.max_total_sequence_length, cfg.data.max_input_seq_length)


def stated_pairs(cfg: Config, stated: Sequence[int] | None) -> tuple[PairGroups, str]:
    """One global batch of equal pairs, of `stated` (prompt, answer, answer) tokens or, for None, as long as can be. More than
    two answers make all of their pairs, for as many prompts as a global batch needs."""
    longest = _longest(cfg)
    if stated is None:
        answer = longest // 4
        if cfg.policy.sequence_packing.enabled:  # a run refuses a pair that does not fit into a pack
            prompts = 1 if shares_prompt(cfg) else 2
            longest = min(longest, max((pack_tokens(cfg) - 2 * answer) // prompts + answer, answer + 1))
        stated = (max(longest - answer, 1), max(answer, 1), max(answer, 1))
        origin = (
            f"no data read: every pair as long as the config allows, prompt {stated[0]} and answers {stated[1]} tokens "
            "(--lengths PROMPT,CHOSEN,REJECTED states others)"
        )
    else:
        prompt, *answers = stated
        origin = f"stated: every prompt of {prompt} tokens and its answers of {' and '.join(map(str, answers))}"
        if prompt + max(answers) > longest:
            expected = f"prompt + answer of at most {longest} tokens (policy.max_total_sequence_length)"
            raise ConfigError(Problem("--lengths", ",".join(map(str, stated)), expected, "state shorter ones"))
    unit = math.comb(len(stated) - 1, 2) if cfg.dpo.loss.ranks else 1
    return all_pairs(stated, unit * cfg.policy.train_global_batch_size), origin


def all_pairs(row: Sequence[int], at_least: int) -> PairGroups:
    """All pairs of a prompt's answers of these tokens, again and again for other prompts until there are `at_least`."""
    prompt, answers = row[0], np.array(row[1:], dtype=np.int64)
    of_prompt = np.array(list(combinations(range(len(answers)), 2)), dtype=np.int64)
    prompts = np.repeat(np.arange(-(-at_least // len(of_prompt))), len(of_prompt))
    pairs = np.tile(of_prompt, (len(prompts) // len(of_prompt), 1))
    numbers = pairs + len(answers) * prompts[:, None]
    return PairGroups.made(prompts, numbers, np.full(len(prompts), prompt, dtype=np.int64), answers[pairs])


def full_pack(cfg: Config, pairs: PairGroups) -> Lengths:
    """Prompts and answers of the pairs' mean proportions that fill `pack_tokens` to the last token: what memory is counted
    for."""
    shared, room = shares_prompt(cfg), pack_tokens(cfg)
    mean = _mean_row(texts(cfg, pairs))
    answers = len(mean) - 1
    each = int(packed_lengths(mean[None], share_prompt=shared)[0])
    whole = room // each
    rows = [mean] * whole
    rest = room - whole * each
    prompts = 1 if shared else answers
    if rest >= prompts + answers:
        share = np.maximum((mean * rest) // each, 1)
        row = [1] * answers
        for number in range(answers - 1):
            row[number] = int(min(share[1 + number], rest - prompts - sum(row) + row[number]))
        prompt = int(min(share[0], (rest - sum(row)) // prompts))
        row[-1] = rest - prompts * prompt - sum(row[:-1])
        rows.append(np.array([prompt, *row]))
    elif rest and rows:
        rows[-1] = rows[-1] + np.array([0] * answers + [rest])
    return np.array(rows, dtype=np.int64)


def _mean_row(lengths: Lengths) -> npt.NDArray[np.int64]:
    """int64 [1 + K]: the mean prompt, and the mean of each answer; where prompts have different numbers of answers, their
    mean number of answers of mean length."""
    number = _num_answers(lengths)
    if (number == number[0]).all():
        mean = lengths[:, : 1 + number[0]].mean(axis=0)
    else:
        answers = round(number.mean())
        mean = np.array([lengths[:, 0].mean()] + [lengths[:, 1:].sum() / number.sum()] * answers)
    row: npt.NDArray[np.int64] = np.maximum(mean.round().astype(np.int64), 1)
    return row
