"""Which device a rank works on."""

from __future__ import annotations

import os

import torch

from megadpo.config.problems import ConfigError, Problem
from megadpo.parallel.cpu import enable_cpu


def setup_device(requested: str) -> torch.device:
    """The device for `policy.device` ('auto', 'cpu' or 'cuda'), made current; redirects megatron-core on a CPU.

    Raises ConfigError where 'cuda' is asked for and absent, where there are more processes than GPUs, or where 'cpu' is
    asked for and CUDA is present (megatron-core then uses CUDA tensors of its own; hide the GPUs from the process
    instead).
    """
    has_cuda = torch.cuda.is_available()
    if requested == "cuda" and not has_cuda:
        raise ConfigError([Problem("policy.device", "cuda", "a machine with CUDA", "use policy.device=auto or cpu")])
    if requested == "cpu" and has_cuda:
        raise ConfigError(
            [
                Problem(
                    "policy.device", "cpu", "no visible CUDA device", "start with CUDA_VISIBLE_DEVICES='' for a CPU run"
                )
            ]
        )
    if not has_cuda:
        enable_cpu()
        return torch.device("cpu")
    number, visible = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    processes = max(int(os.environ.get("LOCAL_WORLD_SIZE", "1")), number + 1)
    if processes > visible:  # on every rank of the node, or the others would wait for this one
        expected = f"at most the {visible} GPUs that each process sees"
        fix = f"torchrun --nproc-per-node {visible}, or show them all in CUDA_VISIBLE_DEVICES"
        raise ConfigError([Problem("processes on this node", processes, expected, fix)])
    device = torch.device("cuda", number)
    torch.cuda.set_device(device)
    # float32 is float32: NVIDIA's containers set TORCH_ALLOW_TF32_CUBLAS_OVERRIDE, and products would keep 10 bits
    torch.set_float32_matmul_precision("highest")
    return device


def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A CPU tensor on `device`, without waiting for it: a copy out of memory that isn't pinned waits for the GPU."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)  # the caching allocator keeps it until the copy is done
