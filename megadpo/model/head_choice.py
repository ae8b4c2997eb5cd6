"""Which implementation of the vocabulary-parallel head runs."""

from __future__ import annotations

import importlib.util
from typing import Protocol

import torch
import torch.distributed as dist

from megadpo.config.problems import ConfigError, Problem
from megadpo.model.head import vocab_parallel_logps


class LogpsHead(Protocol):
    """`vocab_parallel_logps`, or what stands in for it."""

    def __call__(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        *,
        vocab_start: int,
        group: dist.ProcessGroup,
        chunk_tokens: int,
    ) -> torch.Tensor: ...


def choose_head(requested: str, device: torch.device) -> tuple[str, LogpsHead]:
    """Name and function of the head for `policy.logprob_kernel`: 'auto' is triton on a GPU that has it, else torch.

    Raises ConfigError where triton is asked for and cannot run, and where the GPU's torch lacks its products.
    """
    there = importlib.util.find_spec("triton") is not None
    if requested == "torch" or (requested == "auto" and not (device.type == "cuda" and there)):
        return "torch", vocab_parallel_logps
    where = "policy.logprob_kernel"
    if device.type != "cuda":
        raise ConfigError([Problem(where, requested, "a CUDA device for this kernel", "use 'auto' on a CPU")])
    if not there:
        raise ConfigError([Problem(where, requested, "Triton importable", "pip install triton, or use 'torch'")])
    from megadpo.model.head_fused import fused_vocab_parallel_logps, multiplies_into_float32

    if not multiplies_into_float32(device):
        expected = f"torch to multiply bfloat16 matrices into float32 ones on {device}; {torch.__version__} does not"
        raise ConfigError([Problem(where, requested, expected, "use 'torch', or torch 2.11 or newer for CUDA")])
    return "triton", fused_vocab_parallel_logps
