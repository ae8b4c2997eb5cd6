"""What a layout needs, before a cluster is paid for: memory, parameters, schedule, FLOPs. No GPU, no weights."""
