"""Builds the policy: loads its weights, freezes what is not trained, and with LoRA attaches adapters."""

from __future__ import annotations

from megadpo.checkpoint import load_weights
from megadpo.config.schema import Config
from megadpo.lora.attach import attach, init_adapters
from megadpo.lora.peft_folder import read_peft
from megadpo.lora.targets import PEFT
from megadpo.model.build import build_model
from megadpo.model.freeze import freeze
from megadpo.model.gpt import PairModel
from megadpo.parallel import ParallelContext
from megadpo.reference import ResidentReference, SwitchedReference
from megadpo.train.inputs import RunInputs
from megadpo.train.reference import build_reference, reference_adapters


def build_policy(
    cfg: Config, inputs: RunInputs, parallel: ParallelContext, *, resumes: bool
) -> tuple[list[PairModel], ResidentReference | None]:
    """The policy's chunks on this rank, and the reference in memory. The latter is None if there is none, or if its
    log-probabilities come with the data.

    resumes: whether the weights are loaded from a checkpoint later. (With LoRA these are the adapters; the base model is
    loaded here.) Collectives: those of build_model and load_weights.
    """
    arch, peft, mode = inputs.arch, cfg.policy.megatron_cfg.peft, cfg.dpo.reference.mode
    # before the policy, so that not both are being loaded at the same time
    reference = build_reference(cfg, inputs, parallel) if mode == "resident" else None
    policy = build_model(arch, cfg.policy, parallel, frozen=False)
    freeze(policy, cfg.policy.freeze, arch)
    if peft.enabled or not resumes:
        load_weights(policy, inputs.source, arch, parallel)
    if not peft.enabled:
        return policy, reference
    trained = attach(policy, arch, peft, parallel)
    if peft.init_from is None:
        init_adapters(trained, peft, cfg.dpo.seed)
    else:
        read_peft(peft.init_from, f"{PEFT}.init_from", arch).load(trained)
    if mode == "adapter_off":
        reference = SwitchedReference(policy, parallel, trained, reference_adapters(policy, arch, cfg, parallel))
    return policy, reference
