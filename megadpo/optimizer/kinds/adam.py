"""AdamW: chooses torch's, Transformer Engine's FusedAdam, or FusedAdam with our step, and makes megatron-core use it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from megadpo.config.known import INSTALL, Known, Machine
from megadpo.config.problems import Problem
from megadpo.config.types import PositiveFloat, Precision, Proportion, Range
from megadpo.config.variants import OPTIMIZERS, Lazy
from megadpo.optimizer.slices import in_slices

if TYPE_CHECKING:
    import torch

    from megadpo.optimizer import one_pass
    from megadpo.parallel import device as device_room
else:  # a config is checked without torch
    torch, device_room = Lazy("torch"), Lazy("megadpo.parallel.device")
    one_pass = Lazy("megadpo.optimizer.one_pass")  # it imports Triton

AdamName = Literal["transformer_engine", "triton", "torch"]
_OPT = "policy.megatron_cfg.optimizer"


@OPTIMIZERS.add("adam")
@dataclass(frozen=True, kw_only=True)
class Adam:
    """AdamW: weight decay is separate from the gradient (Loshchilov and Hutter 2019, https://arxiv.org/abs/1711.05101)."""

    adam_beta1: Proportion = 0.9
    """Decay of Adam's first moment."""
    adam_beta2: Proportion = 0.98
    """Decay of Adam's second moment."""
    adam_eps: PositiveFloat = 1e-8
    """Added to the root of Adam's second moment."""
    adam_impl: Literal["auto", "transformer_engine", "triton", "torch"] = "auto"
    """The implementation: Transformer Engine's FusedAdam, torch's, or FusedAdam's state with a step of ours that reads and
    writes everything once (triton; for use_precision_aware_optimizer in bfloat16). auto: FusedAdam on CUDA if it can be
    imported. A run must resume with the one that saved it; transformer_engine and triton count as one."""
    use_precision_aware_optimizer: bool = False
    """Moments in the dtypes below, and float32 weights stored as bfloat16 weights plus the missing bits. It is Transformer
    Engine's FusedAdam, on CUDA only, with the distributed optimizer."""
    exp_avg_dtype: Precision = "float32"
    """Dtype of Adam's first moment. Only use_precision_aware_optimizer allows another one than float32."""
    exp_avg_sq_dtype: Precision = "float32"
    """Dtype of Adam's second moment, with the same condition."""
    optimizer_cpu_offload: bool = False
    """Keep and update part of the optimizer state on the CPU (megatron-core's HybridDeviceOptimizer), on CUDA only, with
    use_precision_aware_optimizer."""
    optimizer_offload_fraction: Annotated[float, Range(ge=0, le=1)] = 0.0
    """Share of this rank's state that optimizer_cpu_offload moves to the CPU."""
    overlap_cpu_optimizer_d2h_h2d: bool = False
    """With optimizer_cpu_offload: copy while the CPU updates."""

    @property
    def state_bytes(self) -> int:
        """Bytes of moments for each parameter."""
        return sum(2 if name == "bfloat16" else 4 for name in (self.exp_avg_dtype, self.exp_avg_sq_dtype))

    @property
    def copied_bytes(self) -> int:
        """Bytes per parameter that FusedAdam copies while it updates a slice: each bfloat16 moment as float32."""
        if self.adam_impl == "triton":
            return 0
        return sum(4 for name in (self.exp_avg_dtype, self.exp_avg_sq_dtype) if name == "bfloat16")

    @property
    def needs_fused(self) -> bool:
        """Whether torch's AdamW can't be used."""
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
        """The implementation on this machine, and why. `problems` has refused impossible choices before."""
        if self.adam_impl != "auto":
            how = ", its step in one pass by Triton" if self.adam_impl == "triton" else ""
            return self.adam_impl, f"set by {_OPT}.adam_impl{how}"
        if device_type != "cuda":
            return "torch", "no CUDA device"
        missing = device_room.why_missing("transformer_engine")
        return ("torch", missing) if missing else ("transformer_engine", "CUDA, Transformer Engine installed")

    def install(self, device_type: str) -> None:
        """Makes megatron-core build, save and load the chosen AdamW in this process."""
        use_adam(self.choose(device_type)[0], self.copied_bytes)

    def problems(self, known: Known) -> Iterator[Problem]:
        """What is wrong between these options, the rest of the config, and the machine."""
        yield from self._precision_aware(known)
        yield from self._state()
        on_cpu = known.cfg.policy.device == "cpu"
        if self.adam_impl in ("transformer_engine", "triton") and on_cpu:
            yield Problem(f"{_OPT}.adam_impl", self.adam_impl, "torch or auto on policy.device cpu", "set it to auto")
        if self.adam_impl == "triton" and not (self.needs_fused and known.cfg.policy.precision == "bfloat16"):
            expected = "transformer_engine or auto unless use_precision_aware_optimizer in bfloat16, without offload"
            yield Problem(f"{_OPT}.adam_impl", "triton", expected, "set it to auto")
        if self.adam_impl == "torch" and self.needs_fused:
            fix = f"set it to auto, or {_OPT}.use_precision_aware_optimizer: false"
            expected = "transformer_engine or auto: use_precision_aware_optimizer is part of its FusedAdam"
            yield Problem(f"{_OPT}.adam_impl", "torch", expected, fix)
        if known.machine is not None:
            yield from self._lacking(known.machine)

    def _lacking(self, machine: Machine) -> Iterator[Problem]:
        """What these options need and the machine lacks."""
        has_cuda = machine.device == "cuda"
        lacks = machine.why_missing("transformer_engine") if has_cuda else "no CUDA device"
        if self.adam_impl in ("transformer_engine", "triton") and lacks is not None:
            expected = f"torch or auto: Transformer Engine can't be used here: {lacks}"
            yield Problem(f"{_OPT}.adam_impl", self.adam_impl, expected, f"set it to auto, or {INSTALL}")
        elif self.adam_impl == "triton" and (lacks := machine.why_missing("triton")) is not None:
            expected = f"transformer_engine or auto: Triton can't be used here: {lacks}"
            yield Problem(f"{_OPT}.adam_impl", self.adam_impl, expected, "set it to auto, or pip install triton")
        where = f"{_OPT}.use_precision_aware_optimizer"
        if self.use_precision_aware_optimizer and not has_cuda:
            yield Problem(where, True, "false on a machine without CUDA, which its kernels need", "set it to false")
        elif self.needs_fused and lacks is not None:
            yield Problem(
                where, True, "false without Transformer Engine: it needs FusedAdam", f"{INSTALL}, or set it to false"
            )

    def _precision_aware(self, known: Known) -> Iterator[Problem]:
        if not self.use_precision_aware_optimizer:
            return
        cfg, distributed = known.cfg, f"{_OPT}.use_distributed_optimizer"
        saves = cfg.checkpointing.enabled and cfg.checkpointing.save_optimizer
        is_distributed = cfg.policy.megatron_cfg.optimizer.use_distributed_optimizer
        untested = "false while checkpoints save the optimizer: resuming from this state has not been tested"
        for broken, expected, other in (
            (not is_distributed, f"false unless {distributed} is true", f"{distributed}: true"),
            (cfg.policy.device == "cpu", "false on policy.device cpu: its kernels need CUDA", "policy.device: cuda"),
            (saves, untested, "checkpointing.save_optimizer: false"),
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
                yield Problem(f"{_OPT}.{name}", dtype, "float32 without use_precision_aware_optimizer", fix)
        if offload and not aware:
            fix = f"set it to false, or {_OPT}.use_precision_aware_optimizer: true"
            expected = "false without use_precision_aware_optimizer: megatron-core implements it only there"
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


def use_adam(name: AdamName, copied_bytes: int = 0) -> None:
    """Makes megatron-core build, save and load this AdamW in this process. copied_bytes: as in `in_slices`.

    megatron-core decides at import, by what is installed, in two modules: which class it builds (optimizer/__init__.py:
    12-34 and :359), and whether the step count is in each parameter's state (torch) or in each group (FusedAdam)
    (distrib_optimizer.py:24-40, :640-690 and :815-845).
    """
    from megatron.core import optimizer as mcore_optimizer
    from megatron.core.optimizer import distrib_optimizer

    if name == "torch":
        mcore_optimizer.Adam = torch.optim.AdamW
        distrib_optimizer.Adam = torch.optim.AdamW
    else:
        from transformer_engine.pytorch.optimizers import FusedAdam

        changed = one_pass.in_one_pass(FusedAdam) if name == "triton" else in_slices(FusedAdam, copied_bytes)
        mcore_optimizer.Adam = distrib_optimizer.Adam = changed
    is_te = name != "torch"
    mcore_optimizer.USING_PYTORCH_OPTIMIZER = not is_te
    distrib_optimizer.HAVE_APEX_OR_TE = is_te
    distrib_optimizer.USING_TE_OPTIMIZER = is_te
    distrib_optimizer.USING_APEX_OPTIMIZER = False


def adam_name(inner: torch.optim.Optimizer) -> str:
    """The class and its owner, for the banner."""
    module = type(inner).__module__
    owner = "Transformer Engine" if module.startswith("transformer_engine") else module.split(".")[0]
    return f"{type(inner).__name__} of {owner}"
