"""Pairs -> token ids and loss masks, and the cache that keeps them."""
