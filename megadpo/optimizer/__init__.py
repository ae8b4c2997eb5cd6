"""megatron-core's optimizer and schedule for the policy: building them, a guarded step, state for checkpoints."""
