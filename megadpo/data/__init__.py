"""Preference data: files -> pairs -> token ids -> packed micro-batches."""
