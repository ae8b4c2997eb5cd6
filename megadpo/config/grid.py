"""The grid of ranks: the sizes of a parallel layout, and one rank's place in it.

Ranks have megatron-core's default order: tensor - context - data - pipeline; tensor changes fastest. For experts the same
ranks of a stage have the order expert tensor - expert - expert data.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from megadpo.config.schema import Config


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Sizes of the parallel dimensions, and one rank. Raises ValueError for a rank outside the world."""

    tensor: int = 1
    context: int = 1
    """Ranks that divide the tokens of each micro-batch."""
    data: int = 1
    """Copies of the model: ranks that divide the micro-batches of a global batch."""
    pipeline: int = 1
    virtual_pipeline: int = 1
    """Model chunks of each pipeline stage."""
    expert: int = 1
    """Ranks that divide the experts of a layer."""
    expert_tensor: int = 1
    """Ranks that divide the matrices of each expert."""
    rank: int = 0
    """World rank. Properties such as tp_rank are for this rank."""

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank {self.rank} of a world of {self.world_size}")

    @classmethod
    def of(cls, cfg: Config, world_size: int | None = None) -> Grid:
        """The config's grid in a world of `world_size` ranks; None: with one copy of the model. Raises as `over` does."""
        megatron = cfg.policy.megatron_cfg
        one_copy = cls(
            tensor=megatron.tensor_model_parallel_size,
            context=megatron.context_parallel_size,
            pipeline=megatron.pipeline_model_parallel_size,
            virtual_pipeline=megatron.virtual_pipeline_model_parallel_size,
            expert=megatron.expert_model_parallel_size,
            expert_tensor=megatron.expert_tensor_parallel_size,
        )
        return one_copy if world_size is None else one_copy.over(world_size)

    def over(self, world_size: int) -> Grid:
        """The same sizes in a world of `world_size` ranks; `data` follows. Raises ValueError if they don't divide it."""
        if world_size < 1 or world_size % self.model_ranks:
            raise ValueError(
                f"world size {world_size} is not a multiple of tensor x context x pipeline = {self.model_ranks}"
            )
        return dataclasses.replace(self, data=world_size // self.model_ranks)

    def __str__(self) -> str:
        """Sizes above 1; also tensor, pipeline and data."""
        sizes = {"tensor": self.tensor, "context": self.context, "pipeline": self.pipeline, "data": self.data}
        text = " x ".join(f"{name} {size}" for name, size in sizes.items() if size > 1 or name != "context")
        also = {
            "model chunks a stage": self.virtual_pipeline,
            "expert": self.expert,
            "expert tensor": self.expert_tensor,
        }
        return ", ".join([text, *(f"{name} {size}" for name, size in also.items() if size > 1)])

    def at(self, rank: int) -> Grid:
        """The same grid for world rank `rank`."""
        return dataclasses.replace(self, rank=rank)

    def stage(self, number: int) -> Grid:
        """The same grid for the first rank of pipeline stage `number`."""
        return self.at(number * self.stage_ranks)

    @property
    def model_ranks(self) -> int:
        """Ranks that hold one copy of the model."""
        return self.tensor * self.context * self.pipeline

    @property
    def stage_ranks(self) -> int:
        return self.tensor * self.context * self.data

    @property
    def world_size(self) -> int:
        return self.stage_ranks * self.pipeline

    @property
    def replicas(self) -> int:
        """Ranks that hold the same slice of a weight outside experts: gradients are summed over them, and the distributed
        optimizer is sharded over them."""
        return self.context * self.data

    @property
    def expert_replicas(self) -> int:
        """Ranks that hold the same part of the same expert."""
        return self.stage_ranks // (self.expert * self.expert_tensor)

    @property
    def tp_rank(self) -> int:
        return self.rank % self.tensor

    @property
    def cp_rank(self) -> int:
        return self.rank // self.tensor % self.context

    @property
    def dp_rank(self) -> int:
        return self.rank // (self.tensor * self.context) % self.data

    @property
    def pp_rank(self) -> int:
        return self.rank // self.stage_ranks

    @property
    def etp_rank(self) -> int:
        return self.rank % self.expert_tensor

    @property
    def ep_rank(self) -> int:
        return self.rank // self.expert_tensor % self.expert

    @property
    def replica(self) -> int:
        """Number of this rank among `replicas`."""
        return self.rank % self.stage_ranks // self.tensor

    @property
    def expert_replica(self) -> int:
        """Number of this rank among `expert_replicas`."""
        return self.rank % self.stage_ranks // (self.expert * self.expert_tensor)

    def is_first_chunk(self, chunk: int) -> bool:
        """Whether this rank's chunk number `chunk` is the model's first."""
        return self.pp_rank == 0 and chunk == 0

    def is_last_chunk(self, chunk: int) -> bool:
        """Whether this rank's chunk number `chunk` is the model's last."""
        return self.pp_rank == self.pipeline - 1 and chunk == self.virtual_pipeline - 1
