"""Loggers of metrics, one file each. metrics.jsonl is always written; the config enables the others."""
