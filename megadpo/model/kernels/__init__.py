"""Attention over segments, by interchangeable kernels. Tests compare each with one float64 reference.

A kernel is one file here, or a file that the config names in `plugins`: an AttentionKernel with
`@ATTENTION_KERNELS.add(name)`. It makes a plan from a pack's segments, once for each micro-batch and window; every layer calls it
with q, k, v and the features of the model's attention. Its file is imported whenever a config is checked, so it must not import
torch before its first use.

Shapes: T query tokens, K key tokens, H query heads, G key heads (G divides H), D channels of a head of queries and keys,
E of a head of values.

With s = scale q·k, softcap c and sinks z, a query's output is the sum over the keys j that it sees of p_j v_j, where
p_j = exp(t_j) / (exp(z) + sum over j of exp(t_j)) and t = c tanh(s / c). Without a softcap t = s; without sinks there is
no exp(z). A query at place p of its sequence sees the keys at p - window + 1 .. p, or all up to p.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from megadpo.config.architecture import Architecture, Attention
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
    """`attention_kernel: auto` chooses the kernel with the highest priority that can run. None: auto never chooses it."""
    only_on: ClassVar[Literal["cpu", "cuda"] | None] = None
    """The only device on which it runs; None: any."""
    only_bfloat16: ClassVar[bool] = False
    package: ClassVar[str | None] = None
    """A Python package that it needs besides torch."""
    FEATURES: ClassVar[Mapping[str, str]] = {
        "window": "windows of keys",
        "sinks": "attention sinks",
        "softcap": "a soft-cap on scores",
        "value_width": "values of another width than keys",
    }
    """Features of a model's attention that not every kernel computes: name -> description."""
    computes: ClassVar[Mapping[str, str]] = {}
    """The FEATURES that it computes, exactly and with exact gradients -> how, for docs/families.md. It refuses the others."""
    most_width: ClassVar[int | None] = None
    """The largest head, in channels; None: any."""

    def problems(self, known: Known) -> Iterator[Problem]:
        """Why it can't run here, or not with this model."""
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
        elif known.arch is not None:
            yield from self._lacking(known, known.arch)

    def _lacking(self, known: Known, arch: Architecture) -> Iterator[Problem]:
        """The features of the model's attention that this kernel doesn't compute."""
        longest = known.cfg.policy.max_total_sequence_length
        asked = {name for one in arch.attentions for name in asked_of(one, longest)}
        features = [name for name in self.FEATURES if name in asked]
        width = max(max(one.head_dim, one.value_dim) for one in arch.attentions)
        lacking = [self.FEATURES[name] for name in features if name not in self.computes]
        if self.most_width is not None and width > self.most_width:
            lacking.append(f"heads of {width} channels")
        if lacking:
            able = [one.name for one in ATTENTION_KERNELS if one.can(features, width) and one.may_run(known)]
            expected = f"a kernel with {' and '.join(lacking)}, which {arch.hf_class} has: {' or '.join(able)}"
            yield Problem(ATTENTION_KERNELS.field, self.name, expected, f"set it to auto or {' or '.join(able)}")

    @classmethod
    def can(cls, features: Iterable[str], width: int) -> bool:
        """Whether it computes all of these features, with heads of this width."""
        return set(features) <= set(cls.computes) and (cls.most_width is None or width <= cls.most_width)

    @classmethod
    def may_run(cls, known: Known) -> bool:
        """Whether device and precision allow it."""
        on_device = cls.only_on is None or known.device in ("auto", cls.only_on)
        return on_device and (not cls.only_bfloat16 or known.cfg.policy.precision == "bfloat16")

    def plan(
        self, segments: tuple[Segment, ...], device: torch.device, dtype: torch.dtype, window: int | None = None
    ) -> Any:
        """Everything that depends only on the segments and the window. Made once for each micro-batch, and used by all layers
        with that window.

        window: the most keys that a query sees, including its own; None: all up to its own."""
        raise NotImplementedError

    def prepare(self, k: Tensor, v: Tensor, plan: Any) -> tuple[Tensor, Tensor]:
        """k [K, G, D] and v [K, G, E] in the form that `attend` takes; cheap to repeat. No collectives.

        K is T, or under context parallelism the tokens of all ranks. Then k and v are views of one tensor, and may have keys
        that no segment of this rank sees."""
        return k, v

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        plan: Any,
        *,
        scale: float | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """q [T, H, D], k and v from `prepare` -> [T, H, E]. No collectives.

        scale: factor of the scores; None: D^-0.5. softcap, sinks [H]: None if the model has none; the gradient of sinks is
        summed in float32 (float64 for float64). Features that are not in `computes` are never passed."""
        raise NotImplementedError


