"""Token ids -> micro-batches: order, deal, pack, cut, prefetch."""
