"""Losses and metrics on log-probabilities of pairs: pure torch on [P] tensors, no collectives, no model."""
