"""Bytes of optimizer state for each weight. Without torch."""

from __future__ import annotations

from megadpo.config.schema_megatron import MegatronConfig


def optimizer_bytes_per_element(megatron: MegatronConfig, bf16: bool) -> int:
    """Bytes of the float32 main parameter (only for bfloat16 weights), and of Adam's two moments or SGD's momentum. The
    precision-aware optimizer stores only the 2 bytes of a main parameter that the bfloat16 weight lacks
    (`store_param_remainders`)."""
    kind = megatron.optimizer.kind
    aware = getattr(kind, "use_precision_aware_optimizer", False)
    return int(kind.state_bytes) + ((2 if aware else 4) if bf16 else 0)
