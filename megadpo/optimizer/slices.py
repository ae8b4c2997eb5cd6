"""Runs Transformer Engine's FusedAdam on slices of a parameter group, to limit the memory of its temporary copies.

Before version 2.13 it copies every bfloat16 moment of a group to float32, and keeps the copies until the whole group is
done (2.11: fused_adam.py:321-323, 558-569 and 738-746; fixed by
https://github.com/NVIDIA/TransformerEngine/pull/2632). For both moments that is 8 bytes per parameter: 64 GB at 8B
parameters.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

SLICE_BYTES = 500_000_000
"""Limit on the copies of a slice. Only a single large parameter may exceed it."""


def in_slices(fused: type[torch.optim.Optimizer], copied_bytes: int) -> type[torch.optim.Optimizer]:
    """The class FusedAdam (`fused`), changed to update one slice of a group at a time. `fused` itself if it makes no copies.

    copied_bytes: bytes that it copies for each parameter; the dtypes of the moments decide.
    """
    from megatron.core.utils import is_te_min_version  # imports torch, which the config check does not need

    if copied_bytes == 0 or is_te_min_version("2.13"):
        return fused
    return type(fused.__name__, (_InSlices, fused), {"__module__": fused.__module__, "copied_bytes": copied_bytes})


def most_copied(copied_bytes: int, elements: int, largest: int) -> int:
    """Peak bytes of copies while `elements` are updated. `largest`: elements of the largest parameter. It counts a slice's
    copies, and one moment that is converted back to bfloat16 (fused_adam.py:264)."""
    if copied_bytes == 0:
        return 0
    return min(copied_bytes * elements, max(SLICE_BYTES, copied_bytes * largest)) + 2 * largest


class _InSlices:
    """Mixin; it comes before FusedAdam in the list of base classes."""

    copied_bytes: int
    param_groups: list[dict[str, Any]]

    def step(self) -> None:
        """The same as FusedAdam's step, bit for bit. All slices of a group get the same step count."""
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
    """`parameters` in order, in slices whose copies have at most SLICE_BYTES."""
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
