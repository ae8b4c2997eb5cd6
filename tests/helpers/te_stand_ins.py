"""Stand-ins for Transformer Engine's modules on a CPU: megatron-core's wrappers' arguments and parameter names, computed
by megatron-core's own layers. What only the real ones can show is in tests/gpu."""

from __future__ import annotations

import pytest
import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch.nn.functional import linear

from megadpo.model.decoder import LayerModules
from megadpo.model.norm import RMSNorm, rms_norm


class _EmptyState:
    """As TransformerEngineBaseModule.get_extra_state without float8: a tensor of no bytes."""

    def get_extra_state(self):
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state):
        assert state is None or state.numel() == 0


class StandInNorm(_EmptyState, RMSNorm):
    def __init__(self, config, hidden_size, eps=1e-5):
        super().__init__(config, hidden_size, eps)


class StandInColumn(_EmptyState, ColumnParallelLinear):
    def __init__(
        self,
        input_size,
        output_size,
        *,
        config,
        init_method,
        gather_output,
        bias,
        skip_bias_add,
        is_expert,
        skip_weight_param_allocation=False,
        tp_comm_buffer_name=None,
        tp_group=None,
        stride=1,
        name=None,
    ):
        assert not gather_output and not skip_weight_param_allocation
        super().__init__(
            input_size,
            output_size,
            config=config,
            init_method=init_method,
            bias=bias,
            gather_output=False,
            skip_bias_add=skip_bias_add,
            is_expert=is_expert,
            tp_group=tp_group,
            stride=stride,
        )


class StandInNormColumn(StandInColumn):
    def __init__(self, input_size, output_size, *, config, **options):
        super().__init__(input_size, output_size, config=config, **options)
        self.layer_norm_weight = torch.nn.Parameter(torch.ones(input_size, dtype=config.params_dtype))
        self.layer_norm_weight.sequence_parallel = config.sequence_parallel
        self.eps, self.centre = config.layernorm_epsilon, float(config.layernorm_zero_centered_gamma)

    def forward(self, x):
        return super().forward(rms_norm(x, self.layer_norm_weight, self.eps, centre=self.centre))


class StandInRow(_EmptyState, RowParallelLinear):
    def __init__(
        self,
        input_size,
        output_size,
        *,
        config,
        init_method,
        bias,
        input_is_parallel,
        skip_bias_add,
        is_expert,
        tp_comm_buffer_name=None,
        tp_group=None,
        name=None,
    ):
        super().__init__(
            input_size,
            output_size,
            config=config,
            init_method=init_method,
            bias=bias,
            input_is_parallel=input_is_parallel,
            skip_bias_add=skip_bias_add,
            is_expert=is_expert,
            tp_group=tp_group,
        )


class StandInGrouped(torch.nn.Module):
    """weight0, weight1, ..., and bias0, bias1, ...: of tensor-parallel size 1."""

    def __init__(
        self,
        num_gemms,
        input_size,
        output_size,
        *,
        config,
        init_method,
        bias,
        skip_bias_add,
        is_expert,
        tp_comm_buffer_name=None,
        pg_collection=None,
        name=None,
    ):
        super().__init__()
        assert is_expert
        self.num_gemms, self.use_bias, self.returns_bias = num_gemms, bias, bias and skip_bias_add
        shapes = {"weight": (output_size, input_size)} | ({"bias": (output_size,)} if bias else {})
        for name, shape in shapes.items():
            for number in range(num_gemms):
                value = torch.nn.Parameter(torch.empty(shape, dtype=config.params_dtype))
                self.register_parameter(f"{name}{number}", value)

    def forward(self, x, m_splits):
        numbered = range(self.num_gemms)
        biases = [getattr(self, f"bias{i}") for i in numbered] if self.use_bias else [None] * self.num_gemms
        added = [None] * self.num_gemms if self.returns_bias else biases
        weights = [getattr(self, f"weight{i}") for i in numbered]
        parts = zip(x.split(m_splits), weights, added, strict=True)
        return torch.cat([linear(*part) for part in parts]), biases if self.returns_bias else None


def use_stand_ins(patch: pytest.MonkeyPatch) -> None:
    """In this process: Transformer Engine's layers are chosen, and are these."""
    from megadpo.model.layers import local, transformer_engine

    modules = LayerModules(
        norm=StandInNorm,
        column=StandInColumn,
        row=StandInRow,
        norm_column=StandInNormColumn,
        grouped_column=StandInGrouped,
        grouped_row=StandInGrouped,
    )
    patch.setattr(transformer_engine, "te_modules", lambda: modules)
    for module in (local, transformer_engine):
        patch.setattr(module, "why_not_transformer_engine", lambda known: None)
    # Neither Transformer Engine's kernels nor apex's are here.
    patch.setattr(transformer_engine, "with_fused_weight_gradient", lambda part: part)
