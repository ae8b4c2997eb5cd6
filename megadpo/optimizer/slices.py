"""Transformer Engine's FusedAdam a slice of a group at a time, so that what it copies for a moment stays small.

Before 2.13 it copies every bfloat16 moment of a group into float32 and keeps the copies until the whole group is done
(2.11: fused_adam.py:321-323, 558-569 and 738-746; mended by https://github.com/NVIDIA/TransformerEngine/pull/2632): with
both moments 8 bytes a parameter, 64 GB at 8B parameters.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

SLICE_BYTES = 500_000_000
"""Most copies of a slice, unless one parameter alone has more."""


def in_slices(fused: type[torch.optim.Optimizer], copied_bytes: int) -> type[torch.optim.Optimizer]:
    """FusedAdam (`fused`), made to update a slice of a group at a time; itself where it copies nothing.

    copied_bytes: what it copies for each parameter, by the dtypes of the moments.
    """
    from megatron.core.utils import is_te_min_version  # brings torch; a plan is checked without it

    if copied_bytes == 0 or is_te_min_version("2.13"):
        return fused
    return type(fused.__name__, (_InSlices, fused), {"__module__": fused.__module__, "copied_bytes": copied_bytes})


def most_copied(copied_bytes: int, elements: int, largest: int) -> int:
    """Most bytes of copies at a time, while `elements` are updated, `largest` of them in one parameter: the slice's, and
    one moment in bfloat16 again on its way back (fused_adam.py:264)."""
    if copied_bytes == 0:
        return 0
    return min(copied_bytes * elements, max(SLICE_BYTES, copied_bytes * largest)) + 2 * largest


class _InSlices:
    """Goes before FusedAdam among a class's bases."""

    copied_bytes: int
    param_groups: list[dict[str, Any]]

    def step(self) -> None:
        """As FusedAdam's, the same bits. Every slice of a group takes the step after the one that the group has done."""
        groups = self.param_groups
        try:
            for group in groups:
                begun = dict(group)
                for parameters in _slices(group["params"], self.copied_bytes):
                    self.param_groups = [{**begun, "params": parameters}]
                    super().step()  # type: ignore[misc]
                    group["step"] = self.param_groups[0]["step"]
        finally:
            self.param_groups = groups


def _slices(parameters: Sequence[torch.Tensor], copied_bytes: int) -> Iterator[list[torch.Tensor]]:
    """`parameters` in order, cut where the copies would be more than SLICE_BYTES."""
    taken: list[torch.Tensor] = []
    copied = 0
    for parameter in parameters:
        own = copied_bytes * parameter.numel()
        if taken and copied + own > SLICE_BYTES:
            yield taken
            taken, copied = [], 0
        taken.append(parameter)
        copied += own
    if taken:
        yield taken
