"""The frozen reference: a sharded copy beside the policy, in the same layout, that only ever runs forward."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megadpo.data.batches.pack import PackedBatch
from megadpo.model.gpt import PairModel
from megadpo.parallel import ParallelContext, run_pipeline


class ResidentReference:
    """No gradients, no optimizer state, no gradient buffer: exactly its weights."""

    def __init__(self, model: Sequence[PairModel], parallel: ParallelContext) -> None:
        self.model = model  # the chunks of this rank
        self.parallel = parallel

    def logps(self, micro_batches: Sequence[PackedBatch]) -> list[torch.Tensor]:
        """One [2P] float32 tensor of answer logps a micro-batch, on the last pipeline stage; an empty list elsewhere.

        Collectives: the pipeline's sends and receives, and the model's own.
        """
        return answer_logps(self.model, micro_batches, self.parallel)


@torch.no_grad()
def answer_logps(
    model: Sequence[PairModel], micro_batches: Sequence[PackedBatch], parallel: ParallelContext
) -> list[torch.Tensor]:
    """The chunks of `model` forward over the micro-batches through the pipeline schedule, in evaluation mode."""
    was_training = model[0].training
    for chunk in model:
        chunk.eval()

    def forward_step(iterator, chunk):  # type: ignore[no-untyped-def]
        return chunk(next(iterator).to(parallel.device)), lambda logps, non_loss_data: logps

    outputs = run_pipeline(model, micro_batches, forward_step, forward_only=True)
    for chunk in model:
        chunk.train(was_training)
    return outputs
