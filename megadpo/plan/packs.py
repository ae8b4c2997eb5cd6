"""Counts of a run's packs: tokens, answer tokens, (query, key) pairs. With numpy, without torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megadpo.config.architecture import Architecture
from megadpo.config.check import micro_batch_multiple
from megadpo.config.problems import ConfigError, Problem
from megadpo.config.schema import Config
from megadpo.data.batches.deal import deal_batch
from megadpo.data.batches.work import WorkModel, query_keys

Lengths = npt.NDArray[np.int64]
"""int64 [N, 3]: tokens of prompt, chosen and rejected of each pair."""

MOST_BATCHES = 8
"""Number of global batches to count. They are random samples of the data, so a few are enough."""


@dataclass(frozen=True, eq=False)
class Pack:
    """Counts of one micro-batch, or of several together."""

    tokens: int
    answer_tokens: int
    lengths: Lengths
    shared: bool
    """Prompts are computed once."""

    @classmethod
    def of(cls, cfg: Config, lengths: Lengths) -> Pack:
        """Counts for pairs of these lengths, without padding."""
        shared = shares_prompt(cfg)
        prompt, chosen, rejected = (int(total) for total in lengths.sum(axis=0))
        tokens = (1 if shared else 2) * prompt + chosen + rejected
        return cls(tokens, chosen + rejected, lengths, shared)

    def query_keys(self, window: int | None = None) -> int:
        """(query, key) pairs that attention computes in a layer with this window."""
        return int(query_keys(self.lengths, share_prompt=self.shared, window=window).sum())

    def key_tokens(self, window: int | None = None) -> int:
        """Keys of all segments: a shared prompt's count once for itself and, as far as the window reaches back, once for
        each answer."""
        prompts = self.lengths[:, 0] if window is None else np.minimum(self.lengths[:, 0], window - 1)
        return self.tokens + (2 * int(prompts.sum()) if self.shared else 0)


@dataclass(frozen=True, kw_only=True)
class Workload:
    """The work of a step, from global batches that are dealt to data-parallel ranks as in training."""

    pairs_per_batch: int
    micro_batches: int
    """Largest number of micro-batches of a rank in a step."""
    batches: int
    """Number of counted global batches."""
    total: Pack
    """Their total, with padding."""
    said: str
    """The origin of the lengths, for the report."""

    @property
    def tokens_per_step(self) -> float:
        return self.total.tokens / self.batches


def shares_prompt(cfg: Config) -> bool:
    """Whether prompts are shared. Without packing they are not, as in data/batches/loader.py."""
    return cfg.policy.sequence_packing.enabled and cfg.policy.sequence_packing.share_prompt


def packed_lengths(lengths: Lengths, *, share_prompt: bool) -> npt.NDArray[np.int64]:
    """int64 [N]: tokens of each pair in a pack."""
    return lengths @ np.array([1 if share_prompt else 2, 1, 1], dtype=np.int64)


def workload(cfg: Config, arch: Architecture, lengths: Lengths, said: str, *, dp: int) -> Workload:
    """The work of the first global batches, in the order of `lengths`, dealt as in training. said: as in Workload.

    Raises ConfigError if there is no whole global batch, or if a pair is longer than a pack.
    """
    size, packing = cfg.policy.train_global_batch_size, cfg.policy.sequence_packing
    if len(lengths) < size:
        fix = "lower policy.train_global_batch_size, or add pairs"
        raise ConfigError(Problem("data.train_data_path", f"{len(lengths)} pairs", f"one global batch of {size}", fix))
    shared = shares_prompt(cfg)
    tokens, work = (
        packed_lengths(lengths, share_prompt=shared),
        WorkModel.of(arch).pair_work(lengths, share_prompt=shared),
    )
    budget = pack_tokens(cfg) if packing.enabled else None
    if budget is not None and tokens.max() > budget:
        fix = f"raise it to {tokens.max()} or more, or shorten the pairs"
        where = "policy.sequence_packing.train_mb_tokens"
        raise ConfigError(Problem(where, packing.train_mb_tokens, f"at least a pair's {tokens.max()} tokens", fix))
    multiple, batches = cfg.policy.make_sequence_length_divisible_by, min(len(lengths) // size, MOST_BATCHES)
    padded = most = 0
    for start in range(0, batches * size, size):
        ranks = deal_batch(
            tokens[start : start + size],
            num_ranks=dp,
            budget_tokens=budget,
            pairs_per_micro_batch=None if packing.enabled else cfg.policy.train_micro_batch_size,
            work=work[start : start + size],
            micro_batch_multiple=micro_batch_multiple(cfg),
        )
        most = max([most, *(len(rank) for rank in ranks)])
        for pairs in (pairs for rank in ranks for pairs in rank):
            filled = int(tokens[np.array(pairs, dtype=np.int64) + start].sum())
            padded += max(-(-filled // multiple), 1) * multiple
    total = dataclasses.replace(Pack.of(cfg, lengths[: batches * size]), tokens=padded)
    return Workload(pairs_per_batch=size, micro_batches=most, batches=batches, total=total, said=said)


def pack_tokens(cfg: Config) -> int:
    """Tokens of the largest possible micro-batch: the budget, or without packing, the longest pairs that are allowed."""
    multiple, packing = cfg.policy.make_sequence_length_divisible_by, cfg.policy.sequence_packing
    if packing.enabled:
        return packing.train_mb_tokens // multiple * multiple
    return -(-2 * _longest(cfg) * cfg.policy.train_micro_batch_size // multiple) * multiple


def _longest(cfg: Config) -> int:
    """Limit on the tokens of prompt + answer."""
    return min(cfg.policy.max_total_sequence_length, cfg.data.max_input_seq_length)


def stated_lengths(cfg: Config, stated: Sequence[int] | None) -> tuple[Lengths, str]:
    """One global batch of equal pairs with `stated` (prompt, chosen, rejected) tokens, or for None as long as allowed."""
    longest = _longest(cfg)
    if stated is None:
        answer = longest // 4
        if cfg.policy.sequence_packing.enabled:  # a run refuses a pair that does not fit into a pack
            prompts = 1 if shares_prompt(cfg) else 2
            longest = min(longest, max((pack_tokens(cfg) - 2 * answer) // prompts + answer, answer + 1))
        row = (max(longest - answer, 1), max(answer, 1), max(answer, 1))
        said = (
            f"no data read: every pair is as long as the config allows, prompt {row[0]} and answers {row[1]} tokens "
            "(--lengths PROMPT,CHOSEN,REJECTED changes this)"
        )
    else:
        row = (stated[0], stated[1], stated[2])
        said = "--lengths: every pair has a prompt of {} tokens and answers of {} and {}".format(*row)
        if row[0] + max(row[1:]) > longest:
            expected = f"prompt + answer of at most {longest} tokens (policy.max_total_sequence_length)"
            raise ConfigError(Problem("--lengths", ",".join(map(str, row)), expected, "give shorter lengths"))
    return np.tile(np.array([row], dtype=np.int64), (cfg.policy.train_global_batch_size, 1)), said


def full_pack(cfg: Config, lengths: Lengths) -> Lengths:
    """int64 [n, 3]: pairs with the mean proportions of `lengths` that fill `pack_tokens` completely. The plan counts the
    memory for them."""
    shared, tokens = shares_prompt(cfg), pack_tokens(cfg)
    mean = np.maximum(lengths.mean(axis=0).round().astype(np.int64), 1)[None]
    each = int(packed_lengths(mean, share_prompt=shared)[0])
    whole = tokens // each
    rows = [mean[0]] * whole
    rest = tokens - whole * each
    prompts = 1 if shared else 2
    if rest >= prompts + 2:
        share = np.maximum((mean[0] * rest) // each, 1)
        chosen = int(min(share[1], rest - prompts - 1))
        prompt = int(min(share[0], (rest - chosen - 1) // prompts))
        rows.append(np.array([prompt, chosen, rest - prompts * prompt - chosen]))
    elif rest and rows:
        rows[-1] = rows[-1] + np.array([0, 0, rest])
    return np.array(rows, dtype=np.int64)
