"""Attention over segments, by interchangeable kernels held to one float64 reference in the tests.

A kernel is one file here, or in a file that the config names in `plugins`: `@ATTENTION_KERNELS.add(name)` on an
AttentionKernel. It makes a plan from a pack's segments once a micro-batch, and every layer calls it with q, k, v. Its
file is read whenever a config is checked, so it imports torch when it first runs.

Shapes: T query tokens, K key tokens, H query heads, G key heads (G divides H), D channels of a head.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from megadpo.config.known import INSTALL, Known
from megadpo.config.problems import Problem
from megadpo.config.variants import ATTENTION_KERNELS, Lazy

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from megadpo import parallel
    from megadpo.data.batches.pack import Segment
else:  # a config is checked without torch
    torch, parallel = Lazy("torch"), Lazy("megadpo.parallel")


class AttentionKernel:
    """Base of the kernels: causal attention of segments of queries over lists of keys, aligned at the bottom right."""

    name: str
    priority: ClassVar[int | None] = None
    """With attention_kernel auto the kernel with the highest that can run here does. None: by its name only."""
    only_on: ClassVar[Literal["cpu", "cuda"] | None] = None
    """None: it runs on any device."""
    only_bfloat16: ClassVar[bool] = False
    package: ClassVar[str | None] = None
    """A Python package that it needs besides torch."""

    def problems(self, known: Known) -> Iterator[Problem]:
        """Why it can't run."""
        field, device, policy = ATTENTION_KERNELS.field, known.device, known.cfg.policy
        if self.only_on is not None and device not in ("auto", self.only_on):
            others = [kernel.name for kernel in ATTENTION_KERNELS if kernel.only_on in (None, device)]
            expected = f"auto, {' or '.join(others)} on the device {device}: this kernel needs {self.only_on}"
            yield Problem(field, self.name, expected, "set it to auto")
        elif self.only_bfloat16 and policy.precision != "bfloat16":
            fix = "set it to auto, or policy.precision: bfloat16"
            yield Problem(field, self.name, f"a kernel for policy.precision {policy.precision}, such as sdpa", fix)
        elif self.package and known.machine and (reason := known.machine.why_missing(self.package)):
            fix = f"set it to auto, or {INSTALL}"
            yield Problem(field, self.name, f"a kernel that can be used here: {reason}", fix)

    def plan(self, segments: tuple[Segment, ...], device: torch.device, dtype: torch.dtype) -> Any:
        """What depends on the segments alone: made once a micro-batch, for all layers."""
        raise NotImplementedError

    def prepare(self, k: Tensor, v: Tensor, plan: Any) -> tuple[Tensor, Tensor]:
        """k and v [K, G, D] as `attend` takes them; cheap to do again. No collectives.

        K is T, or under context parallelism the tokens of all ranks: k and v are then views of one tensor, and may hold
        keys that no segment of this rank sees."""
        return k, v

    def attend(self, q: Tensor, k: Tensor, v: Tensor, plan: Any) -> Tensor:
        """q [T, H, D], k and v from `prepare` -> [T, H, D]; scores scaled by D^-0.5. No collectives."""
        raise NotImplementedError


@dataclass(frozen=True)
class RaggedPlan:
    """Segments as cumulative lengths; `key_index` is None where the keys are the flat run itself, or under context
    parallelism its first tokens."""

    cu_seqlens_q: Tensor  # [segments + 1] int32
    cu_seqlens_k: Tensor  # [segments + 1] int32
    max_seqlen_q: int
    max_seqlen_k: int
    key_tokens: int  # sum of key lengths
    key_index: Tensor | None  # [key_tokens] int64


class RaggedKernel(AttentionKernel):
    """Base of the fused kernels: one call for all segments, with the keys gathered by index."""

    only_on, only_bfloat16 = "cuda", True

    def plan(self, segments: tuple[Segment, ...], device: torch.device, dtype: torch.dtype) -> RaggedPlan:
        """Built on the CPU and sent over in one copy a tensor, through pinned memory: nothing waits for the device."""
        query_lengths = [s.query_tokens for s in segments]
        key_lengths = [s.key_tokens for s in segments]
        ranges = [keys for s in segments for keys in s.keys]
        ends = [0, *(end for _, end in ranges)]
        plain = ends[-1] == segments[-1].query_end and all(a == end for (a, _), end in zip(ranges, ends, strict=False))

        def cumulative(lengths: list[int]) -> Tensor:
            return parallel.send(torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32), device)

        return RaggedPlan(
            cu_seqlens_q=cumulative(query_lengths),
            cu_seqlens_k=cumulative(key_lengths),
            max_seqlen_q=max(query_lengths),
            max_seqlen_k=max(key_lengths),
            key_tokens=sum(key_lengths),
            key_index=None if plain else parallel.send(torch.cat([torch.arange(a, b) for a, b in ranges]), device),
        )

    def prepare(self, k: Tensor, v: Tensor, plan: RaggedPlan) -> tuple[Tensor, Tensor]:
        """-> [key_tokens, G, D] each; shared prompts appear once a segment that sees them."""
        if plan.key_index is None:
            return k[: plan.key_tokens], v[: plan.key_tokens]
        return k.index_select(0, plan.key_index), v.index_select(0, plan.key_index)
