"""The frozen reference: a sharded copy beside the policy, in the same layout, that only ever runs forward."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func

from megadpo.data.pack import PackedBatch
from megadpo.model.gpt import PairModel
from megadpo.parallel import ParallelContext


class ResidentReference:
    """No gradients, no optimizer state, no gradient buffer: exactly its weights."""

    def __init__(self, model: PairModel, parallel: ParallelContext) -> None:
        self.model = model
        self.parallel = parallel

    def logps(self, micro_batches: Sequence[PackedBatch]) -> list[torch.Tensor]:
        """One [2P] float32 tensor of answer logps a micro-batch, on the last pipeline stage; an empty list elsewhere.

        Collectives: the pipeline's sends and receives, and the model's own.
        """
        return answer_logps(self.model, micro_batches, self.parallel)


@torch.no_grad()
def answer_logps(
    model: PairModel, micro_batches: Sequence[PackedBatch], parallel: ParallelContext
) -> list[torch.Tensor]:
    """`model` forward over the micro-batches through the pipeline schedule, in evaluation mode."""
    was_training = model.training
    model.eval()

    def forward_step(iterator, stage):  # type: ignore[no-untyped-def]
        return stage(next(iterator).to(parallel.device)), lambda logps, non_loss_data: logps

    outputs = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(micro_batches),
        model=model,
        num_microbatches=len(micro_batches),
        seq_length=1,  # packs differ in length: the pipeline sends each shape ahead (variable_seq_lengths)
        micro_batch_size=1,
        forward_only=True,
        collect_non_loss_data=True,
    )
    model.train(was_training)
    return outputs