@dataclass(frozen=True)
class RaggedPlan:
    """Segments as cumulative lengths. `key_index` is None if the segments' keys are the flat sequence itself, or under context
    parallelism its first tokens."""

    cu_seqlens_q: Tensor  # [segments + 1] int32
    cu_seqlens_k: Tensor  # [segments + 1] int32
    max_seqlen_q: int
    max_seqlen_k: int
    key_tokens: int  # sum of key lengths
    key_index: Tensor | None  # [key_tokens] int64
    window: int | None = None  # None: every segment's queries see all its keys up to their own
    query_tokens: int = 0

    @functools.cached_property
    def copies(self) -> tuple[Tensor, Tensor]:
        """Where each token's key went: places [key_tokens] in the order of tokens, and [query_tokens + 1], where each token's
        places begin. For plans with a key_index into their own queries' run. Without waiting for the device."""
        assert self.key_index is not None
        ordered, places = torch.sort(self.key_index, stable=True)
        return places, torch.searchsorted(ordered, torch.arange(self.query_tokens + 1, device=ordered.device))

    @property
    def window_size(self) -> tuple[int, int]:
        """Keys to the left and right of a query's own, as flash attention counts them; -1: all."""
        return (-1 if self.window is None else self.window - 1), 0


def asked_of(attention: Attention, longest: int) -> set[str]:
    """The FEATURES that `attention` has. A window counts only if it is smaller than the longest sequence."""
    asked = {
        "window": attention.window is not None and attention.window < longest,
        "sinks": attention.sinks,
        "softcap": attention.logit_softcap is not None,
        "value_width": attention.value_dim != attention.head_dim,
    }
    return {name for name, yes in asked.items() if yes}


class RaggedKernel(AttentionKernel):
    """Base of the fused kernels: one call for all segments, with the keys gathered by index."""

    only_on, only_bfloat16 = "cuda", True

    def plan(
        self, segments: tuple[Segment, ...], device: torch.device, dtype: torch.dtype, window: int | None = None
    ) -> RaggedPlan:
        """Built on the CPU and copied from pinned memory, one copy for each tensor, without waiting for the device. Keys before
        the window of a segment's first query are left out; the kernel masks the others."""
        window = reached(segments, window)
        if window is not None:
            segments = tuple(segment.rows(0, segment.query_tokens, window) for segment in segments)
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
            window=window,
            query_tokens=sum(query_lengths),
        )

    def prepare(self, k: Tensor, v: Tensor, plan: RaggedPlan) -> tuple[Tensor, Tensor]:
        """-> [key_tokens, G, D] and [key_tokens, G, E]. A shared prompt is there once for each segment that sees it."""
        if plan.key_index is None:
            return k[: plan.key_tokens], v[: plan.key_tokens]
        return k.index_select(0, plan.key_index), v.index_select(0, plan.key_index)


def reached(segments: tuple[Segment, ...], window: int | None) -> int | None:
    """`window`, or None if it masks no key of `segments`."""
    return window if window is not None and any(segment.key_tokens > window for segment in segments) else None


def with_sinks(out: Tensor, log_sum: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """The output [H, n, E] and log-sum-exp of scores [H, n] of a softmax -> both with sinks [H] in the denominator.

    A kernel's own backward, called with these two, gives the right gradients of q, k and v: it computes the probabilities as
    exp(score - log-sum-exp), and uses the output only for the sum of gradient times output."""
    total = torch.logaddexp(log_sum, sinks.to(log_sum.dtype)[:, None])
    return (out * (log_sum - total).exp()[..., None]).to(out.dtype), total


def sinks_gradient(grad: Tensor, out: Tensor, log_sum: Tensor, sinks: Tensor) -> Tensor:
    """d loss / d sinks [H], in log_sum's dtype. grad [H, n, E] is the gradient of `out`; `out` and log_sum [H, n] are from
    `with_sinks`. A sink has the probability exp(sink - log_sum) and the value 0."""
    along = (grad.to(log_sum.dtype) * out).sum(-1)
    return -((sinks.to(log_sum.dtype)[:, None] - log_sum).exp() * along).sum(-1)


def widened(x: Tensor, width: int) -> Tensor:
    """x [.., D], padded with zero channels to `width`. In queries and keys they add nothing to a score; in values they give
    outputs of 0."""
    return x if x.shape[-1] == width else torch.nn.functional.pad(x, (0, width - x.shape[-1]))
