"""The frozen reference as a second model in memory, in the policy's layout. It only runs forward."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megadpo.data.batches.pack import PackedBatch
from megadpo.lora.adapter import LinearAdapter
from megadpo.lora.attach import switched
from megadpo.model.gpt import PairModel
from megadpo.parallel import ParallelContext, run_pipeline


class ResidentReference:
    """A frozen model. Its memory is that of its weights: no gradients, no gradient buffer, no optimizer state."""

    def __init__(self, model: Sequence[PairModel], parallel: ParallelContext) -> None:
        self.model = model  # this rank's chunks
        self.parallel = parallel

    def logps(self, micro_batches: Sequence[PackedBatch]) -> list[torch.Tensor]:
        """For each micro-batch a [K] float32 tensor of answer logps, on the last pipeline stage. Other stages: []. With the
        batch's `token_weights` the weighted sums.

        Collectives: the pipeline's sends and receives, and the model's own.
        """
        return [weighted_logps(one) for one in self.outputs(micro_batches)]

    def outputs(self, micro_batches: Sequence[PackedBatch]) -> list[torch.Tensor]:
        """The model's output for each micro-batch (PairModel.forward). Stages and collectives as in `logps`."""
        return answer_logps(self.model, micro_batches, self.parallel)


class SwitchedReference(ResidentReference):
    """The policy with its adapters switched off (LoRA), and the reference's own adapters on if it has some. No second
    model."""

    def __init__(
        self,
        model: Sequence[PairModel],
        parallel: ParallelContext,
        off: Sequence[LinearAdapter],
        on: Sequence[LinearAdapter] = (),
    ) -> None:
        """off: the trained adapters. on: the reference's own adapters, which are off between calls."""
        super().__init__(model, parallel)
        self.off, self.on = off, on

    def outputs(self, micro_batches: Sequence[PackedBatch]) -> list[torch.Tensor]:
        last = self.model[-1]
        last.comes_last = False  # the policy's pass comes later and uses the same cached values
        try:
            with switched(self.off, self.on):
                return super().outputs(micro_batches)
        finally:
            last.comes_last = True


@torch.no_grad()
def answer_logps(
    model: Sequence[PairModel], micro_batches: Sequence[PackedBatch], parallel: ParallelContext
) -> list[torch.Tensor]:
    """The output of `model` for each micro-batch (PairModel.forward), in evaluation mode, through the pipeline schedule.
    Stages and collectives as in ResidentReference.logps."""
    was_training = model[0].training
    for chunk in model:
        chunk.eval()

    def forward_step(iterator, chunk):  # type: ignore[no-untyped-def]
        return chunk(next(iterator).to(parallel.device)), lambda logps, non_loss_data: logps

    outputs = run_pipeline(model, micro_batches, forward_step, forward_only=True)
    for chunk in model:
        chunk.train(was_training)
    return outputs


def weighted_logps(found: torch.Tensor) -> torch.Tensor:
    """[K] sums for the preference loss, from a model's output (PairModel.forward)."""
    return found if found.dim() == 1 else found[:, 0]
