"""megadpo: Direct Preference Optimization on tensor- and pipeline-parallel models, built on megatron-core."""

__version__ = "0.1.0"
