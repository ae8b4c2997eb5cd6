"""Process groups, the device, and megatron-core on a CPU. The only room that knows megatron-core's parallel_state."""

from megadpo.parallel.device import machine, send, setup_device
from megadpo.parallel.groups import ParallelContext, destroy, initialize
from megadpo.parallel.pipeline import run_pipeline

__all__ = [
    "ParallelContext",
    "destroy",
    "initialize",
    "machine",
    "run_pipeline",
    "send",
    "setup_device",
]
