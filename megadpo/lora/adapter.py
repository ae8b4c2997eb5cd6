"""The adapters of one linear layer on one rank: they add y = scale * B A x to W x, in every layout.

Shapes: x [..., in], A [r, in], B [rows of one Hugging Face module, r]; T tokens. Tensor parallelism divides:

| layer           | A          | B       | between the two                                             |
|-----------------|------------|---------|-------------------------------------------------------------|
| column-parallel | whole      | by rows | A x is the same on every rank; its gradient is summed       |
| row-parallel    | by columns | whole   | A x is a sum over the ranks                                 |

With sequence parallelism the whole one of the two has only this rank's tokens: A x [T/tp, r] is gathered, or scattered after
the sum, and the gradient of the whole one is summed over the ranks when gradients are finalised (`sequence_parallel`).
Experts: the dispatcher gathers tokens and sums outputs over the ranks that divide an expert, so nothing is done between A
and B, and the gradient of the whole one is summed where it is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from torch.nn import functional as F

from megadpo.config.schema_peft import PeftConfig
from megadpo.lora.targets import Target


@dataclass(frozen=True)
class LinearCut:
    """The ranks that divide a layer, and this rank's place among them."""

    group: dist.ProcessGroup
    rank: int
    size: int
    sequence_parallel: bool
    """Whether each rank has a part of the tokens outside the layer. Always False for experts."""


