"""Flash attention 3, for Hopper, instead of torch's own version 2 (torch.nn.attention's activate_flash_attention_impl)."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, ClassVar

from megadpo.config.known import Known
from megadpo.config.problems import Problem
from megadpo.config.variants import ATTENTION_KERNELS, Lazy
from megadpo.model.kernels import RaggedPlan
from megadpo.model.kernels.varlen import VarlenKernel

if TYPE_CHECKING:
    import torch
    from torch.nn import attention

    from megadpo.data.batches.pack import Segment
else:
    attention = Lazy("torch.nn.attention")

PACKAGE = "flash_attn_interface"
"""The module of the package flash_attn_3, which is built from flash-attention's folder `hopper`."""


@ATTENTION_KERNELS.add("flash3")
class Flash3Kernel(VarlenKernel):
    """Makes the same calls as varlen; torch then uses version 3 for all flash attention of this process."""

    name = "flash3"
    priority: ClassVar[int | None] = None
    computes: ClassVar[Mapping[str, str]] = {"window": "flash attention's own"}

    def problems(self, known: Known) -> Iterator[Problem]:
        found = list(super().problems(known))
        yield from found
        machine = known.machine
        if found or machine is None:
            return
        lacks = machine.why_missing(PACKAGE)
        if lacks is None and "FA3" not in attention.list_flash_attention_impls():
            lacks = "this torch doesn't support it; 2.11 and newer do"
        if lacks is None and machine.compute_capability is not None and machine.compute_capability[0] != 9:
            lacks = (
                f"it needs compute capability 9.0, and this GPU has {'.'.join(map(str, machine.compute_capability))}"
            )
        if lacks is not None:
            fix = "set it to auto, or build flash_attn_3 (https://github.com/Dao-AILab/flash-attention, hopper/)"
            yield Problem(ATTENTION_KERNELS.field, self.name, f"a kernel that can be used here: {lacks}", fix)

    def plan(
        self, segments: tuple[Segment, ...], device: torch.device, dtype: torch.dtype, window: int | None = None
    ) -> RaggedPlan:
        _activate()
        return super().plan(segments, device, dtype, window)


@functools.cache
def _activate() -> None:
    attention.activate_flash_attention_impl("FA3")
