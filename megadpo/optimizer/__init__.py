"""megatron-core's optimizer and schedule for the policy: building, one guarded step, state for checkpoints."""