class LinearAdapter(torch.nn.Module):
    """Called with the layer's input; returns what is added to its output.

    Parameters: `A_<module>` for each adapter, named after the first module that shares it, and `B_<module>`. They are direct
    parameters of this module, because DDP waits for a late all-gather of weights in this module's call.
    """

    def __init__(
        self, target: Target, peft: PeftConfig, cut: LinearCut, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.target, self.peft, self.cut = target, peft, cut
        row_parallel, expert = target.is_row_parallel, target.entry.expert is not None
        self.pieces = _pieces(target, cut)
        """(module, rows) in the order of this rank's part of the layer's output."""
        columns = target.in_features // cut.size if row_parallel else target.in_features
        for adapter in target.adapters:
            self._add(
                self.a_name(adapter), (peft.dim, columns), cut_dim=1 if row_parallel else None, like=(dtype, device)
            )
            for module in adapter:
                rows = sum(rows for number, rows in self.pieces if number == module)
                self._add(
                    self.b_name(module), (rows, peft.dim), cut_dim=None if row_parallel else 0, like=(dtype, device)
                )
        self.enabled = True
        self.sums_where_used = expert and cut.size > 1

    def a_name(self, adapter: Sequence[int]) -> str:
        return f"A_{self.target.label(adapter[0])}"

    def b_name(self, module: int) -> str:
        return f"B_{self.target.label(module)}"

    def _add(
        self, name: str, shape: tuple[int, int], *, cut_dim: int | None, like: tuple[torch.dtype, torch.device]
    ) -> None:
        """Add a parameter with the marks that megatron-core's reductions, gradient norm and optimizer read."""
        parameter = torch.nn.Parameter(torch.empty(shape, dtype=like[0], device=like[1]))
        expert, copied = self.target.entry.expert is not None, cut_dim is None
        parameter.cut_dim = cut_dim  # type: ignore[attr-defined]
        parameter.tensor_model_parallel = expert or not copied  # type: ignore[attr-defined]
        if expert:
            parameter.allreduce = False  # type: ignore[attr-defined]
            # the ranks that divide the expert have copies; only one counts in the gradient norm
            parameter.shared = copied and self.cut.rank > 0  # type: ignore[attr-defined]
        elif copied:
            parameter.sequence_parallel = self.cut.sequence_parallel  # type: ignore[attr-defined]
        self.register_parameter(name, parameter)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: the layer's input (after a norm) on this rank -> [..., this rank's rows], in x's dtype. Collectives: those of the
        table above, on [T, sum of the adapters' ranks r]."""
        adapters, dtype = self.target.adapters, x.dtype
        if self.peft.dropout_position == "pre":
            x = self._dropped(x, parted=self.target.is_row_parallel or self.cut.sequence_parallel)
        a = [self._whole_half(getattr(self, self.a_name(adapter)), of_a=True) for adapter in adapters]
        low = self._low_rank(F.linear(x.to(a[0].dtype), torch.cat(a) if len(a) > 1 else a[0]))
        outputs = {}
        for adapter, part in zip(adapters, (low * self.peft.scale).split(self.peft.dim, dim=-1), strict=True):
            for module in adapter:
                b = self._whole_half(getattr(self, self.b_name(module)), of_a=False)
                outputs[module] = F.linear(part, b)
        y = self._in_order(outputs).to(dtype)
        if self.peft.dropout_position == "post":
            y = self._dropped(y, parted=not self.target.is_row_parallel or self.cut.sequence_parallel)
        return y

    def _low_rank(self, low: torch.Tensor) -> torch.Tensor:
        group = self.cut.group
        if self.cut.size == 1 or self.sums_where_used:
            return low
        if self.target.is_row_parallel:
            if self.cut.sequence_parallel:
                return reduce_scatter_to_sequence_parallel_region(low, group=group)
            return reduce_from_tensor_model_parallel_region(low, group=group)
        if self.cut.sequence_parallel:
            return gather_from_sequence_parallel_region(low, group=group)
        return copy_to_tensor_model_parallel_region(low, group=group)

    def _whole_half(self, parameter: torch.Tensor, *, of_a: bool) -> torch.Tensor:
        """A or B; for a divided expert, if every rank has a copy, with its gradient summed over the ranks."""
        if self.sums_where_used and of_a != self.target.is_row_parallel:
            return copy_to_tensor_model_parallel_region(parameter, group=self.cut.group)
        return parameter

    def _in_order(self, outputs: dict[int, torch.Tensor]) -> torch.Tensor:
        """The modules' rows in the order of the layer's output, with zeros for modules without an adapter."""
        if len(self.pieces) == 1:
            return outputs[0]
        rows: dict[int, list[int]] = {}
        for module, count in self.pieces:
            rows.setdefault(module, []).append(count)
        # split, not slices: its backward is one concatenation
        parts = {module: iter(output.split(rows[module], dim=-1)) for module, output in outputs.items()}
        some = next(iter(outputs.values()))
        return torch.cat(
            [next(parts[m]) if m in parts else some.new_zeros(1).expand(*some.shape[:-1], n) for m, n in self.pieces],
            dim=-1,
        )

    def _dropped(self, x: torch.Tensor, *, parted: bool) -> torch.Tensor:
        """Dropout. parted: tensor-parallel ranks have different values, and draw different masks; else all draw the same.
        Experts have other tokens on every rank, so they use a generator of their own."""
        if not self.training or self.peft.dropout == 0:
            return x
        if self.target.entry.expert is not None:
            with get_cuda_rng_tracker().fork("expert-parallel-rng"):
                return F.dropout(x, self.peft.dropout)
        if not parted or self.cut.size == 1:
            return F.dropout(x, self.peft.dropout)
        with get_cuda_rng_tracker().fork():
            return F.dropout(x, self.peft.dropout)


def _pieces(target: Target, cut: LinearCut) -> list[tuple[int, int]]:
    if target.is_row_parallel:
        return [(0, target.out_features(0))]
    rectangles = target.rectangles(cut.rank, cut.size)
    pieces = [(one.source, one.source_index[0].stop - one.source_index[0].start) for one in rectangles]
    for module in range(len(target.modules)):
        if sum(rows for number, rows in pieces if number == module) * cut.size != target.out_features(module):
            raise ValueError(f"{target.modules[module]} is not cut evenly over {cut.size} ranks")
    return pieces
