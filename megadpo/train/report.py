"""The banner of a run: its facts as text."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist

from megadpo.checkpoint import complete_checkpoints
from megadpo.config.known import Known
from megadpo.config.metric import parse_metric_name
from megadpo.config.no_effect import warmup_notes
from megadpo.config.schema import Config
from megadpo.config.variants import LAYER_IMPLEMENTATIONS, LOSSES
from megadpo.model.build import count_parameters, is_expert
from megadpo.optimizer.kinds.adam import Adam, adam_name
from megadpo.parallel import machine
from megadpo.train.setup import Run


def banner_rows(run: Run, chosen: Mapping[str, str]) -> list[tuple[str, str]]:
    """(name, text) of each fact about the run. chosen: the result of `choices`. All ranks call it. Collectives: an
    all-reduce of the parameter count."""
    cfg, parallel, inputs = run.cfg, run.parallel, run.inputs
    validation = {
        name: sum(len(batch) for batch in loader.cut(loader.order(0))[: loader.batches_per_epoch])
        for name, loader in inputs.validation.items()
    }
    return [
        ("model", cfg.policy.model_name),
        ("parameters", count_words(all_parameters(run))),
        ("layout", layout_words(layout_sizes(run), parallel.world_size)),
        ("device", f"{parallel.device.type}, {cfg.policy.precision}"),
        ("layers", chosen["layers"]),
        ("kernels", f"attention {chosen['attention']}, log-probabilities {chosen['log-probabilities']}"),
        ("optimizer", chosen["optimizer"]),
        ("batch", f"{cfg.policy.train_global_batch_size:,} {inputs.train_loader.unit}, in {micro_batch_words(cfg)}"),
        ("steps", step_words(run.total_steps, run.position.step)),
        ("data", data_words(len(inputs.train_loader.dataset), validation)),
        ("loss", loss_words(cfg)),
        ("reference", reference_words(cfg)),
        ("logs", cfg.logger.log_dir),
        ("checkpoints", cfg.checkpointing.checkpoint_dir if cfg.checkpointing.enabled else "none"),
        *(("note", note) for note in (*cfg.notes, *warmup_notes(cfg, run.total_steps), *run.notes, *inputs.reports)),
    ]


def closing_words(cfg: Config, last_step: int, *, done_before: bool = False) -> list[str]:
    """The last lines of a finished run: what was saved, where, and how to export it. done_before: the run was finished
    already when it was started. Rank 0 only."""
    saving = cfg.checkpointing
    lines = [f"finished: {last_step:,} steps; metrics in {cfg.logger.log_dir}"]
    if done_before:
        more = "raise dpo.max_num_steps or dpo.max_num_epochs to go on, name another checkpointing.checkpoint_dir to begin anew"
        lines = [f"nothing to do: this run had finished, with step {last_step:,}; {more}"]
    if not saving.enabled:
        return [*lines, "checkpointing.enabled is false: nothing was saved"]
    folder = Path(saving.checkpoint_dir)
    steps = [info.path.name for info in complete_checkpoints(folder)]
    if not steps:
        return [*lines, f"no complete checkpoint in {folder}"]
    lines.append(f"checkpoints in {folder}: {', '.join(steps)}")
    best = ""
    if saving.metric_name is not None and len(steps) > 1:
        best = f"; --best: by {parse_metric_name(saving.metric_name, cfg.data.val_names).key}"
    lines.append(f"export {steps[-1]}: megadpo export {shlex.quote(str(folder))} FOLDER{best}")
    return lines


def choices(run: Run) -> dict[str, str]:
    """What `auto` has chosen on this machine, and why."""
    policy, device = run.cfg.policy, run.parallel.device
    known = Known(cfg=run.cfg, machine=machine(device))
    layers, config = LAYER_IMPLEMENTATIONS.choose(known), run.trainer.model[0].config
    kernels: list[str] = [layers.name]
    if config.fp8:
        kernels.append(f"float8 {config.fp8_recipe} {config.fp8}")
    if layers.fuses_weight_gradient(policy.megatron_cfg):
        kernels.append("fused weight gradients")
    if any(table.fused for table in run.trainer.model[0].rotaries.values()):
        kernels.append("fused RoPE")
    if policy.megatron_cfg.fused_single_qkv_rope:
        kernels.append("queries, keys and values turned and gathered by one kernel")
    parts = getattr(run.trainer.optimizer, "chained_optimizers", [run.trainer.optimizer])
    adam = sorted({adam_name(part.optimizer) for part in parts if part.optimizer is not None})
    kind = policy.megatron_cfg.optimizer.kind
    why = f" ({kind.choose(device.type)[1]})" if isinstance(kind, Adam) else ""
    return {
        "layers": f"{', '.join(kernels)} ({layers.reason(known)})",
        "attention": run.trainer.model[0].kernel.name,
        "log-probabilities": run.trainer.model[0].head.name,
        "optimizer": f"{' and '.join(adam)}{why}" if adam else "none: this rank's weights are all frozen",
    }


def layout_sizes(run: Run) -> dict[str, int]:
    """Short name -> parallel size. EP and ETP only for models with experts."""
    grid = run.parallel.grid
    sizes = {"TP": grid.tensor, "PP": grid.pipeline, "VPP": grid.virtual_pipeline, "CP": grid.context, "DP": grid.data}
    return sizes if run.trainer.balance is None else sizes | {"EP": grid.expert, "ETP": grid.expert_tensor}


def all_parameters(run: Run) -> int:
    """Parameters of the whole model: replicated ones once, tied embeddings once."""
    chunks, grid, tp = run.trainer.model, run.parallel.grid, run.parallel.grid.tensor
    parameters = [parameter for chunk in chunks for parameter in chunk.parameters()]
    experts = sum(p.numel() for p in parameters if is_expert(p))
    shards = sum(p.numel() for p in parameters if getattr(p, "tensor_model_parallel", False)) - experts
    mine = count_parameters(chunks) + shards * (tp - 1) + experts * (grid.expert * grid.expert_tensor - 1)
    last = chunks[-1]
    if last.share_embeddings_and_output_weights and last.post_process and not last.pre_process:
        mine -= last.output_layer.weight.numel() * tp  # the last stage's copy
    counted = torch.tensor([mine], dtype=torch.int64, device=run.parallel.device)
    dist.all_reduce(counted, group=run.parallel.pp_group)
    return int(counted.item())


def layout_words(sizes: Mapping[str, int], world_size: int) -> str:
    """Such as "TP 4 x DP 2 (8 ranks)". Sizes of 1 are left out."""
    wide = [f"{name} {size}" for name, size in sizes.items() if size != 1]
    ranks = f"{world_size} rank" + ("s" if world_size != 1 else "")
    return f"{' x '.join(wide)} ({ranks})" if wide else ranks


def count_words(count: int) -> str:
    """Such as "8,030,261,248 (8.03 B)"."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= size:
            return f"{count:,} ({count / size:.2f} {unit})"
    return f"{count:,}"


