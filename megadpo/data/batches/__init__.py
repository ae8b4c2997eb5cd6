"""Token ids -> micro-batches: order the pairs, deal them to ranks, pack them, cut the packs, prefetch."""
