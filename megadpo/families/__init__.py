"""Model families, a file each: how config.json is read, what a layer is made of, what its weights are called, what is
refused. FAMILIES (config/variants.py) finds the files; nothing here needs torch."""

from megadpo.families.reading import parse_architecture, read_architecture
from megadpo.families.weight_table import WeightEntry, WeightTable, weight_table

__all__ = ["WeightEntry", "WeightTable", "parse_architecture", "read_architecture", "weight_table"]