def step_words(total_steps: int, start_step: int) -> str:
    return f"{total_steps:,}" + (f", resuming after step {start_step:,}" if start_step else "")


def data_words(train_pairs: int, validation_pairs: Mapping[str, int]) -> str:
    sets = [f"{pairs:,} in validation set {name}" for name, pairs in validation_pairs.items()]
    return ", ".join([f"{train_pairs:,} training pairs", *sets])


def micro_batch_words(cfg: Config) -> str:
    packing = cfg.policy.sequence_packing
    if not packing.enabled:
        return f"micro-batches of {cfg.policy.train_micro_batch_size} pairs"
    prompts = "prompts computed once" if packing.share_prompt else "prompts repeated"
    return f"packs of at most {packing.train_mb_tokens:,} tokens, {prompts}"


def loss_words(cfg: Config) -> str:
    dpo = cfg.dpo
    words = f"{dpo.loss_type}, beta {dpo.reference_policy_kl_penalty:g}"
    usual = LOSSES.defaults()
    words += "".join(f", {name} {value}" for name, value in dpo.loss_options.items() if value != usual[name])
    words += "" if dpo.ld_alpha is None else f", ld_alpha {dpo.ld_alpha:g}"
    words += ", pairs weighted" * dpo.use_weighting
    if dpo.preference_average_log_probs:
        words += ", means over tokens"
    if (dpo.preference_loss_weight, dpo.sft_loss_weight) != (1, 0):
        words += f", weights: preference {dpo.preference_loss_weight:g}, sft {dpo.sft_loss_weight:g}"
    return words


def reference_words(cfg: Config) -> str:
    named = cfg.dpo.reference.model_name
    return {
        "none": "none",
        "cached": f"log-probabilities of {named or 'policy.model_name'}, computed before training",
        "resident": named or "resident copy of policy.model_name",
        "adapter_off": "policy.model_name: the policy with its adapters off",
    }[cfg.dpo.reference.mode]
