"""Context parallelism: each rank's tokens are the queries, and keys and values are gathered from all ranks.

Each layer has one all-gather, of keys and values together, and one reduce-scatter of their gradients. Gathered keys and
values are not kept for the backward pass, because on every rank they are as large as without context parallelism. The
backward pass gathers them again.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from megadpo.model.kernels import AttentionKernel

# torch 2.13 has new names and warns about the old ones; the container's torch has only the old ones
_gather_into = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter_into = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


def attend_over_context(
    kernel: AttentionKernel,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: Any,
    *,
    group: dist.ProcessGroup,
    keep_gathered: bool,
    **asked: Any,
) -> torch.Tensor:
    """q [t, H, D], k [t, G, D] and v [t, G, E] of this rank's tokens -> [t, H, E], attending to the keys of all ranks.

    plan: for segments whose keys are in gathered order, rank after rank. keep_gathered: keep gathered keys and values for
    the backward pass; for recomputed attention, whose backward pass follows at once. asked: `attend`'s scale, softcap and
    sinks. Collectives over `group`: an all-gather of [t, G, D + E] in forward; in backward a reduce-scatter and, unless
    they were kept, the same all-gather.
    """
    joined = torch.cat((k, v), dim=-1)
    widths = k.shape[-1], v.shape[-1]
    if keep_gathered or not joined.requires_grad:
        gathered = _Gather.apply(joined, group, None)
        keys, values = gathered.split(widths, -1)
        return kernel.attend(q, *kernel.prepare(keys, values, plan), plan, **asked)
    again = _PreparedAgain(joined.detach(), widths, group, kernel, plan)
    gathered = _Gather.apply(joined, group, again)
    keys, values = gathered.split(widths, -1)
    prepared = kernel.prepare(keys, values, plan)
    again.stands_for(prepared)
    with torch.autograd.graph.saved_tensors_hooks(again.pack, again.unpack):
        out = kernel.attend(q, *prepared, plan, **asked)
    fetching: torch.Tensor = _FetchBeforeBackward.apply(out, again)
    return fetching


def sum_over_context(partial: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """The sum of `partial` over the ranks, on every rank. The gradient of `partial` is that of the sum, unchanged, because
    every rank computes the same loss from the sum. Collectives: an all-reduce over `group` in forward, none in backward."""
    total: torch.Tensor = _Sum.apply(partial, group)
    return total


def _all_gather(local: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    whole = local.new_empty((local.shape[0] * dist.get_world_size(group), *local.shape[1:]))
    _gather_into(whole, local, group=group)
    return whole


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, joined, group, again):  # type: ignore[no-untyped-def]
        ctx.group, ctx.again = group, again
        return _all_gather(joined, group)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        if ctx.again is not None:
            ctx.again.drop()
        mine = grad.new_empty((grad.shape[0] // dist.get_world_size(ctx.group), *grad.shape[1:]))
        _reduce_scatter_into(mine, grad.contiguous(), group=ctx.group)
        return mine, None, None


class _PreparedAgain:
    """Replaces a layer's gathered keys and values between forward and backward. It holds only this rank's part, and gathers
    again in backward."""

    def __init__(
        self, local: torch.Tensor, widths: tuple[int, int], group: dist.ProcessGroup, kernel: AttentionKernel, plan: Any
    ) -> None:
        self.local = local
        self.widths = widths
        self.group = group
        self.kernel = kernel
        self.plan = plan
        self.prepared: tuple[torch.Tensor, torch.Tensor] | None = None
        self._storages: dict[int, int] = {}

    def stands_for(self, prepared: tuple[torch.Tensor, torch.Tensor]) -> None:
        self._storages = {x.untyped_storage().data_ptr(): which for which, x in enumerate(prepared)}

    def pack(self, saved: torch.Tensor) -> Any:
        """What autograd saves instead of `saved`: for prepared keys or values, or a view of them, only its place there."""
        which = self._storages.get(saved.untyped_storage().data_ptr())
        return saved if which is None else (which, saved.size(), saved.stride(), saved.storage_offset())

    def unpack(self, kept: Any) -> torch.Tensor:
        if isinstance(kept, torch.Tensor):
            return kept
        assert self.prepared is not None, "the attention's backward runs between fetch and drop"
        which, *place = kept
        return self.prepared[which].as_strided(*place)

    def fetch(self) -> None:
        with torch.no_grad():
            keys, values = _all_gather(self.local, self.group).split(self.widths, -1)
            self.prepared = self.kernel.prepare(keys, values, self.plan)

    def drop(self) -> None:
        self.prepared = None
        del self.local  # the graph may exist for longer


class _FetchBeforeBackward(torch.autograd.Function):
    """The identity. Its backward runs before the kernel's and gathers on every rank, also where the kernel saved nothing
    that needs it. So all ranks take part in the collective."""

    @staticmethod
    def forward(ctx, out, again):  # type: ignore[no-untyped-def]
        ctx.again = again
        return out.view_as(out)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        ctx.again.fetch()
        return grad, None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, partial, group):  # type: ignore[no-untyped-def]
        total = partial.clone()
        if total.numel():  # every rank has the same number of pairs
            dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return grad, None
