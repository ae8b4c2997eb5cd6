"""Pairs -> token ids and loss masks, and a cache of them."""
