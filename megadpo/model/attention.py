"""Attention of a packed batch inside megatron-core's SelfAttention: rotation by position, then a kernel over segments."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_layer import TransformerLayer

from megadpo.config.architecture import Attention, Rotary
from megadpo.data.batches.pack import PackedBatch
from megadpo.model.context import attend_over_context
from megadpo.model.kernels import AttentionKernel
from megadpo.model.rope import Rotation


def once(batch: PackedBatch, key: Hashable, make: Callable[[], Any]) -> Any:
    """make(), kept with the micro-batch `batch`: made once for all chunks of a stage, and for policy and reference.

    key: what it depends on besides the batch."""
    if key not in batch.made:
        batch.made[key] = make()
    return batch.made[key]


@dataclass
class PackContext(PackedSeqParams):
    """What every layer needs of a pack; travels where megatron-core passes its `packed_seq_params`."""

    rotations: Mapping[Rotary, Rotation] = field(default_factory=dict)
    kernel: AttentionKernel | None = None
    plans: Mapping[int | None, Any] = field(default_factory=dict)  # the kernel's, by window
    routing: Any = None  # what layers of experts need of the pack (model/moe.py)
    context_group: dist.ProcessGroup | None = None  # the ranks that hold the other parts of the pack; None: it is whole
    keep_gathered: bool = False  # see model/context.py


class PackedAttention(torch.nn.Module):
    """megatron-core's `core_attention` for packs, of one kind. RoPE is applied here, from per-token positions computed once a
    micro-batch: megatron-core's own packed form recomputes cos and sin, and waits for the host, in every layer."""

    def __init__(self, *, kind: Attention, **_: Any) -> None:
        super().__init__()  # megatron-core passes its config and group; everything else comes with the pack
        self.kind = kind

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackContext | None = None,
    ) -> torch.Tensor:
        """query [T, H, D], key and value [T, G, D], heads local to the tensor-parallel rank -> [T, H * D].

        T counts this rank's tokens. Collectives: under context parallelism those of model/context.py.
        """
        pack = packed_seq_params
        assert isinstance(pack, PackContext) and pack.kernel is not None, "the model was called without a PackContext"
        assert attention_mask is None and attention_bias is None, "segments are the mask"
        plan = pack.plans[self.kind.window]
        if self.kind.rotary is not None:
            rotation = pack.rotations[self.kind.rotary]
            query, key = rotation(query), rotation(key)
        if pack.context_group is None:
            out = pack.kernel.attend(query, *pack.kernel.prepare(key, value, plan), plan)
        else:
            out = attend_over_context(
                pack.kernel,
                query,
                key,
                value,
                plan,
                group=pack.context_group,
                keep_gathered=pack.keep_gathered,
            )
        return out.reshape(query.shape[0], -1)


class PackTransformerLayer(TransformerLayer):
    """megatron-core's layer on packs: hands the pack's routing to experts, for which megatron-core passes nothing but
    `padding_mask` on."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # torch.enable_grad by default: a norm there would keep its input in evaluation and in recomputed passes
        self.bias_dropout_add_exec_handler = contextlib.nullcontext

    def forward(self, *args: Any, packed_seq_params: Any, **kwargs: Any) -> Any:
        kwargs["padding_mask"] = packed_seq_params.routing
        return super().forward(*args, packed_seq_params=packed_seq_params, **kwargs)
