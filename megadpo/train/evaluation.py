"""Evaluation of a model on preference pairs: metrics of each set, and every pair's logps in file order."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from megadpo.checkpoint import load_weights
from megadpo.config.problems import ConfigError, Problem
from megadpo.config.schema import Config
from megadpo.data.batches.pack import PackedBatch
from megadpo.lora.adapter import LinearAdapter
from megadpo.lora.attach import adapters_of, attach
from megadpo.lora.peft_folder import read_peft
from megadpo.lora.targets import PEFT
from megadpo.model.build import build_model
from megadpo.model.gpt import PairModel
from megadpo.objective.dpo import metric_names
from megadpo.parallel import ParallelContext
from megadpo.reference import ResidentReference, SwitchedReference, weighted_logps
from megadpo.train.agreement import open_together
from megadpo.train.inputs import RunInputs
from megadpo.train.metrics import MetricSums
from megadpo.train.reference import build_reference, reference_adapters
from megadpo.train.resume import from_first_rank, require_writable
from megadpo.train.setup import seed_everything
from megadpo.train.step import pair_loss, whole_logps


@dataclasses.dataclass(frozen=True)
class PairScore:
    """One pair: its row in the file, its number among the pairs of that row, and sums of log-probabilities in nats (None: there
    is no reference)."""

    index: int
    pair: int
    policy_chosen_logps: float
    policy_rejected_logps: float
    reference_chosen_logps: float | None
    reference_rejected_logps: float | None


class Evaluator:
    """Evaluates the model `policy.model_name`, with the reference `dpo.reference.model_name` if that is set. With adapters
    and mode adapter_off the reference is the model without them."""

    def __init__(self, cfg: Config, parallel: ParallelContext) -> None:
        seed_everything(cfg.dpo.seed, parallel)
        self.parallel = parallel
        inputs = self._open(cfg)
        self._arch = inputs.arch
        named = cfg.dpo.reference.model_name is not None
        self._named_reference = build_reference(cfg, inputs, parallel) if named else None
        self._load_policy(cfg, inputs)

    def turn_to(self, cfg: Config) -> None:
        """Load another policy of the same architecture. `cfg` differs from the first config only in policy.model_name.

        Raises ConfigError for another architecture. Collectives: those of loading weights.
        """
        inputs = self._open(cfg)
        if inputs.arch != self._arch:
            expected = "a model of the same architecture as the first one's"
            raise ConfigError(Problem("--checkpoint", cfg.policy.model_name, expected, "evaluate it by itself"))
        del self.policy, self.reference  # before the next model takes memory
        self._load_policy(cfg, inputs)

    def _load_policy(self, cfg: Config, inputs: RunInputs) -> None:
        model = build_model(inputs.arch, cfg.policy, self.parallel, frozen=True)
        load_weights(model, inputs.source, inputs.arch, self.parallel)
        for chunk in model:
            chunk.gives_likeness = cfg.dpo.use_weighting
        self.policy, self.reference = ResidentReference(model, self.parallel), self._named_reference
        adapters = self._adapters(model, cfg)
        if self.reference is None and cfg.dpo.reference.mode == "adapter_off" and self._some(adapters):
            others = reference_adapters(model, inputs.arch, cfg, self.parallel)
            self.reference = SwitchedReference(model, self.parallel, adapters, others)
        self.has_preference_loss = self.reference is not None or not cfg.dpo.loss.reads_reference
        # Without the reference that it needs, the preference loss gets weight 0
        self.dpo = cfg.dpo if self.has_preference_loss else dataclasses.replace(cfg.dpo, preference_loss_weight=0.0)

    def _adapters(self, model: Sequence[PairModel], cfg: Config) -> list[LinearAdapter]:
        """The policy's: of a checkpoint of a run with LoRA, or those of `peft.init_from`."""
        peft = cfg.policy.megatron_cfg.peft
        found = [adapter for chunk in model for _, adapter in adapters_of(chunk)]
        if self._some(found) or not peft.enabled or peft.init_from is None:
            return found
        found = attach(model, self._arch, peft, self.parallel)
        read_peft(peft.init_from, f"{PEFT}.init_from", self._arch).load(found)
        return found

    def _some(self, adapters: Sequence[LinearAdapter]) -> bool:
        """Whether any rank has one: a pipeline stage may have none. Collectives: `ParallelContext.largest`."""
        return self.parallel.largest(len(adapters)) > 0

    def _open(self, cfg: Config) -> RunInputs:
        whole = dataclasses.replace(cfg, dpo=dataclasses.replace(cfg.dpo, val_batches=0))  # 0: every pair
        inputs = open_together(whole, self.parallel, sets=cfg.data.val_names)
        self.loaders = inputs.loaders
        self.notes = inputs.tokenizer_notes
        return inputs

    def evaluate(self, name: str) -> tuple[dict[str, float | None], list[PairScore]]:
        """Metrics of one set, and its pairs in file order. Both are the same on every rank.

        Collectives: those of the models, one all-reduce and one broadcast of the metrics, an all-gather of the scores.
        """
        sums = MetricSums(self.parallel.device)
        mine: list[PairScore] = []
        loader, rank = self.loaders[name], self.parallel.grid.dp_rank
        rows = loader.dataset.rows
        for batch, (positions, deal) in zip(loader.batches(epoch=0), loader.deals(epoch=0), strict=True):
            policy = self.policy.outputs(batch.micro_batches)
            reference: Sequence[torch.Tensor | None] = [None] * len(policy)
            if self.reference is not None:
                reference = self.reference.outputs(batch.micro_batches)
            # only the last pipeline stage has logps
            for found, of_reference, micro_batch, numbers in zip(
                policy, reference, batch.micro_batches, deal[rank], strict=False
            ):
                weighted = None if of_reference is None else weighted_logps(of_reference)
                scored = dataclasses.replace(micro_batch, reference_logps=weighted)
                sums.add(pair_loss(found, scored, self.dpo).metrics)
                whole = None if of_reference is None else whole_logps(of_reference, self.dpo)
                of_row = positions[numbers] - np.searchsorted(rows, micro_batch.pair_indices.cpu().numpy())
                mine += _scores(micro_batch, of_row, whole_logps(found, self.dpo), whole)
        sums.reduce(
            self.parallel.total_from_last_stage, metric_names(self.dpo, has_reference=self.reference is not None)
        )
        gathered: list[Any] = [None] * self.parallel.world_size
        grid = self.parallel.grid
        dist.all_gather_object(gathered, mine if grid.tp_rank == grid.cp_rank == 0 else [])
        scores = sorted((score for rank in gathered for score in rank), key=lambda score: (score.index, score.pair))
        return metrics_of(sums.means(), scores, has_preference_loss=self.has_preference_loss), scores


