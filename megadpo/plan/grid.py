"""The sizes of a layout, and which rank stands where in it. Ranks are ordered tensor - context - data - pipeline, and
for experts, within a stage, expert tensor - expert - expert data (parallel/groups.py)."""

from __future__ import annotations

from dataclasses import dataclass

from megadpo.config.check import data_parallel_size
from megadpo.config.schema import Config


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Ranks in each dimension."""

    tensor: int = 1
    context: int = 1
    data: int = 1
    """Copies of the model."""
    pipeline: int = 1
    virtual_pipeline: int = 1
    """Model chunks of a stage."""
    expert: int = 1
    expert_tensor: int = 1

    @classmethod
    def of(cls, cfg: Config, world_size: int) -> Grid:
        """The config's; its layout was checked against the world."""
        megatron = cfg.policy.megatron_cfg
        return cls(
            tensor=megatron.tensor_model_parallel_size,
            context=megatron.context_parallel_size,
            data=data_parallel_size(cfg, world_size),
            pipeline=megatron.pipeline_model_parallel_size,
            virtual_pipeline=megatron.virtual_pipeline_model_parallel_size,
            expert=megatron.expert_model_parallel_size,
            expert_tensor=megatron.expert_tensor_parallel_size,
        )

    def __str__(self) -> str:
        """The sizes that are not 1; tensor, pipeline and data always."""
        sizes = {"tensor": self.tensor, "context": self.context, "pipeline": self.pipeline, "data": self.data}
        text = " x ".join(f"{name} {size}" for name, size in sizes.items() if size > 1 or name != "context")
        also = {
            "model chunks a stage": self.virtual_pipeline,
            "expert": self.expert,
            "expert tensor": self.expert_tensor,
        }
        return ", ".join([text, *(f"{name} {size}" for name, size in also.items() if size > 1)])

    @property
    def stage_ranks(self) -> int:
        return self.tensor * self.context * self.data

    @property
    def replicas(self) -> int:
        """Ranks that hold the same slice of what is no expert's: gradients are summed over them, and the optimizer is
        sharded over them."""
        return self.context * self.data

    @property
    def expert_replicas(self) -> int:
        """Ranks that hold the same part of the same expert."""
        return self.stage_ranks // (self.expert * self.expert_tensor)

    def replica_of(self, rank: int) -> tuple[int, int]:
        """(number among `replicas`, number among `expert_replicas`) of rank `rank` of a stage."""
        return rank // self.tensor, rank // (self.expert * self.expert_tensor)

    def first_rank(self, stage: int, copy: int) -> int:
        """The first of the tensor x context neighbours that hold copy `copy` of stage `stage`."""
        return stage * self.stage_ranks + copy * self.tensor * self.context

    def is_first_chunk(self, stage: int, chunk: int) -> bool:
        """Whether the model begins there."""
        return stage == 0 and chunk == 0

    def is_last_chunk(self, stage: int, chunk: int) -> bool:
        """Whether the model ends there."""
        return stage == self.pipeline - 1 and chunk == self.virtual_pipeline - 1
