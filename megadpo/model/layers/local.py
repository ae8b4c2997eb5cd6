"""megatron-core's own modules, for CPUs and GPUs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from megadpo.config.known import INSTALL, Known
from megadpo.config.problems import Problem
from megadpo.config.variants import LAYER_IMPLEMENTATIONS
from megadpo.model.layers import MEGATRON, LayerImplementation, has_apex_kernel
from megadpo.model.layers.transformer_engine import why_not_transformer_engine, without_float8

if TYPE_CHECKING:
    from megadpo.model.decoder import LayerModules


@LAYER_IMPLEMENTATIONS.add("local")
class LocalLayers(LayerImplementation):
    """megatron-core's tensor-parallel linear layers, with megadpo's norm and activation."""

    name, priority = "local", 0

    def problems(self, known: Known) -> Iterator[Problem]:
        megatron, machine = known.cfg.policy.megatron_cfg, known.machine
        if megatron.fp8_cfg.enabled:
            asked = megatron.transformer_impl != "auto"
            yield without_float8(f"{LAYER_IMPLEMENTATIONS.field} local" if asked else self.reason_of_auto(known))
        where = f"{MEGATRON}.gradient_accumulation_fusion"
        if megatron.gradient_accumulation_fusion and known.device == "cpu":
            yield Problem(where, True, "false or null on the device cpu: its kernels are CUDA's", "set it to null")
        elif megatron.gradient_accumulation_fusion and machine is not None and not has_apex_kernel(known):
            expected = "false or null without Transformer Engine's layers or apex's fused_weight_gradient_mlp_cuda"
            yield Problem(where, True, expected, f"set it to null, or {INSTALL}")
        selective = megatron.activation_checkpointing and megatron.recompute_granularity == "selective"
        lacks_te = machine is not None and machine.why_missing("transformer_engine") is not None
        if selective and "layernorm" in megatron.recompute_modules and known.device == "cuda" and lacks_te:
            expected = "no layernorm without Transformer Engine, which megatron-core then asks about float8"
            modules = ", ".join(megatron.recompute_modules)
            yield Problem(f"{MEGATRON}.recompute_modules", modules, expected, f"{INSTALL}, or remove layernorm")
        if megatron.moe_grouped_gemm and known.arch is not None and known.arch.experts is not None:
            fix = f"set it to null or false, or {INSTALL}, with transformer_impl auto"
            expected = "Transformer Engine's layers, on a CUDA device in bfloat16"
            yield Problem(f"{MEGATRON}.moe_grouped_gemm", True, expected, fix)

    def reason_of_auto(self, known: Known) -> str:
        return why_not_transformer_engine(known) or "no other implementation was chosen"

    def modules(self, *, fuse_weight_gradient: bool) -> LayerModules:
        from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

        from megadpo.model.decoder import LayerModules
        from megadpo.model.norm import RMSNorm

        return LayerModules(norm=RMSNorm, column=ColumnParallelLinear, row=RowParallelLinear)