def metrics_of(
    means: dict[str, float], scores: list[PairScore], *, has_preference_loss: bool
) -> dict[str, float | None]:
    """`means`, with `pairs`, `logps/margins` and `accuracy`: the share of pairs whose chosen answer is likelier for the
    policy. If the loss needs a reference and there is none, rewards/*, preference_loss and loss are left out."""
    likelier = [s.policy_chosen_logps > s.policy_rejected_logps for s in scores]
    margins = [s.policy_chosen_logps - s.policy_rejected_logps for s in scores]
    extra = {"pairs": len(scores), "accuracy": _mean(likelier), "logps/margins": _mean(margins)}
    if not has_preference_loss:
        means = {key: value for key, value in means.items() if key != "loss"}
    return {**means, **extra}


def write_scores(path: Path, scores: list[PairScore]) -> None:
    """Writes pairs-<name>.jsonl: one object for each pair, in file order. Numbers that are not finite become null."""
    path.write_text("".join(json.dumps(_finite(dataclasses.asdict(score))) + "\n" for score in scores))


def run_evaluation(configs: Sequence[Config], parallel: ParallelContext) -> int:
    """Evaluates the policy of each config on every validation set. Rank 0 writes and prints, and prints a table
    if there are several policies. The configs differ in policy.model_name and log_dir only. Returns the exit code."""
    for cfg in configs:
        from_first_rank(parallel, partial(require_writable, Path(cfg.logger.log_dir), "logger.log_dir"))
    evaluator = Evaluator(configs[0], parallel)
    records: dict[str, dict[str, float | None]] = {}
    for cfg in configs:
        if cfg is not configs[0]:
            evaluator.turn_to(cfg)
        if parallel.rank == 0:
            for note in evaluator.notes:
                print(note, flush=True)
            if len(configs) > 1:
                print(f"{cfg.policy.model_name}:", flush=True)
        records[cfg.policy.model_name] = _evaluate_sets(evaluator, Path(cfg.logger.log_dir))
    if parallel.rank == 0 and len(configs) > 1:
        print_comparison(records)
    return 0


def _evaluate_sets(evaluator: Evaluator, log_dir: Path) -> dict[str, float | None]:
    """Every set of one policy; rank 0 writes and prints. Returns the metrics by their logged names."""
    parallel = evaluator.parallel
    record: dict[str, float | None] = {}
    for name in evaluator.loaders:
        started = time.perf_counter()
        metrics, scores = evaluator.evaluate(name)
        record |= {f"validation-{name}/{metric}": value for metric, value in metrics.items()}
        if parallel.rank == 0:
            write_scores(log_dir / f"pairs-{name}.jsonl", scores)
            seconds = time.perf_counter() - started
            shown = "  ".join(f"{metric} {value:.4f}" for metric, value in metrics.items() if value is not None)
            print(f"{name}: {shown}  ({seconds:.1f} s)", flush=True)
    if parallel.rank == 0:
        (log_dir / "evaluation.json").write_text(json.dumps(_finite(record), indent=1) + "\n")
    return record


def print_comparison(records: Mapping[str, Mapping[str, float | None]]) -> None:
    """A table of the policies, a line each, with what decides between them."""
    metrics = ("accuracy", "logps/margins", "loss", "rewards/accuracies", "rewards/margins")
    columns = [
        name
        for name in dict.fromkeys(name for record in records.values() for name in record)
        if name.partition("/")[2] in metrics
    ]
    table = Table("policy", *columns, box=None, pad_edge=False)
    for policy, record in records.items():
        values = (record.get(name) for name in columns)
        table.add_row(policy, *("-" if value is None else f"{value:.4f}" for value in values))
    console = Console()
    (console if console.is_terminal else Console(width=240)).print(table)


def _scores(
    batch: PackedBatch, of_row: npt.NDArray[np.int64], logps: torch.Tensor, reference: torch.Tensor | None
) -> Iterator[PairScore]:
    values = logps.tolist()
    of_reference = [None] * len(values) if reference is None else reference.tolist()
    for row, number, (chosen, rejected) in zip(
        batch.pair_indices.tolist(), of_row.tolist(), batch.pairs.tolist(), strict=True
    ):
        yield PairScore(row, number, values[chosen], values[rejected], of_reference[chosen], of_reference[rejected])


def _finite(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value if value is not None and math.isfinite(value) else None for key, value in record.items()}


def _mean(values: list[Any]) -> float:
    return sum(values) / len(values) if values else math.nan
