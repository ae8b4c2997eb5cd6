"""Rules of experts: their options must fit the model and the number of processes."""

from __future__ import annotations

from collections.abc import Iterator

from megadpo.config.known import Known, rule
from megadpo.config.problems import Problem

_MEG = "policy.megatron_cfg"


@rule
def _load_balancing(known: Known) -> Iterator[Problem]:
    if known.arch is None or known.arch.experts is None:
        return
    yield from known.cfg.refused_with_experts
    megatron = known.cfg.policy.megatron_cfg
    kind = megatron.moe_router_load_balancing_type
    if kind == "none":
        for name in ("moe_per_layer_logging", "moe_aux_loss_coeff"):
            if getattr(megatron, name):
                expected = "left out with moe_router_load_balancing_type none: there is no balancing loss"
                fix = f"set {_MEG}.moe_router_load_balancing_type: aux_loss or seq_aux_loss, or remove it"
                yield Problem(f"{_MEG}.{name}", getattr(megatron, name), expected, fix)
    elif megatron.freeze_moe_router:
        fix = f"set it to none, or {_MEG}.freeze_moe_router: false"
        expected = "none with freeze_moe_router true: a frozen router cannot learn to balance"
        yield Problem(f"{_MEG}.moe_router_load_balancing_type", kind, expected, fix)


@rule
def _experts_of_the_model(known: Known) -> Iterator[Problem]:
    if known.arch is None:
        return
    megatron, arch, experts = known.cfg.policy.megatron_cfg, known.arch, known.arch.experts
    ep, etp = megatron.expert_model_parallel_size, megatron.expert_tensor_parallel_size
    if experts is None:
        for name, size in (("expert_model_parallel_size", ep), ("expert_tensor_parallel_size", etp)):
            if size != 1:
                yield Problem(f"{_MEG}.{name}", size, f"1: {arch.hf_class} has no experts", "set it to 1")
        return
    if experts.number % ep:
        divisors = [n for n in range(1, experts.number + 1) if experts.number % n == 0]
        expected = f"a divisor of the model's {experts.number} experts"
        fix = f"set it to one of {', '.join(map(str, divisors))}"
        yield Problem(f"{_MEG}.expert_model_parallel_size", ep, expected, fix)
    if experts.mlp.ffn_size % etp:
        expected = f"a divisor of the {experts.mlp.ffn_size} channels of an expert"
        yield Problem(f"{_MEG}.expert_tensor_parallel_size", etp, expected, "set it to 1 or to such a divisor")
    if experts.mlp.bias and etp != 1:
        expected = f"1: the experts of {arch.hf_class} have biases, which megatron-core doesn't cut"
        yield Problem(f"{_MEG}.expert_tensor_parallel_size", etp, expected, "set it to 1")
    if megatron.tensor_model_parallel_size > 1 and not megatron.sequence_parallel:
        expected = "true for a model with experts under tensor parallelism: each rank routes its own tokens"
        yield Problem(f"{_MEG}.sequence_parallel", False, expected, "set it to true")


@rule
def _modules_of_the_model(known: Known) -> Iterator[Problem]:
    megatron, arch = known.cfg.policy.megatron_cfg, known.arch
    if arch is None or not megatron.activation_checkpointing or megatron.recompute_granularity != "selective":
        return
    absent = {"layernorm": arch.norms.placement == "post", "mlp": arch.mlp is None, "moe": arch.experts is None}
    absent["shared_experts"] = arch.experts is None or arch.experts.shared_ffn_size is None
    for module in megatron.recompute_modules:
        if absent.get(module):
            expected = f"modules of {arch.hf_class}, whose layers have no {module}"
            yield Problem(f"{_MEG}.recompute_modules", module, expected, "remove it")


@rule
def _experts_in_the_world(known: Known) -> Iterator[Problem]:
    if known.world_size is None:
        return
    megatron = known.cfg.policy.megatron_cfg
    ep, etp = megatron.expert_model_parallel_size, megatron.expert_tensor_parallel_size
    stage, rest = divmod(known.world_size, megatron.pipeline_model_parallel_size)
    if rest or not stage % (ep * etp):  # check.py reports a world that the stages don't divide
        return
    where = f"{_MEG}.expert_model_parallel_size x expert_tensor_parallel_size"
    expected = f"a product that divides the {stage} processes of each pipeline stage"
    yield Problem(where, f"{ep} x {etp}", expected, "lower one of the two, or start more processes")
