"""megatron-core's optimizer and schedule for the policy: building, one guarded step, state for checkpoints."""

from megadpo.optimizer.build import build_optimizer, build_scheduler, machine_problems, wrap_for_training
from megadpo.optimizer.step import guarded_step

__all__ = ["build_optimizer", "build_scheduler", "guarded_step", "machine_problems", "wrap_for_training"]
