"""The model: what all families have in common. Decoder layers, attention of packs, heads, experts, weights."""
