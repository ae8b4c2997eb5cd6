"""Which device a rank works on, and what the machine has."""

from __future__ import annotations

import functools
import importlib
import os
import warnings

import torch

from megadpo.config.known import MIXED_PRODUCTS, Machine
from megadpo.config.problems import ConfigError, Problem
from megadpo.parallel.cpu import enable_cpu


def setup_device(requested: str) -> torch.device:
    """The device for `policy.device` ('auto', 'cpu' or 'cuda'), made current; redirects megatron-core on a CPU.

    Raises ConfigError where 'cuda' is asked for and absent, where there are more processes than GPUs, where 'cpu' is
    asked for and CUDA is present (megatron-core then uses CUDA tensors of its own; hide the GPUs from the process
    instead), or where the environment chooses Transformer Engine's attention.
    """
    # megatron-core asserts this of every model it builds (language_module.py `_set_attention_backend`), and sets them
    chosen = [n for n in ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN") if os.environ.get(n, "1") != "1"]
    if chosen:
        fix = "unset {}; policy.attention_kernel chooses the kernel"
        raise ConfigError(
            [Problem(f"environment variable {n}", os.environ[n], "unset or 1", fix.format(n)) for n in chosen]
        )
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
    if processes > visible:  # every rank of the node must refuse, or the others would wait for this one
        expected = f"at most the {visible} GPUs that each process sees"
        fix = f"--nproc-per-node {visible}, or show them all in CUDA_VISIBLE_DEVICES"
        raise ConfigError([Problem("processes on this node", processes, expected, fix)])
    device = torch.device("cuda", number)
    torch.cuda.set_device(device)
    # NVIDIA's containers set TORCH_ALLOW_TF32_CUBLAS_OVERRIDE: float32 products would have 10 bits of mantissa
    torch.set_float32_matmul_precision("highest")
    return device


@functools.cache
def machine(device: torch.device) -> Machine:
    """This machine, for a rank on `device`. The meta device counts as a CPU."""
    if device.type != "cuda":
        return Machine(device="cpu", why_missing=why_missing)
    major, minor = (torch.version.cuda or "0.0").split(".")[:2]
    return Machine(
        device="cuda",
        compute_capability=torch.cuda.get_device_capability(device),
        cuda_version=(int(major), int(minor)),
        why_missing=why_missing,
    )


@functools.cache
def why_missing(name: str) -> str | None:
    """Why the Python package `name`, or MIXED_PRODUCTS, can't be used; None where it can.

    The package is imported: one built for another torch, or without its CUDA libraries, is found but fails to load.
    """
    if name == MIXED_PRODUCTS:
        there = multiplies_into_float32(torch.device("cuda"))
        return None if there else f"torch {torch.__version__} has none here"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module(name)
            if name != "transformer_engine":
                return None
            importlib.import_module("transformer_engine.pytorch")
            parts = importlib.import_module("megatron.core.extensions.transformer_engine")
    except ModuleNotFoundError as error:
        return f"{name} is not installed ({error})"
    except Exception as error:  # the loader raises OSError, the build RuntimeError, its self-checks AssertionError
        return f"{name} is installed but can't be loaded ({str(error).splitlines()[0]})"
    return None if parts.HAVE_TE else "megatron-core could not import the parts of transformer_engine that it uses"


def multiplies_into_float32(device: torch.device) -> bool:
    """Whether torch on this device multiplies bfloat16 matrices into a float32 one, and adds the product to one, without
    rounding it to bfloat16 first. CUDA builds do from 2.10 on (https://github.com/pytorch/pytorch/pull/167931). Waits for
    the device."""
    a = torch.ones(16, 16, device=device, dtype=torch.bfloat16)
    b = a.clone().fill_diagonal_(256.0)
    total = torch.full((16, 16), 2.0**-10, device=device)
    try:
        product = torch.mm(a, b, out_dtype=torch.float32, out=torch.empty_like(total))
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError):  # refused, or no such argument
        return False
    return bool((product == 271.0).all() & (total == 271.0 + 2.0**-10).all())  # neither is a bfloat16


def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a CPU tensor to `device` without waiting. (A copy from memory that isn't pinned would wait for the GPU.)"""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)  # the caching allocator keeps it until the copy is done
