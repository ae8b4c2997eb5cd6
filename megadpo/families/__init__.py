"""Model families, one file each: how config.json is read, the parts of a layer, the names of weights, and refusals. FAMILIES
(config/variants.py) finds the files. Nothing here imports torch."""

from megadpo.families.reading import parse_architecture, read_architecture
from megadpo.families.weight_table import WeightEntry, WeightTable, weight_table

__all__ = ["WeightEntry", "WeightTable", "parse_architecture", "read_architecture", "weight_table"]
