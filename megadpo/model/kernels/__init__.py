"""Attention over segments, by interchangeable kernels held to one float64 reference in the tests.

A kernel prepares a plan from a pack's segments once a micro-batch (`plan`), and every layer calls it with q, k, v.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch

from megadpo.config.problems import ConfigError, Problem
from megadpo.data.batches.pack import Segment

KERNELS = ("cpu", "sdpa", "varlen", "transformer_engine")


class AttentionKernel(Protocol):
    """Causal attention of segments of queries over lists of keys, aligned at the bottom right."""

    name: str

    def plan(self, segments: tuple[Segment, ...], device: torch.device, dtype: torch.dtype) -> Any:
        """What depends on the segments alone; computed once a micro-batch and shared by all layers."""

    def prepare(self, k: torch.Tensor, v: torch.Tensor, plan: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """k and v [K, G, D] as `attend` takes them; cheap to do again. No collectives.

        K is T, or under context parallelism the tokens of all ranks: k and v are then views of one tensor, and may hold
        keys that no segment of this rank sees."""

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: Any) -> torch.Tensor:
        """q [T, H, D] (G divides H), k and v from `prepare` -> [T, H, D]; scores scaled by D^-0.5. No collectives."""


def choose_kernel(requested: str, device: torch.device, dtype: torch.dtype) -> AttentionKernel:
    """The kernel for `policy.attention_kernel`: 'auto' is cpu on a CPU, sdpa in float32 on a GPU, else varlen.

    Raises ConfigError where the kernel asked for cannot run on this device, dtype or installation.
    """
    name = requested
    if name == "auto":
        on_gpu = "varlen" if dtype == torch.bfloat16 else "sdpa"
        name = on_gpu if device.type == "cuda" else "cpu"
    if name == "sdpa":
        from megadpo.model.kernels.sdpa import SdpaKernel

        return SdpaKernel()
    where = "policy.attention_kernel"
    if name == "cpu":
        if device.type != "cpu":
            raise ConfigError([Problem(where, name, "a CPU for this kernel", "use 'auto' on a GPU")])
        from megadpo.model.kernels.cpu import CpuKernel

        return CpuKernel()
    if device.type != "cuda":
        raise ConfigError([Problem(where, name, "a CUDA device for this kernel", "use 'auto' on a CPU")])
    if dtype != torch.bfloat16:
        raise ConfigError([Problem(where, name, "policy.precision bfloat16", "use 'sdpa' for float32")])
    if name == "varlen":
        from megadpo.model.kernels.varlen import VarlenKernel

        return VarlenKernel()
    if name == "transformer_engine":
        try:
            from megadpo.model.kernels.transformer_engine import TransformerEngineKernel
        except ImportError as error:
            fix = "install the 'gpu' extra (pip install megadpo[gpu]) or use 'varlen'"
            raise ConfigError([Problem(where, name, f"Transformer Engine importable ({error})", fix)]) from error
        return TransformerEngineKernel()
    raise ConfigError([Problem(where, name, "one of auto, " + ", ".join(KERNELS), "choose one of these")])
