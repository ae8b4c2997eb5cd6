"""Where metrics go: one file a logger. metrics.jsonl is always written, the others where the config asks."""
