"""What a layout would need and give, before a cluster is paid for: memory, FLOPs, expected time. No GPU, no weights."""
