"""AdamW, by torch or by Transformer Engine's FusedAdam: which of the two, and how megatron-core is made to take it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from megadpo.config.known import INSTALL, Known, Machine
from megadpo.config.problems import Problem
from megadpo.config.types import PositiveFloat, Precision, Proportion, Range
from megadpo.config.variants import OPTIMIZERS, Lazy

if TYPE_CHECKING:
    import torch

    from megadpo.parallel import device as device_room
else:  # a config is checked without torch
    torch, device_room = Lazy("torch"), Lazy("megadpo.parallel.device")

AdamName = Literal["transformer_engine", "torch"]
_OPT = "policy.megatron_cfg.optimizer"


@OPTIMIZERS.add("adam")
@dataclass(frozen=True, kw_only=True)
class Adam:
    """AdamW: weight decay apart from the gradient (Loshchilov and Hutter 2019, https://arxiv.org/abs/1711.05101)."""

    adam_beta1: Proportion = 0.9
    """Decay of Adam's first moment."""
    adam_beta2: Proportion = 0.98
    """Decay of Adam's second moment."""
    adam_eps: PositiveFloat = 1e-8
    """Added to the root of Adam's second moment."""
    adam_impl: Literal["auto", "transformer_engine", "torch"] = "auto"
    """Whose AdamW: Transformer Engine's FusedAdam or torch's. auto: FusedAdam on CUDA where it can be imported. A run
    resumes with the one that it was saved with."""
    use_precision_aware_optimizer: bool = False
    """Moments in the dtypes below and no second copy of what bfloat16 weights hold: Transformer Engine's FusedAdam, on
    CUDA only, with the distributed optimizer."""
    exp_avg_dtype: Precision = "float32"
    """Dtype of Adam's first moment; other than float32 with use_precision_aware_optimizer only."""
    exp_avg_sq_dtype: Precision = "float32"
    """Dtype of Adam's second moment, likewise."""
    optimizer_cpu_offload: bool = False
    """Keep and update part of the optimizer state on the CPU (megatron-core's HybridDeviceOptimizer), on CUDA only, with
    use_precision_aware_optimizer."""
    optimizer_offload_fraction: Annotated[float, Range(ge=0, le=1)] = 0.0
    """Share of this rank's state that optimizer_cpu_offload moves."""
    overlap_cpu_optimizer_d2h_h2d: bool = False
    """With optimizer_cpu_offload: copy while the CPU updates."""

    @property
    def state_bytes(self) -> int:
        """Bytes of moments for each parameter."""
        return sum(2 if name == "bfloat16" else 4 for name in (self.exp_avg_dtype, self.exp_avg_sq_dtype))

    @property
    def needs_fused(self) -> bool:
        """Whether only FusedAdam will do."""
        return self.use_precision_aware_optimizer and not self.optimizer_cpu_offload

    def settings(self) -> dict[str, Any]:
        """Fields of megatron-core's OptimizerConfig."""
        return {
            "adam_beta1": self.adam_beta1,
            "adam_beta2": self.adam_beta2,
            "adam_eps": self.adam_eps,
            "use_precision_aware_optimizer": self.use_precision_aware_optimizer,
            "exp_avg_dtype": getattr(torch, self.exp_avg_dtype),
            "exp_avg_sq_dtype": getattr(torch, self.exp_avg_sq_dtype),
            "optimizer_cpu_offload": self.optimizer_cpu_offload,
            "optimizer_offload_fraction": self.optimizer_offload_fraction,
            "overlap_cpu_optimizer_d2h_h2d": self.overlap_cpu_optimizer_d2h_h2d,
        }

    def choose(self, device_type: str) -> tuple[AdamName, str]:
        """Whose AdamW on this machine, and why. What is impossible has been refused by then (`problems`)."""
        if self.adam_impl != "auto":
            return self.adam_impl, f"asked for by {_OPT}.adam_impl"
        if device_type != "cuda":
            return "torch", "no CUDA device"
        missing = device_room.why_missing("transformer_engine")
        return ("torch", missing) if missing else ("transformer_engine", "CUDA, Transformer Engine installed")

    def install(self, device_type: str) -> None:
        """Make megatron-core build, save and load the chosen AdamW, for the rest of the process."""
        use_adam(self.choose(device_type)[0])

    def problems(self, known: Known) -> Iterator[Problem]:
        """What must hold between these options, the rest of the config, and the machine."""
        yield from self._precision_aware(known)
        yield from self._state()
        on_cpu = known.cfg.policy.device == "cpu"
        if self.adam_impl == "transformer_engine" and on_cpu:
            yield Problem(f"{_OPT}.adam_impl", self.adam_impl, "torch or auto on policy.device cpu", "set it to auto")
        if self.adam_impl == "torch" and self.needs_fused:
            fix = f"set it to auto, or {_OPT}.use_precision_aware_optimizer: false"
            expected = "transformer_engine or auto with use_precision_aware_optimizer, which is its FusedAdam"
            yield Problem(f"{_OPT}.adam_impl", "torch", expected, fix)
        if known.machine is not None:
            yield from self._lacking(known.machine)

    def _lacking(self, machine: Machine) -> Iterator[Problem]:
        """What these options need and the machine lacks."""
        has_cuda = machine.device == "cuda"
        lacks = machine.why_missing("transformer_engine") if has_cuda else "no CUDA device"
        if self.adam_impl == "transformer_engine" and lacks is not None:
            expected = f"torch or auto: Transformer Engine can't be used here: {lacks}"
            yield Problem(f"{_OPT}.adam_impl", self.adam_impl, expected, f"set it to auto, or {INSTALL}")
        where = f"{_OPT}.use_precision_aware_optimizer"
        if self.use_precision_aware_optimizer and not has_cuda:
            yield Problem(where, True, "false on a machine without CUDA: its kernels are CUDA's", "set it to false")
        elif self.needs_fused and lacks is not None:
            yield Problem(
                where, True, "false without Transformer Engine, whose FusedAdam it is", f"{INSTALL}, or set it to false"
            )

    def _precision_aware(self, known: Known) -> Iterator[Problem]:
        if not self.use_precision_aware_optimizer:
            return
        cfg, distributed = known.cfg, f"{_OPT}.use_distributed_optimizer"
        saves = cfg.checkpointing.enabled and cfg.checkpointing.save_optimizer
        is_distributed = cfg.policy.megatron_cfg.optimizer.use_distributed_optimizer
        unproved = "false while checkpoints save the optimizer: that this state resumes is not proved yet"
        for broken, expected, other in (
            (not is_distributed, f"false unless {distributed} is true", f"{distributed}: true"),
            (cfg.policy.device == "cpu", "false on policy.device cpu: its kernels are CUDA's", "policy.device: cuda"),
            (saves, unproved, "checkpointing.save_optimizer: false"),
        ):
            if broken:
                fix = f"set it to false, or {other}"
                yield Problem(f"{_OPT}.use_precision_aware_optimizer", True, expected, fix)

    def _state(self) -> Iterator[Problem]:
        aware, offload = self.use_precision_aware_optimizer, self.optimizer_cpu_offload
        moments = {"exp_avg_dtype": self.exp_avg_dtype, "exp_avg_sq_dtype": self.exp_avg_sq_dtype}
        for name, dtype in moments.items():
            if not aware and dtype != "float32":
                fix = f"set it to float32, or {_OPT}.use_precision_aware_optimizer: true"
                yield Problem(f"{_OPT}.{name}", dtype, "float32 without the precision-aware one", fix)
        if offload and not aware:
            fix = f"set it to false, or {_OPT}.use_precision_aware_optimizer: true"
            expected = "false without use_precision_aware_optimizer, whose code it shares in megatron-core"
            yield Problem(f"{_OPT}.optimizer_cpu_offload", True, expected, fix)
        fraction = self.optimizer_offload_fraction
        if offload != (fraction > 0):
            expected = "more than 0 with optimizer_cpu_offload" if offload else "0 without optimizer_cpu_offload"
            other = f"{_OPT}.optimizer_cpu_offload: {str(not offload).lower()}"
            fix = f"set it to {'1.0' if offload else '0.0'}, or {other}"
            yield Problem(f"{_OPT}.optimizer_offload_fraction", fraction, expected, fix)
        if self.overlap_cpu_optimizer_d2h_h2d and not offload:
            where = f"{_OPT}.overlap_cpu_optimizer_d2h_h2d"
            yield Problem(where, True, "false without optimizer_cpu_offload", "set it to false")


def use_adam(name: AdamName) -> None:
    """Make megatron-core build, save and load this AdamW, for the rest of the process.

    It decides at import by what is installed, in two modules: which class it builds (optimizer/__init__.py:12-34 and
    :359), and where the step count stands in the state: in each parameter's state (torch) or in each group (FusedAdam)
    (distrib_optimizer.py:24-40, :640-690 and :815-845).
    """
    from megatron.core import optimizer as mcore_optimizer
    from megatron.core.optimizer import distrib_optimizer

    if name == "torch":
        mcore_optimizer.Adam = torch.optim.AdamW
        distrib_optimizer.Adam = torch.optim.AdamW
    else:
        from transformer_engine.pytorch.optimizers import FusedAdam

        mcore_optimizer.Adam = FusedAdam
        distrib_optimizer.Adam = FusedAdam
    is_te = name == "transformer_engine"
    mcore_optimizer.USING_PYTORCH_OPTIMIZER = not is_te
    distrib_optimizer.HAVE_APEX_OR_TE = is_te
    distrib_optimizer.USING_TE_OPTIMIZER = is_te
    distrib_optimizer.USING_APEX_OPTIMIZER = False


def adam_name(inner: torch.optim.Optimizer) -> str:
    """In words for the banner."""
    module = type(inner).__module__
    owner = "Transformer Engine" if module.startswith("transformer_engine") else module.split(".")[0]
    return f"{type(inner).__name__} of {owner}"
