"""One optimizer step over a global batch: reference logps, forward and backward through the pipeline, update.

Why the loss is exact in every layout: each micro-batch contributes sum over its pairs / pairs of the GLOBAL batch.
megatron-core is told (calculate_per_token_loss) to divide by nothing, so gradients are plain sums over micro-batches
and data-parallel ranks, which is the mean over the global batch however its pairs were dealt out.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megadpo.config.schema import DpoConfig
from megadpo.data.batches.loader import GlobalBatch
from megadpo.data.batches.pack import PackedBatch
from megadpo.model.gpt import PairModel
from megadpo.model.moe_balance import balance_metrics
from megadpo.objective.dpo import LossOutput, dpo_loss, metric_names
from megadpo.optimizer.step import guarded_step
from megadpo.parallel import ParallelContext, run_pipeline
from megadpo.reference import ResidentReference, answer_logps
from megadpo.train.metrics import MetricSums

CONTEXT_IMBALANCE = "context_imbalance"
"""Metric under context parallelism: attention work of the rank that has most of it, over the mean, summed over packs."""


class NonFiniteLoss(RuntimeError):
    """The loss or the gradient norm of a batch is NaN or infinite; the weights were left as they were."""


@dataclass(frozen=True)
class StepOutcome:
    """What a step gave, the same on every rank."""

    metrics: dict[str, float]
    """Means over the global batch, names as in megadpo.objective, and those of layouts and experts."""
    grad_norm: float
    """Before clipping."""
    lr: float
    """Rate that this step used."""
    updated: bool
    """False where the step was skipped for a loss that is not finite."""


class Trainer:
    """Policy, reference, optimizer and schedule of a run, and the step that ties them together."""

    def __init__(
        self,
        cfg: DpoConfig,
        parallel: ParallelContext,
        *,
        policy: Sequence[DistributedDataParallel],
        reference: ResidentReference | None,
        optimizer: MegatronOptimizer,
        scheduler: OptimizerParamScheduler,
        log_balance_per_layer: bool = False,
    ) -> None:
        self.cfg = cfg
        self.balance = policy[0].module.balance  # of the layers of experts; None: a dense model
        self.log_balance_per_layer = log_balance_per_layer
        self.parallel = parallel
        self.policy = policy
        self.reference = reference
        self.optimizer = optimizer
        self.scheduler = scheduler
        # None: the loss is divided already, so gradients are finalised without a count.
        policy[0].module.config.finalize_model_grads_func = lambda chunks, _num_tokens, **groups: finalize_model_grads(
            chunks, None, **groups
        )

    @property
    def model(self) -> list[PairModel]:
        """The policy's chunks on this rank, without the wrappers that hold gradients."""
        return [chunk.module for chunk in self.policy]

    def model_to_save(self) -> list[PairModel]:
        """`model` with the last update in every weight. Collectives: where `overlap_param_gather` has put it off to the
        next forward pass, the all-gather over dp."""
        for chunk in self.policy:
            if chunk.ddp_config.overlap_param_gather:
                chunk.start_param_sync(force_sync=True)
        return self.model

    def step(self, batch: GlobalBatch) -> StepOutcome:
        """Train on one global batch. Raises NonFiniteLoss where the config says stop; weights are then untouched.

        Collectives: the models' and the pipeline's, gradient reduction over dp, one all-reduce of the metrics over dp
        and one broadcast over pp. Waits for the device after the last micro-batch only: for the metrics, twice, and for the
        gradient norm.
        """
        for chunk in self.policy:
            chunk.zero_grad_buffer()
            chunk.train()
        self.optimizer.zero_grad()
        batch = self._ready(batch)
        if self.balance is not None:
            self.balance.start(num_tokens=batch.num_tokens, num_pairs=batch.num_pairs)
        sums = self._forward_backward(batch)
        metrics = sums.means()
        if self.balance is not None:
            metrics |= balance_metrics([self.balance], per_layer=self.log_balance_per_layer)
        lr = self.optimizer.param_groups[0]["lr"]
        grad_norm, updated = math.nan, False
        if math.isfinite(metrics["loss"]):
            grad_norm, updated = guarded_step(self.optimizer)
        if not updated and self.cfg.on_nonfinite_loss == "stop":
            raise NonFiniteLoss(
                f"loss {metrics['loss']}, gradient norm {grad_norm} on the pairs {batch.pair_indices} (rows of the "
                "training file, from 0); the weights were not changed; look at these rows, lower the learning rate, "
                "or set dpo.on_nonfinite_loss: skip"
            )
        self.scheduler.step(increment=1)
        return StepOutcome(metrics, grad_norm, lr, updated)

    def evaluate(self, batches: Iterable[GlobalBatch]) -> dict[str, float]:
        """Metrics of the policy on whole global batches, as means over their pairs. Collectives as in `step`."""
        sums = MetricSums(self.parallel.device)
        for batch in map(self._ready, batches):
            policy = answer_logps(self.model, batch.micro_batches, self.parallel)
            # logps come out of the last pipeline stage; on the others there is nothing to add
            for logps, micro_batch in zip(policy, batch.micro_batches, strict=False):
                sums.add(pair_loss(logps, micro_batch, self.cfg).metrics)
        return self._reduced(sums).means()

    def _ready(self, batch: GlobalBatch) -> GlobalBatch:
        """The batch with its micro-batches on the device, and on the last pipeline stage the reference's
        log-probabilities in them: those that came with the data, or the resident reference's. Copies are queued and none is
        waited for. Collectives: the resident reference's."""
        micro_batches = [one.to(self.parallel.device) for one in batch.micro_batches]
        if self.reference is not None:
            found = self.reference.logps(micro_batches)  # nothing but on the last stage
            for number, logps in enumerate(found):
                micro_batches[number] = dataclasses.replace(micro_batches[number], reference_logps=logps)
        return dataclasses.replace(batch, micro_batches=micro_batches)

    def _forward_backward(self, batch: GlobalBatch) -> MetricSums:
        """Gradients of the batch into the gradient buffer, finalised; its metrics, reduced."""
        sums = MetricSums(self.parallel.device)

        def forward_step(iterator: Any, chunk: torch.nn.Module) -> tuple[torch.Tensor, Callable[..., Any]]:
            micro_batch = next(iterator)

            def loss_function(logps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
                output = pair_loss(logps, micro_batch, self.cfg)
                sums.add(output.metrics)
                if micro_batch.part is not None:
                    sums.add({CONTEXT_IMBALANCE: (micro_batch.part.most_work, micro_batch.part.mean_work)})
                return output.loss_sum / batch.num_pairs, torch.zeros((), dtype=torch.int, device=logps.device), None

            return chunk(micro_batch), loss_function

        run_pipeline(self.policy, batch.micro_batches, forward_step, forward_only=False)
        return self._reduced(sums, also=[CONTEXT_IMBALANCE] if self.parallel.grid.context > 1 else [])

    def _reduced(self, sums: MetricSums, also: Sequence[str] = ()) -> MetricSums:
        """Totals over data-parallel ranks, from the last pipeline stage to all. also: names beside the objective's."""
        names = [*metric_names(self.cfg, has_reference=self.cfg.reference.mode != "none"), *also]
        sums.reduce(self.parallel.total_from_last_stage, names)
        return sums


def pair_loss(logps: torch.Tensor, micro_batch: PackedBatch, cfg: DpoConfig) -> LossOutput:
    """The objective on one micro-batch's answer logps [2P]: even rows chosen, odd rows rejected. The reference's, where
    there is one, are the micro-batch's."""
    tokens, reference = micro_batch.answer_tokens.to(logps.device), micro_batch.reference_logps
    return dpo_loss(
        logps[0::2],
        logps[1::2],
        None if reference is None else reference[0::2],
        None if reference is None else reference[1::2],
        tokens[0::2],
        tokens[1::2],
        cfg,
    )
