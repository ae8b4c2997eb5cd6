"""One optimizer step over a global batch: reference logps, forward and backward through the pipeline, update.

Why the loss is exact in every layout: each micro-batch contributes (sum over its pairs) / (pairs of the GLOBAL batch).
megatron-core is told (calculate_per_token_loss) not to divide, so gradients are plain sums over micro-batches and
data-parallel ranks. That is the mean over the global batch, for every deal of its pairs.
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
from megadpo.objective.loss import PairFacts
from megadpo.optimizer.step import gradient_norm, update
from megadpo.parallel import ParallelContext, run_pipeline
from megadpo.reference import ResidentReference, answer_logps, weighted_logps
from megadpo.train.metrics import MetricSums

CONTEXT_IMBALANCE = "context_imbalance"
"""Metric with context parallelism: attention work of the busiest rank / mean over the ranks, both summed over packs."""


class NonFiniteLoss(RuntimeError):
    """The loss or the gradient norm of a batch is NaN or infinite. The weights were not changed."""


@dataclass(frozen=True)
class StepOutcome:
    """The result of a step, the same on every rank."""

    metrics: dict[str, float]
    """Means over the global batch: the metrics of megadpo.objective, and those of layouts and experts."""
    grad_norm: float
    """Before clipping."""
    lr: float
    """The learning rate of this step."""
    updated: bool
    """False if the step was skipped because loss or gradient norm were not finite."""


class Trainer:
    """Policy, reference, optimizer and schedule of a run, and its training step."""

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
        self.balance = policy[0].module.balance  # load balance of the experts; None for a dense model
        self.log_balance_per_layer = log_balance_per_layer
        self.parallel = parallel
        self.policy = policy
        self.reference = reference
        self.optimizer = optimizer
        self.scheduler = scheduler
        for chunk in self.model:
            chunk.gives_likeness = cfg.use_weighting
        # None instead of a token count, because the loss is divided already
        policy[0].module.config.finalize_model_grads_func = lambda chunks, _num_tokens, **groups: finalize_model_grads(
            chunks, None, **groups
        )

    @property
    def model(self) -> list[PairModel]:
        """The policy's chunks on this rank, without DistributedDataParallel."""
        return [chunk.module for chunk in self.policy]

    def model_to_save(self) -> list[PairModel]:
        """`model` with all weights up to date. Collectives: with `overlap_param_gather`, the all-gather over dp that would
        else be done in the next forward pass."""
        for chunk in self.policy:
            if chunk.ddp_config.overlap_param_gather:
                chunk.start_param_sync(force_sync=True)
        return self.model

    def step(self, batch: GlobalBatch) -> StepOutcome:
        """Trains on one global batch. Raises NonFiniteLoss if the config says stop; the weights are then unchanged.

        Collectives: those of the models and the pipeline, gradient reduction over dp, one all-reduce of the metrics over
        dp and one broadcast over pp. Waits for the device after the last micro-batch, for the gradient norm; the metrics,
        read next, are done by then. The update is queued when this returns.
        """
        for chunk in self.policy:
            chunk.zero_grad_buffer()
            chunk.train()
        self.optimizer.zero_grad()
        batch = self._ready(batch)
        if self.balance is not None:
            self.balance.start(num_tokens=batch.num_tokens, num_pairs=batch.num_pairs)
        sums = self._forward_backward(batch)
        grad_norm = gradient_norm(self.optimizer)
        metrics = sums.means()
        if self.balance is not None:
            metrics |= balance_metrics([self.balance], per_layer=self.log_balance_per_layer)
        lr = self.optimizer.param_groups[0]["lr"]
        updated = math.isfinite(metrics["loss"]) and math.isfinite(grad_norm)
        if updated:
            update(self.optimizer, grad_norm)
        if not updated and self.cfg.on_nonfinite_loss == "stop":
            raise NonFiniteLoss(
                f"loss {metrics['loss']}, gradient norm {grad_norm} on the pairs {batch.pair_indices} (rows of the "
                "training file, from 0); the weights were not changed; look at these rows, lower the learning rate, "
                "or set dpo.on_nonfinite_loss: skip"
            )
        self.scheduler.step(increment=1)
        return StepOutcome(metrics, grad_norm, lr, updated)

    def evaluate(self, batches: Iterable[GlobalBatch]) -> dict[str, float]:
        """Metrics of the policy, as means over the pairs of these batches. Collectives as in `step`, without gradients."""
        sums = MetricSums(self.parallel.device)
        for batch in map(self._ready, batches):
            policy = answer_logps(self.model, batch.micro_batches, self.parallel)
            # only the last pipeline stage has logps
            for logps, micro_batch in zip(policy, batch.micro_batches, strict=False):
                sums.add(pair_loss(logps, micro_batch, self.cfg).metrics)
        return self._reduced(sums).means()

    def _ready(self, batch: GlobalBatch) -> GlobalBatch:
        """The batch with its micro-batches on the device. On the last pipeline stage they have the reference's
        log-probabilities: from the data, or from the resident reference. Does not wait for the copies. Collectives: the
        resident reference's."""
        micro_batches = [one.to(self.parallel.device) for one in batch.micro_batches]
        if self.reference is not None:
            found = self.reference.logps(micro_batches)  # empty, except on the last stage
            for number, logps in enumerate(found):
                micro_batches[number] = dataclasses.replace(micro_batches[number], reference_logps=logps)
        return dataclasses.replace(batch, micro_batches=micro_batches)

    def _forward_backward(self, batch: GlobalBatch) -> MetricSums:
        """Computes the batch's gradients in the gradient buffer, finalised, and its metrics, reduced."""
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
        """Totals over data-parallel ranks, sent from the last pipeline stage to all. also: names besides the objective's."""
        names = [*metric_names(self.cfg, has_reference=self.cfg.reference.mode != "none"), *also]
        sums.reduce(self.parallel.total_from_last_stage, names)
        return sums


def pair_loss(found: torch.Tensor, micro_batch: PackedBatch, cfg: DpoConfig) -> LossOutput:
    """The objective of one micro-batch. found: what the policy gave for its answers (PairModel.forward). The reference's
    logps are in the micro-batch."""
    chosen, rejected = micro_batch.pairs.to(found.device).unbind(1)
    tokens, reference = micro_batch.answer_tokens.to(found.device), micro_batch.reference_logps
    logps, whole, weights = weighted_logps(found), whole_logps(found, cfg), None
    if cfg.use_weighting:
        likeness = (found[:, -1].detach() / tokens).exp()
        weights = likeness[chosen] * likeness[rejected]
    # Indexed, not index_select: on a GPU the gradients of an answer in several pairs are then summed in a fixed order
    return dpo_loss(
        logps[chosen],
        logps[rejected],
        None if reference is None else reference[chosen],
        None if reference is None else reference[rejected],
        tokens[chosen],
        tokens[rejected],
        cfg,
        whole_logps=(whole[chosen], whole[rejected]),
        pair_weights=weights,
        facts=PairFacts(micro_batch.weights, micro_batch.reward_gaps, chosen, micro_batch.ranking_shares),
    )


def whole_logps(found: torch.Tensor, cfg: DpoConfig) -> torch.Tensor:
    """[K] sums over all tokens of the answers, out of what a model gave (PairModel.forward)."""
    return found if found.dim() == 1 else found[:, 0 if cfg.ld_alpha is None else 1]
